"""lm_eval in process: its own `hf` model gets the same scores from our weights.

Skipped where lm_eval is not installed (requirements-eval.txt), and of the
oracle where torch and transformers are not (requirements-peer.txt).
"""

import json
import math
import types

import numpy as np
import pytest

from evals import encoding, evaluate, options as options_lib, ports
from models import transformer
from tests.helpers import eval_models
from tests.helpers.serving import no_network

_WHY = 'not installed: pip install -r requirements-peer.txt'
lm_eval = pytest.importorskip('lm_eval', reason=_WHY)

from evals.harness import lm_eval_adapter, lm_eval_tasks  # noqa: E402

CHOICE = """\
task: local_choice
dataset_path: json
dataset_kwargs: {{data_files: {{test: {directory}/choice.jsonl}}}}
test_split: test
output_type: multiple_choice
doc_to_text: "{{{{context}}}}"
doc_to_choice: "{{{{choices}}}}"
doc_to_target: label
metric_list:
  - {{metric: acc}}
  - {{metric: acc_norm}}
  - {{metric: acc_bytes}}
"""
GENERATE = """\
task: local_generate
dataset_path: json
dataset_kwargs: {{data_files: {{test: {directory}/generate.jsonl}}}}
test_split: test
output_type: generate_until
doc_to_text: "{{{{prompt}}}}"
doc_to_target: "{{{{answer}}}}"
generation_kwargs: {{until: ["o", "."], max_gen_toks: 12}}
metric_list:
  - {{metric: exact_match}}
"""
ROLLING = """\
task: local_rolling
dataset_path: json
dataset_kwargs: {{data_files: {{test: {directory}/rolling.jsonl}}}}
test_split: test
output_type: loglikelihood_rolling
doc_to_text: ""
doc_to_target: "{{{{text}}}}"
metric_list:
  - {{metric: word_perplexity}}
  - {{metric: byte_perplexity}}
  - {{metric: bits_per_byte}}
"""


def _write_tasks(directory):
  """Writes three tasks and their data; returns the paths of the tasks."""
  rng = np.random.default_rng(0)
  words = ['the', 'sky', 'is', 'blue', 'seven', 'apples', 'naïve', 'trees']

  def text(low, high):
    return ' '.join(rng.choice(words, rng.integers(low, high)))

  rows = {
    'choice': [
      {
        # Some contexts are longer than the model's, and one is empty.
        'context': f'{text(1, 60)} ' if i else '',
        'choices': [text(1, 5) for _ in range(4)],
        'label': int(rng.integers(4)),
      }
      for i in range(24)
    ],
    'generate': [
      # Like rendered chats; one of them begins with BOS.
      {'prompt': f'{start}{text(1, 60)}<|eos|> a', 'answer': text(1, 4)}
      for start in ('', '<|bos|>', '<|pad|>', '') * 2
    ],
    # Texts of one token up to several windows.
    'rolling': [{'text': text(1, 2 + 12 * i)} for i in range(8)],
  }
  paths = []
  for kind, template in (
    ('choice', CHOICE),
    ('generate', GENERATE),
    ('rolling', ROLLING),
  ):
    lines = ''.join(json.dumps(row) + '\n' for row in rows[kind])
    (directory / f'{kind}.jsonl').write_text(lines)
    paths.append(str(directory / f'{kind}.yaml'))
    (directory / f'{kind}.yaml').write_text(
      template.format(directory=directory)
    )
  return paths


def _evaluate(model, paths):
  """Returns lm_eval's results, and the answers for each sample."""
  manager = lm_eval.tasks.TaskManager(include_defaults=False)
  return lm_eval.simple_evaluate(
    model=model, tasks=paths, task_manager=manager, bootstrap_iters=0
  )


@pytest.fixture
def offline(tmp_path, monkeypatch):
  """Reads data sets from files, and caches them in the test's directory."""
  import datasets

  monkeypatch.setattr(datasets.config, 'HF_DATASETS_CACHE', tmp_path / 'cache')
  datasets.disable_progress_bars()


@pytest.mark.slow
@pytest.mark.parametrize('adds_bos', [False, True])
def test_the_same_weights_score_as_in_lm_eval_s_own_model(
  tmp_path, offline, adds_bos
):
  pytest.importorskip('torch', reason=_WHY)
  pytest.importorskip('accelerate', reason=_WHY)
  from lm_eval.models import huggingface
  import tokenizers as hf_tokenizers

  from tests.helpers import eval_peers

  ours, theirs = eval_peers.tokenizers(tmp_path)
  if adds_bos:
    theirs._tokenizer.post_processor = (
      hf_tokenizers.processors.TemplateProcessing(
        single='<|bos|> $A', special_tokens=[('<|bos|>', ours.bos_id)]
      )
    )
  config, params, peer = eval_peers.llama(ours.vocab_size, ours.eos_id)
  net = no_network.Network(
    transformer.Transformer(config).apply, params, ours, eval_peers.MAX_LENGTH
  )
  model = ports.Model(
    tokenizer=ours,
    max_length=eval_peers.MAX_LENGTH,
    logprob_fn=net.score,
    sample_fn=net.sample,
    adds_bos=adds_bos,
    encode_prompt=encoding.naming_special_tokens(ours),
  )
  paths = _write_tasks(tmp_path)
  got = _evaluate(lm_eval_adapter.LM(model), paths)
  want = _evaluate(
    # In a batch, hf puts BOS before all texts or none, as for the first text.
    huggingface.HFLM(pretrained=peer, tokenizer=theirs, batch_size=1),
    paths,
  )
  _check_same(got, want)


