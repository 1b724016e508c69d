"""The storage: the same points whatever happens, and no other sweep's."""

import sys

import numpy as np
import pytest

from studies.sweeps import claims as claims_lib, store as store_lib
from tests.helpers.training import untrained_sweeps

pytest.importorskip('optuna')


def _claims(directory, sweep):
  store = untrained_sweeps.store(directory, sweep)
  return claims_lib.Claims(store, directory), store


def _take(directory, sweep, most=100):
  claims, store = _claims(directory, sweep)
  claims.begin('unfinished')
  return claims.take(most), store


@pytest.mark.parametrize('strategy', ['random', 'qmc', 'tpe'])
def test_points_do_not_depend_on_starts(tmp_path, strategy):
  sweep = untrained_sweeps.sweep(strategy=strategy)
  (tmp_path / 'a').mkdir()
  (tmp_path / 'b').mkdir()
  whole, _ = _take(tmp_path / 'a', sweep)
  parts = []
  for _ in range(4):  # four processes, each of which takes two trials
    parts += _take(tmp_path / 'b', sweep, most=2)[0]
  assert [c.params for c in parts] == [c.params for c in whole]
  assert [c.point for c in parts] == list(range(8))
  assert len({c.params['optimizer.peak_lr'] for c in whole}) == 8
  for claim in (*whole, *parts):
    claim.release()


def test_qmc_leaves_smaller_gaps_than_chance(tmp_path):
  claims, _ = _take(tmp_path, untrained_sweeps.sweep(strategy='qmc'))
  logs = np.log([claim.params['optimizer.peak_lr'] for claim in claims])
  share = (logs - np.log(1e-4)) / np.log(100)
  # A Sobol sequence of 8 points has one in each eighth.
  assert sorted((share * 8).astype(int)) == list(range(8))


def test_a_longer_sweep_begins_with_the_same_points(tmp_path):
  first, _ = _take(tmp_path, untrained_sweeps.sweep(num_trials=3))
  more, store = _take(tmp_path, untrained_sweeps.sweep(num_trials=5))
  assert [c.point for c in first] == [0, 1, 2]
  assert [c.point for c in more] == [3, 4]
  assert len(store.rows()) == 5


def test_a_trial_is_claimed_once_until_its_process_ends(tmp_path):
  sweep = untrained_sweeps.sweep(num_trials=1)
  (held,), store = _take(tmp_path, sweep)
  again = claims_lib.Claims(store, tmp_path)
  assert not again.take(1)
  held.release()  # as the kernel does when the process dies
  (taken,) = again.take(1)
  assert (taken.point, taken.params) == (held.point, held.params)
  store.finish(taken.trial, state='complete', value=1.0, seeds={0: 1.0})
  taken.release()
  assert not again.take(1)


def test_errored_trials_run_again_when_asked(tmp_path):
  sweep = untrained_sweeps.sweep(num_trials=2)
  (first, second), store = _take(tmp_path, sweep)
  (first.directory / 'seed0').mkdir()
  store.finish(first.trial, state='errored', note='no disk')
  store.finish(second.trial, state='complete', value=1.0)
  first.release()
  second.release()
  claims = claims_lib.Claims(store, tmp_path)
  claims.begin('unfinished')
  assert not claims.take(2)
  claims.begin('errored')
  (again,) = claims.take(2)
  assert (again.point, again.params) == (first.point, first.params)
  assert (again.directory / 'seed0').exists()
  store.finish(again.trial, state='errored', note='no disk')
  again.release()
  claims.begin('restart_errored')
  (anew,) = claims.take(2)
  assert anew.point == first.point
  assert not (anew.directory / 'seed0').exists()
  # Killed and taken again, it keeps what it has since then.
  (anew.directory / 'seed0').mkdir()
  anew.release()
  (taken,) = claims.take(2)
  assert (taken.directory / 'seed0').exists()
  store.finish(taken.trial, state='complete', value=2.0)
  assert [(r.point, r.state) for r in store.rows()] == [
    (0, 'complete'),
    (1, 'complete'),
  ]


def test_a_trial_killed_while_it_is_proposed_keeps_its_place(tmp_path):
  sweep = untrained_sweeps.sweep(strategy='tpe', num_trials=2)
  store = untrained_sweeps.store(tmp_path, sweep)
  killed = store.study.ask()  # without any value yet
  claims = claims_lib.Claims(store, tmp_path)
  taken = claims.take(5)
  assert [claim.point for claim in taken] == [killed.number, 1]
  assert all(c.params.keys() == sweep.parameters.keys() for c in taken)


@pytest.mark.parametrize(
  ('fields', 'words'),
  [
    (
      {'num_seeds': 3},
      'sweep.num_seeds = 2, not 3; expected the same sweep and config',
    ),
    ({'strategy': 'qmc'}, "sweep.strategy = 'random', not 'qmc'"),
  ],
)
def test_another_sweep_is_refused(tmp_path, fields, words):
  untrained_sweeps.store(tmp_path, untrained_sweeps.sweep())
  with pytest.raises(ValueError, match=words):
    untrained_sweeps.store(tmp_path, untrained_sweeps.sweep(**fields))


def test_another_experiment_or_workdir_is_refused(tmp_path):
  sweep = untrained_sweeps.sweep()
  untrained_sweeps.store(tmp_path, sweep)
  with pytest.raises(ValueError, match='config.num_steps = 10, not 12; expe'):
    untrained_sweeps.store(tmp_path, sweep, num_steps=12)
  with pytest.raises(ValueError, match='of another --workdir, expected that'):
    untrained_sweeps.store(tmp_path, sweep, token='u')


def test_a_missing_driver_is_one_line_without_the_password(monkeypatch):
  url = 'postgresql://me:secret@nowhere.invalid/sweeps'
  assert 'secret' not in store_lib.redacted(url)
  for name in ('psycopg', 'psycopg2'):  # the default depends on SQLAlchemy
    monkeypatch.setitem(sys.modules, name, None)  # not installed
  words = (
    r'driver psycopg2? is missing, expected.*pip install \S*psycopg.*binary'
  )
  with pytest.raises(ValueError, match=words) as e:
    store_lib.Store(
      untrained_sweeps.sweep(),
      untrained_sweeps.tiny_experiment.make(),
      url=url,
      workdir_token='t',
      num_evaluations=1,
    )
  assert 'secret' not in str(e.value)
  assert '\n' not in str(e.value)


@pytest.mark.parametrize(
  ('pruner', 'ended'), [('median', [4]), ('asha', [1, 2, 3, 4])]
)
def test_pruners_see_the_means_and_end_the_poor(tmp_path, pruner, ended):
  sweep = untrained_sweeps.sweep(num_trials=6, pruner=pruner)
  claims, store = _take(tmp_path, sweep)
  pruned = []
  for i, claim in enumerate(claims[:5]):
    # Each is worse than the one before.
    if store.report(claim.trial, 1, float(i)):
      pruned.append(i)
      store.finish(claim.trial, state='pruned')
    else:
      store.finish(claim.trial, state='complete', value=float(i))
  assert pruned == ended


def test_a_diverged_trial_is_the_worst(tmp_path):
  sweep = untrained_sweeps.sweep(num_trials=1, direction='maximize')
  (claim,), store = _take(tmp_path, sweep)
  worst = store_lib.worst('maximize')
  store.finish(claim.trial, state='complete', value=worst, note='diverged')
  (row,) = store.rows()
  assert row.value == -np.inf
