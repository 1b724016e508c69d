"""Tasks that a run is measured by: recorded, repeated, refused."""

import json
import os
import pathlib
import signal
import sys

from absl import flags
import jax
from ml_collections import config_flags as ml_config_flags
import pytest

from evals import evaluate, ports
from evals.tasks import task as task_lib
from frozen import format as frozen_format
from models import transformer
from tests.helpers import tiny_models
from tests.helpers.serving import no_network
from tests.helpers.training import tiny_run
from training import flags as flags_lib, learner as learner_lib
from training.evaluation import (
  evals_config,
  evaluator,
  model_port,
  tasks as tasks_lib,
)
from training.reporting import metrics

ROOT = pathlib.Path(__file__).parents[3]


@pytest.fixture
def tasks(tmp_path):
  """Returns the names of a perplexity and of a choice task."""
  (tmp_path / 'prose.txt').write_text('def self return naïve ' * 400)
  lines = [
    {'context': 'self', 'choices': ['def', 'qq', 'a b'], 'label': i % 3}
    for i in range(6)
  ]
  (tmp_path / 'words.jsonl').write_text(
    ''.join(json.dumps(line | {'id': i}) + '\n' for i, line in enumerate(lines))
  )
  return f'perplexity:{tmp_path}/prose.txt', f'choice:{tmp_path}/words.jsonl'


def _experiment(corpus, tasks, **fields):
  return tiny_run.experiment(
    corpus, evals=evals_config.EvalsConfig(tasks=tasks, **fields)
  )


@pytest.mark.slow
def test_a_run_records_scores_with_their_errors(corpus, tasks, tmp_path):
  workdir = tmp_path / 'run'
  experiment = _experiment(corpus, tasks, every_steps=12, stride=8)
  _, printed = tiny_run.run(experiment, workdir)
  first, last = [r for r in metrics.read(workdir) if r['kind'] == 'eval']
  # With the evaluation of step 12, not with that of step 6.
  assert not [name for name in first if '/' in name]
  names = ('perplexity_prose/bits_per_byte', 'choice_words/acc')
  for name in names:
    assert last[name] > 0
    assert last[f'{name}_stderr'] > 0
    assert f'{name} {last[name]:.4g} +- ' in printed
  # What the frozen weights score, through the plainest port.
  frozen = frozen_format.read(workdir / 'frozen')
  tokenizer = tiny_models.byte_tokenizer()
  net = no_network.Network(
    transformer.Transformer(frozen.config).apply,
    frozen.params,
    tokenizer,
    16,
  )
  model = ports.Model(
    tokenizer=tokenizer, max_length=16, logprob_fn=net.score, adds_bos=True
  )
  result = evaluate.run(tasks[1], model)
  assert result.score('acc').value == last['choice_words/acc']
  # float32, as in tests/training/evaluation/test_model_port.py.
  assert result.score('nll').value == pytest.approx(
    last['choice_words/nll'], rel=1e-4
  )
  described = json.loads((workdir / 'data.json').read_text())['tasks']
  assert sorted(described) == sorted(tasks)


@pytest.mark.slow
def test_an_evaluation_that_was_cut_short_measures_again(
  corpus, tasks, tmp_path, monkeypatch
):
  experiment = _experiment(corpus, tasks[1:])
  whole = tmp_path / 'whole'
  tiny_run.run(experiment, whole)
  # The signal comes while the task of step 6 is measured.
  measure = tasks_lib.measure

  def interrupted(*args, **kwargs):
    os.kill(os.getpid(), signal.SIGTERM)
    return measure(*args, **kwargs)

  monkeypatch.setattr(evaluator.tasks, 'measure', interrupted)
  cut = tmp_path / 'cut'
  result, _ = tiny_run.run(experiment, cut)
  assert result.exit_code == 143
  assert result.step == 6
  assert not [r for r in metrics.read(cut) if r['kind'] == 'eval']
  monkeypatch.undo()
  tiny_run.run(experiment, cut)

  def evals(workdir):
    return [r for r in metrics.read(workdir) if r['kind'] == 'eval']

  assert evals(cut) == evals(whole)
  assert len(evals(cut)) == 2