def _check_same(got, want):
  for task in want['samples']:
    pairs = zip(got['samples'][task], want['samples'][task], strict=True)
    for ours, theirs in pairs:
      assert ours['doc_hash'] == theirs['doc_hash']
      if task == 'local_generate':
        assert ours['resps'] == theirs['resps']
        continue
      # float32 sums in another order, over up to 200 tokens of 6 nats each.
      np.testing.assert_allclose(
        _numbers(ours['resps']), _numbers(theirs['resps']), rtol=2e-5, atol=1e-4
      )
  scores = {
    (task, name): value
    for task, metrics in want['results'].items()
    for name, value in metrics.items()
    if isinstance(value, float)
  }
  assert {'acc,none', 'acc_norm,none', 'exact_match,none'} <= {
    name for _, name in scores
  }
  for (task, name), value in scores.items():
    # Shares are equal; perplexities are equal up to float32 rounding.
    tolerance = 1e-5 if 'per' in name else 0
    assert got['results'][task][name] == pytest.approx(value, rel=tolerance)
  # The answers differ: equality of constants would prove nothing.
  answers = [s['resps'] for s in want['samples']['local_generate']]
  assert len({str(answer) for answer in answers}) > 4
  assert 0 < scores['local_choice', 'acc,none'] < 1


def _numbers(nested):
  if isinstance(nested, list | tuple):
    return [x for item in nested for x in _numbers(item)]
  return [float(nested)]


def _request(*args):
  return types.SimpleNamespace(args=args)


def test_contexts_are_cut_as_lm_eval_cuts_them():
  model = eval_models.model()
  table = model.logprob_fn.__self__
  lm = lm_eval_adapter.LM(model)
  lm.loglikelihood(
    [_request('a b ', 'c'), _request('', 'cd')], disable_tqdm=True
  )
  assert table.requests == [
    ([97, 32, 98], [32, 99]),
    ([model.prefix], [99, 100]),
  ]


def test_ours_and_lm_eval_s_pairs_are_the_same():
  for adds_bos in (False, True):
    model = eval_models.model(adds_bos=adds_bos)
    lm = lm_eval_adapter.LM(model)
    for context in ('a', 'a b', 'a \n', 'naïve '):
      for continuation in ('c', ' c', '\nd'):
        ours = encoding.encode_pair(model, context, continuation)
        assert ours[:2] == lm._encode_pair(context, continuation)


def test_a_long_context_is_cut_with_a_warning(caplog):
  model = eval_models.model(max_length=4)
  table = model.logprob_fn.__self__
  lm_eval_adapter.LM(model).loglikelihood(
    [_request('abcdef', 'gh')], disable_tqdm=True
  )
  assert table.requests == [([100, 101, 102], [103, 104])]
  assert '3 were cut from the left' in caplog.text


def test_rolling_windows_have_one_token_of_context():
  model = eval_models.model(max_length=4)
  table = model.logprob_fn.__self__
  (answer,) = lm_eval_adapter.LM(model).loglikelihood_rolling(
    [_request('abcdefg')]
  )
  a = ord('a')
  assert table.requests == [
    ([model.prefix], [a, a + 1, a + 2, a + 3]),
    # The last window is filled with context.
    ([a + 2, a + 3], [a + 4, a + 5, a + 6]),
  ]
  scored = table.score(table.requests[:2])
  assert answer == pytest.approx(sum(one.logprob for one in scored))


def _generate(lm, *requests):
  return lm.generate_until([_request(*request) for request in requests])


def test_generation_stops_where_the_task_says():
  seen = []
  sample = eval_models.writer([['a.b'], ['c'], ['d']], seen=seen)
  lm = lm_eval_adapter.LM(eval_models.model(sample_fn=sample))
  answers = _generate(
    lm,
    ('1', {'until': ['.'], 'max_gen_toks': 8}),
    ('2', {'until': '\n', 'max_gen_toks': 8}),
    ('3', {'until': ['.'], 'max_gen_toks': 8}),
  )
  # The first and the third request are one call. A stop string that the model
  # left in the text is cut off.
  assert answers == ['a', 'd', 'c']
  assert [settings.stop for _, settings, _ in seen] == [('.',), ('\n',)]
  assert [len(prompts) for prompts, _, _ in seen] == [2, 1]
  assert seen[0][1].max_tokens == 8
  assert seen[0][1].temperature == 0


