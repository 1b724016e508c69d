"""lm_eval over HTTP gets the scores that it gets in process, exactly."""

import json

import numpy as np
import pytest

pytest.importorskip(
  'lm_eval', reason='not installed: pip install -r requirements-clients.txt'
)
from lm_eval import evaluator, tasks as tasks_lib  # noqa: E402

from inference import model_port  # noqa: E402
from tests.helpers.serving import servers  # noqa: E402

_CHOICE = """\
task: {kind}
dataset_path: json
dataset_kwargs: {{data_files: {{test: {directory}/{kind}.jsonl}}}}
test_split: test
output_type: multiple_choice
doc_to_text: "{{{{context}}}}"
doc_to_choice: "{{{{choices}}}}"
doc_to_target: label
metric_list: [{{metric: acc}}, {{metric: acc_norm}}]
"""
_GENERATE = """\
task: {kind}
dataset_path: json
dataset_kwargs: {{data_files: {{test: {directory}/{kind}.jsonl}}}}
test_split: test
output_type: generate_until
doc_to_text: "{{{{context}}}}"
doc_to_target: "{{{{answer}}}}"
generation_kwargs: {{until: ["e", "."], max_gen_toks: 16}}
metric_list: [{{metric: exact_match}}]
"""
_ROLLING = """\
task: {kind}
dataset_path: json
dataset_kwargs: {{data_files: {{test: {directory}/{kind}.jsonl}}}}
test_split: test
output_type: loglikelihood_rolling
doc_to_text: ""
doc_to_target: "{{{{context}}}}"
metric_list: [{{metric: byte_perplexity}}, {{metric: bits_per_byte}}]
"""
_TASKS = {'choice': _CHOICE, 'generate': _GENERATE, 'rolling': _ROLLING}


@pytest.fixture
def tasks(tmp_path, monkeypatch):
  """Writes tasks and their data; returns paths by kind."""
  import datasets

  monkeypatch.setattr(datasets.config, 'HF_DATASETS_CACHE', tmp_path / 'cache')
  datasets.disable_progress_bars()
  rng = np.random.default_rng(0)
  words = ['the', 'sky', 'is', 'blue', 'seven', 'apples', 'naïve', 'trees']
  rows = [
    {
      'context': ' '.join(rng.choice(words, 2 + 3 * n)),
      'choices': [' '.join(rng.choice(words, 2)) for _ in range(4)],
      'label': int(rng.integers(4)),
      'answer': 'x',
    }
    for n in range(12)
  ]
  paths = {}
  for kind, text in _TASKS.items():
    data = ''.join(json.dumps(row) + '\n' for row in rows)
    (tmp_path / f'{kind}.jsonl').write_text(data)
    paths[kind] = tmp_path / f'{kind}.yaml'
    paths[kind].write_text(text.format(directory=tmp_path, kind=kind))
  return paths


def _run(model, paths, **more):
  manager = tasks_lib.TaskManager(include_defaults=False)
  return evaluator.simple_evaluate(
    model=model,
    tasks=[str(path) for path in paths],
    task_manager=manager,
    bootstrap_iters=0,
    **more,
  )


def _check_equal(got, want):
  for task, samples in want['samples'].items():
    for ours, theirs in zip(got['samples'][task], samples, strict=True):
      assert ours['doc_hash'] == theirs['doc_hash']
      assert _flat(ours['resps']) == _flat(theirs['resps'])
    scores = {
      name: value
      for name, value in want['results'][task].items()
      if isinstance(value, float)
    }
    assert scores
    for name, value in scores.items():
      assert got['results'][task][name] == value
    answers = {str(sample['resps']) for sample in samples}
    assert len(answers) > 2  # equality of constants would prove nothing


def _flat(nested):
  """Returns the numbers and texts of answers; sums of floats rounded."""
  if isinstance(nested, list | tuple):
    return [each for item in nested for each in _flat(item)]
  # lm_eval adds the float32 log-probabilities up in another order than we do:
  # in float64 that changes the last of 53 bits.
  return [round(nested, 9) if isinstance(nested, float) else str(nested)]


@pytest.mark.slow
@pytest.mark.parametrize(
  'more', [{'batch_size': 1}, {'batch_size': 4}, {'num_concurrent': 4}]
)
def test_local_completions_score_as_in_process(wide, in_process, tasks, more):
  from lm_eval.models import openai_completions

  from evals.harness import lm_eval_adapter

  context = in_process.engine.context
  theirs = openai_completions.LocalCompletionsAPI(
    model=servers.MODEL,
    base_url=f'{wide.url}/v1/completions',
    # The tokenizer of the server, found by lm_eval itself.
    tokenizer_backend='auto',
    max_length=context + 1,  # lm_eval keeps one for the generated token
    **more,
  )
  assert theirs.tokenizer_backend == 'remote'
  ours = lm_eval_adapter.LM(model_port.evaluated(in_process))
  _check_equal(_run(theirs, tasks.values()), _run(ours, tasks.values()))


@pytest.mark.slow
def test_local_chat_completions_score_as_in_process(wide, in_process, tasks):
  from lm_eval.models import openai_completions

  from evals.harness import lm_eval_adapter

  theirs = openai_completions.LocalChatCompletion(
    model=servers.MODEL,
    base_url=f'{wide.url}/v1/chat/completions',
    max_length=in_process.engine.context + 1,
  )
  ours = lm_eval_adapter.LM(model_port.evaluated(in_process))
  _check_equal(
    *(
      _run(model, [tasks['generate']], apply_chat_template=True)
      for model in (theirs, ours)
    )
  )
