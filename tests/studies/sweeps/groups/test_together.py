"""Trials in one program: the numbers of single runs, on eight devices."""

import dataclasses
import json
import math
from unittest import mock

import numpy as np
import pytest

from studies.sweeps import single
from studies.sweeps.groups import (
  group as group_lib,
  programs,
  run_states,
  together,
)
from tests.helpers.training import tiny_experiment, tiny_run, tiny_sweep
from training import experiment as experiment_lib, sweep as sweep_lib
from training.evaluation import evals_config
from training.optimizer import chain, update_rules
from training.reporting import metrics

pytest.importorskip('optuna')
SWEEP = sweep_lib.Sweep(
  name='a',
  parameters={
    'optimizer.peak_lr': sweep_lib.Choice((1e-3, 1e-2)),
    'optimizer.weight_decay': sweep_lib.Choice((0.0, 0.1)),
  },
  num_seeds=2,
)
STEPS = {'num_steps': 6, 'eval_every_steps': 3, 'log_every_steps': 2}


def _records(workdir):
  records = metrics.read(workdir)
  return [r for r in records if r['kind'] in ('train', 'eval')]


def _compare(got, expected, tolerance):
  """Compares all records of two sweeps, relative to their values."""
  for place in sorted(expected.glob('trials/*/seed*')):
    ours = _records(got / place.relative_to(expected))
    theirs = _records(place)
    assert [r.keys() for r in ours] == [r.keys() for r in theirs]
    for one, other in zip(ours, theirs, strict=True):
      numbers = [[r[k] for k in r if k != 'kind'] for r in (one, other)]
      np.testing.assert_allclose(*numbers, rtol=tolerance)


@pytest.fixture(scope='module')
def directory(tmp_path_factory):
  return tmp_path_factory.mktemp('together')


@pytest.fixture(scope='module')
def corpus(directory):
  return tiny_run.write_corpus(directory)


@pytest.mark.slow
@pytest.mark.parametrize('rule', ['AdamW', 'Muon'])
def test_trials_have_the_numbers_of_single_runs(directory, corpus, rule):
  """To 1e-6: float32, whose sums XLA adds in another order for many runs."""
  experiment = tiny_run.experiment(
    corpus,
    **STEPS,
    optimizer=chain.OptimizerConfig(
      rule=getattr(update_rules, rule)(), warmup_steps=2
    ),
  )
  sweep = sweep_lib.Sweep(
    name='a',
    parameters={
      'optimizer.peak_lr': sweep_lib.LogUniform(1e-3, 1e-2),
      'optimizer.weight_decay': sweep_lib.Uniform(0.0, 1.0),
      'optimizer.clip_norm': sweep_lib.LogUniform(0.1, 10.0),
      'optimizer.warmup_steps': sweep_lib.Integer(0, 4),
      'optimizer.schedule': sweep_lib.Choice(('cosine', 'linear')),
    },
    strategy='random',
    num_trials=4 if rule == 'AdamW' else 2,
    num_seeds=2,
  )
  places = directory / f'{rule}-together', directory / f'{rule}-apart'
  store, lines = tiny_sweep.run(experiment, sweep, places[0])
  assert lines == [f'{sweep.count()} trials x 2 seeds in one program']
  apart, lines = tiny_sweep.run(experiment, sweep, places[1], together=False)
  assert lines == ['trials one by one: --notogether']
  _compare(*places, 1e-6)
  for ours, theirs in zip(store.rows(), apart.rows(), strict=True):
    assert ours.state == theirs.state == 'complete'
    assert ours.value == pytest.approx(theirs.value, rel=1e-6)
    assert ours.intermediate == pytest.approx(theirs.intermediate, rel=1e-6)


@pytest.mark.slow
def test_a_trial_that_diverges_harms_no_other(directory, corpus):
  experiment = tiny_run.experiment(corpus, **STEPS)
  calm = sweep_lib.Sweep(
    name='a',
    parameters={'optimizer.peak_lr': sweep_lib.Choice((1e-3, 1e-2))},
    num_seeds=2,
  )
  wild = dataclasses.replace(
    calm,
    parameters={'optimizer.peak_lr': sweep_lib.Choice((1e-3, 1e30, 1e-2))},
  )
  tiny_sweep.run(experiment, calm, directory / 'calm')
  store, _ = tiny_sweep.run(experiment, wild, directory / 'wild')
  first, second, third = store.rows()
  assert [first.state, second.state, third.state] == ['complete'] * 3
  assert second.value == math.inf
  assert second.note.startswith('diverged before step 3: seed 0, 1 of 2')
  for point, other in ((0, 0), (2, 1)):
    for seed in (0, 1):
      ours, theirs = (
        _records(directory / name / f'trials/{n:04d}/seed{seed}')
        for name, n in (('wild', point), ('calm', other))
      )
      # Another number of runs on a device: float32 in another order.
      assert [r['loss'] for r in ours] == pytest.approx(
        [r['loss'] for r in theirs], rel=1e-6
      )


@pytest.mark.slow
def test_pruned_trials_leave_and_the_others_go_on(directory, corpus):
  experiment = tiny_run.experiment(
    corpus,
    **STEPS | {'eval_every_steps': 2},
    optimizer=chain.OptimizerConfig(warmup_steps=2, end_lr=0.0),
  )
  sweep = sweep_lib.Sweep(
    name='a',
    parameters={
      'optimizer.peak_lr': sweep_lib.Choice((1e-2, 1e-3, 1e-4, 1e-5))
    },
    num_seeds=2,
    pruner='asha',
    reduction=2,
  )
  store, _ = tiny_sweep.run(experiment, sweep, directory / 'pruned')
  states = [row.state for row in store.rows()]
  # Each is worse than those before it, which are reported first.
  assert states == ['complete', 'pruned', 'pruned', 'pruned']
  worst = _records(directory / 'pruned/trials/0003/seed0')
  assert worst[-1]['step'] == 2
  best = _records(directory / 'pruned/trials/0000/seed0')
  assert best[-1]['step'] == 6
  assert not list((directory / 'pruned').glob('trials/*/seed*/state-*'))