def test_tasks_that_are_missing_stop_a_run_before_it_starts(corpus, tmp_path):
  experiment = _experiment(corpus, (f'choice:{tmp_path}/none.jsonl',))
  with pytest.raises(FileNotFoundError, match='none.jsonl: got no such file'):
    tiny_run.run(experiment, tmp_path / 'run')
  assert not (tmp_path / 'run').exists()


@pytest.mark.parametrize(
  ('value', 'tasks'),
  [
    (
      "('choice:a.jsonl','perplexity:b.txt')",
      ('choice:a.jsonl', 'perplexity:b.txt'),
    ),
    ("('perplexity:b.txt',)", ('perplexity:b.txt',)),
  ],
)
def test_tasks_can_be_named_by_a_flag(value, tasks, monkeypatch):
  argv = [
    'train.py',
    '--config=experiments/shakespeare_char.py:cpu',
    f'--config.evals.tasks={value}',
    '--config.evals.every_steps=500',
  ]
  monkeypatch.setattr(sys, 'argv', argv)
  monkeypatch.chdir(ROOT)
  values = flags.FlagValues()
  ml_config_flags.DEFINE_config_file('config', flag_values=values)
  flags_lib.parse(argv, values)
  values.config.evals.validate(values.config.eval_every_steps)
  assert values.config.evals.tasks == tasks
  assert values.config.evals.every_steps == 500


@pytest.mark.parametrize(
  ('fields', 'words'),
  [
    ({'tasks': 'perplexity:a.txt'}, 'expected a tuple of tasks'),
    ({'tasks': ('gsm8k:a.jsonl',)}, 'other tasks need generated text'),
    ({'tasks': ('perplexity:',)}, 'expected KIND:FILE'),
    (
      {'tasks': ('perplexity:a/x.txt', 'perplexity:b/x.txt')},
      'got several called perplexity_x',
    ),
    ({'every_steps': 9}, 'expected a multiple of config.eval_every_steps = 6'),
    ({'limit': -1}, 'evals.limit: got -1'),
  ],
)
def test_a_config_that_cannot_be_is_refused(fields, words):
  with pytest.raises(ValueError, match=words):
    evals_config.EvalsConfig(**fields).validate(6)


def test_a_kind_is_offered_to_runs_by_its_own_class(monkeypatch):
  class Scoring(task_lib.Task):
    ONLY_SCORES = True

  monkeypatch.setattr(evaluate, 'KINDS', {**evaluate.KINDS, 'new': Scoring})
  evals_config.EvalsConfig(tasks=('new:a', 'choice:a')).validate(0)
  with pytest.raises(ValueError, match='one of perplexity, choice, new:'):
    evals_config.EvalsConfig(tasks=('generate:a',)).validate(0)


def test_tasks_without_intermediate_evaluations_are_for_the_end():
  evals_config.EvalsConfig(tasks=('perplexity:a',)).validate(0)
  with pytest.raises(ValueError, match='eval_every_steps = 0'):
    evals_config.EvalsConfig(every_steps=2).validate(0)


@pytest.mark.slow
def test_what_is_not_finite_is_not_recorded(corpus, tasks, tmp_path):
  experiment = _experiment(corpus, tasks, limit=1)
  experiment.validate()
  learner = learner_lib.make(experiment)
  state = learner.init(jax.random.key(0))
  values = tasks_lib.measure(
    tasks_lib.open_tasks(experiment.evals),
    model_port.Scorer(learner),
    state.params,
    tiny_models.byte_tokenizer(),
    has_bos=True,
  )
  # One example has no error.
  assert 'choice_words/acc' in values
  assert 'choice_words/acc_stderr' not in values
  assert 'choice_words/acc +- ' not in tasks_lib.report(values)