def test_repeats_are_samples_of_one_prompt():
  seen = []
  sample = eval_models.writer([['a', 'b'], ['c']], seen=seen)
  lm = lm_eval_adapter.LM(eval_models.model(sample_fn=sample), seed=5)
  kwargs = {
    'until': [],
    'max_gen_toks': 8,
    'do_sample': True,
    'temperature': 0.5,
    'top_p': 0.9,
  }
  answers = _generate(lm, ('1', kwargs), ('2', kwargs), ('1', kwargs))
  assert answers == ['a', 'c', 'b']
  (_, settings, num_samples), _ = seen
  assert num_samples == 2
  assert (settings.temperature, settings.seed) == (0.5, 5)
  assert settings.filters == {'top_p': 0.9}


def test_a_prompt_is_cut_to_leave_room(caplog):
  seen = []
  sample = eval_models.writer([['a']], seen=seen)
  lm = lm_eval_adapter.LM(eval_models.model(sample_fn=sample))
  _generate(lm, ('x' * 30, {'until': [], 'max_gen_toks': 8}))
  assert len(seen[0][0][0]) == 24
  assert '6 tokens of a prompt were cut' in caplog.text
  with pytest.raises(ValueError, match='max_tokens: got 32, expected less'):
    _generate(lm, ('x', {'until': [], 'max_gen_toks': 32}))


@pytest.mark.parametrize(
  ('kwargs', 'words'),
  [
    ({'num_beams': 4}, "got {'num_beams': 4}, expected only until"),
    ({'do_sample': True}, 'got do_sample with temperature None'),
  ],
)
def test_what_the_ports_do_not_have_is_refused(kwargs, words):
  lm = lm_eval_adapter.LM(eval_models.model(sample_fn=eval_models.writer([])))
  with pytest.raises(ValueError, match=words):
    _generate(lm, ('x', {'until': [], 'max_gen_toks': 8} | kwargs))


def _render(messages, *, add_generation_prompt):
  text = ''.join(f'<{m["role"]}>{m["content"]}<end>' for m in messages)
  return text + '<assistant>' * add_generation_prompt


def test_a_chat_is_rendered_and_the_last_turn_left_open():
  lm = lm_eval_adapter.LM(eval_models.model(render_chat=_render))
  turns = [{'role': 'user', 'content': 'hi'}]
  assert lm.apply_chat_template(turns) == '<user>hi<end><assistant>'
  turns.append({'role': 'assistant', 'content': 'The answer is '})
  assert lm.apply_chat_template(turns, add_generation_prompt=False) == (
    '<user>hi<end><assistant>The answer is'
  )
  assert lm.chat_template(False) is None
  assert lm.chat_template(True)
  with pytest.raises(ValueError, match='the model has one template'):
    lm.chat_template('other')
  with pytest.raises(ValueError, match='got a model without a chat template'):
    lm_eval_adapter.LM(eval_models.model()).apply_chat_template(turns)


def test_tasks_run_by_name_and_keep_their_examples(tmp_path, offline):
  paths = _write_tasks(tmp_path)
  model = eval_models.model(max_length=400)
  result = evaluate.run(f'lm_eval:{paths[0]},{paths[2]}', model)
  choice, rolling = result.groups
  assert (choice.name, rolling.name) == ('local_choice', 'local_rolling')
  assert choice.num_examples == len(choice.example_ids) == 24
  acc = choice.score('acc')
  assert len(acc.values) == 24
  assert acc.standard_error == pytest.approx(
    np.std(acc.values, ddof=1) / math.sqrt(24)
  )
  assert acc.higher_is_better
  # A ratio of sums, whose values are compared text by text.
  bits = rolling.score('bits_per_byte')
  assert np.mean(bits.values) == pytest.approx(bits.value)
  assert bits.standard_error > 0
  assert not bits.higher_is_better
  words = rolling.score('word_perplexity')
  assert math.exp(np.mean(words.values)) == pytest.approx(words.value)
  # The kind `choice` of this project on the same file.
  ours = evaluate.run(f'choice:{tmp_path}/choice.jsonl', model)
  for name in ('acc', 'acc_norm', 'acc_bytes'):
    assert ours.score(name).values == choice.score(name).values


def test_a_limit_and_an_unknown_task(tmp_path, offline):
  path = _write_tasks(tmp_path)[0]
  options = options_lib.Options(limit=3)
  result = evaluate.run(
    f'lm_eval:{path}', eval_models.model(max_length=400), options
  )
  assert result.groups[0].num_examples == 3
  with pytest.raises(ValueError, match='expected names of its tasks'):
    evaluate.open_task(f'lm_eval:{tmp_path}/none.yaml')


def test_a_score_of_many_parts_keeps_them_only_if_they_give_it():
  values = lm_eval_tasks._values
  assert values('acc', 0.5, [1, 0]) == [1.0, 0.0]
  assert values('acc', 0.6, [1, 0]) == []
  assert values('f1', 0.5, [(0, 1), (1, 1)]) == []
  assert values('perplexity', math.exp(2.0), [-1.0, -3.0]) == [1.0, 3.0]