@pytest.mark.slow
def test_a_killed_group_goes_on_where_all_of_its_runs_are(
  directory, corpus, monkeypatch
):
  experiment = tiny_run.experiment(
    corpus, **STEPS, checkpoint=experiment_lib.CheckpointConfig(every_steps=2)
  )
  sweep = dataclasses.replace(
    SWEEP,
    parameters={'optimizer.peak_lr': sweep_lib.Choice((1e-3, 1e-2))},
  )
  tiny_sweep.run(experiment, sweep, directory / 'whole')
  saves, save = [], run_states.save

  def save_and_die(workdir, step, state):
    if len(saves) == 6:  # two of the four runs have step 3
      raise KeyboardInterrupt
    saves.append(step)
    save(workdir, step, state)

  with monkeypatch.context() as patch:
    patch.setattr(run_states, 'save', save_and_die)
    with pytest.raises(KeyboardInterrupt):
      tiny_sweep.run(experiment, sweep, directory / 'killed')
  assert saves == [2, 2, 2, 2, 3, 3]
  taken = []
  take_step = group_lib.Group._take_step

  def count(group, rows):
    taken.append(group._step + 1)
    take_step(group, rows)

  monkeypatch.setattr(group_lib.Group, '_take_step', count)
  tiny_sweep.run(experiment, sweep, directory / 'killed')
  # The first trial has step 3, too, but the second one has step 2 alone.
  assert taken == [3, 4, 5, 6]
  _compare(directory / 'killed', directory / 'whole', 1e-6)


def _experiment(**fields):
  return tiny_experiment.make(**fields)


def test_runs_are_spread_over_eight_devices():
  program = programs.Program(_experiment(), ())
  num_runs = program.padded(12)
  placed = program.placed(np.arange(num_runs))
  runs_of = {s.device.id: s.data.tolist() for s in placed.addressable_shards}
  assert runs_of == {i: [2 * i, 2 * i + 1] for i in range(8)}


def test_what_varies_is_no_structure():
  one = _experiment(seed=3)
  other = _experiment(
    optimizer=chain.OptimizerConfig(
      peak_lr=3e-3, warmup_steps=5, schedule='linear', clip_norm=2.0
    )
  )
  assert together.structure(one) == together.structure(other)
  for changed in (
    _experiment(optimizer=chain.OptimizerConfig(clip_norm=0.0)),
    _experiment(optimizer=chain.OptimizerConfig(rule=update_rules.Lion())),
    _experiment(num_steps=11),
    _experiment(data={'batch_size': 8}),
  ):
    assert together.structure(one) != together.structure(changed)


@pytest.mark.parametrize(
  ('fields', 'words'),
  [
    ({'parallel': {'fsdp': 2}}, 'config.parallel splits the model'),
    ({'parallel': {'kind': 'pmap'}}, 'config.parallel splits the model'),
    ({'init_from': 'some/frozen'}, 'config.init_from'),
    ({'ema_decay': 0.9}, 'keeps an average'),
    (
      {'evals': evals_config.EvalsConfig(tasks=('perplexity:a.txt',))},
      'config.evals.tasks',
    ),
    (
      {'optimizer': chain.OptimizerConfig(rule=update_rules.Ademamix())},
      'ademamix has schedules of its own',
    ),
  ],
)
def test_other_runs_say_why_they_are_alone(fields, words):
  assert words in together.reason_apart(_experiment(**fields))


def test_a_plain_run_may_run_with_others():
  assert not together.reason_apart(_experiment())
  assert together.most_runs(_experiment()) > 100


def test_a_metric_that_no_run_writes_is_one_line(directory, corpus):
  experiment = tiny_run.experiment(corpus, **STEPS)
  sweep = dataclasses.replace(SWEEP, metric='accuracy')
  with pytest.raises(ValueError, match="metric: got 'accuracy', expected one"):
    tiny_sweep.run(experiment, sweep, directory / 'metric')
  assert not (directory / 'metric').exists()
  assert single.one_line(ValueError('a\n b')) == 'a b'


def test_a_speed_is_measured_run_by_run(directory, corpus, monkeypatch):
  def fake_run(experiment, workdir, *, stop_after):
    del experiment
    workdir.mkdir(parents=True)
    records = [
      {'kind': 'speed', 'step': step, 'tokens_per_s': speed}
      for step, speed in ((2, 1.0), (4, 30.0), (stop_after, 20.0))
    ]
    records.append({'kind': 'eval', 'step': stop_after, 'loss': 1.0})
    lines = [json.dumps(record) + '\n' for record in records]
    (workdir / 'metrics.jsonl').write_text(''.join(lines))
    return mock.Mock(exit_code=0)

  monkeypatch.setattr(single.quiet_run, 'run', fake_run)
  sweep = dataclasses.replace(
    SWEEP, metric='tokens_per_s', direction='maximize'
  )
  experiment = tiny_run.experiment(corpus, **STEPS)
  store, lines = tiny_sweep.run(experiment, sweep, directory / 'speed')
  assert {(r.state, r.value) for r in store.rows()} == {('complete', 20.0)}
  assert lines == [
    'trials one by one: metric tokens_per_s is measured on a run by itself'
  ]
