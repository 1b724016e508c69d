"""The paired comparison against scipy's own, its table and its curves."""

import numpy as np
import pytest
from scipy import stats

from studies import compare_experiments, load
from training.optimizer import update_rules


def _trained(losses, validation_loss):
  return compare_experiments.Trained(
    losses=losses, validation_loss=validation_loss, bits_per_byte=1.0
  )


def test_the_interval_is_that_of_a_paired_t_test():
  rng = np.random.default_rng(0)
  side, reference = rng.normal(3.0, 0.1, 7), rng.normal(3.1, 0.1, 7)
  found = compare_experiments.difference(side.tolist(), reference.tolist())
  interval = stats.ttest_rel(side, reference).confidence_interval(0.95)
  assert found.mean == pytest.approx(np.mean(side - reference))
  assert found.mean - found.half_width == pytest.approx(interval.low)
  assert found.mean + found.half_width == pytest.approx(interval.high)


def test_what_is_shared_by_a_seed_cancels():
  hard = np.array([0.0, 1.0, 5.0])
  found = compare_experiments.difference(
    (hard - 0.5 + [0.01, -0.01, 0.0]).tolist(), hard.tolist()
  )
  assert found.is_resolved
  assert found.mean == pytest.approx(-0.5)
  unresolved = compare_experiments.difference([1.0, -1.1], [0.0, 0.0])
  assert not unresolved.is_resolved
  assert unresolved.seeds_to_resolve > 100


def test_pairs_that_differ_alike_resolve_nothing():
  found = compare_experiments.difference([1.1, 2.1, 0.4], [1.0, 2.0, 0.3])
  assert not found.is_resolved
  trained = {
    name: [_trained([loss], loss) for loss in losses]
    for name, losses in (('a', [1.0, 2.0]), ('b', [1.1, 2.1]))
  }
  assert '+0.1000 (not resolved; all' in compare_experiments.report(trained)
  same = compare_experiments.difference([1.0, 2.0], [1.0, 2.0])
  assert not same.is_resolved


def test_one_pair_has_no_interval():
  with pytest.raises(
    ValueError, match='pairs of runs: got 1, expected at least 2'
  ):
    compare_experiments.difference([1.0], [2.0])


def test_the_table_says_what_was_resolved():
  runs = {
    'adamw': [_trained([2.0], 2.0), _trained([2.1], 2.1)],
    'muon': [_trained([1.5], 1.5), _trained([1.61], 1.61)],
  }
  table = compare_experiments.report(runs)
  assert '| adamw | 2.0000 2.1000 | 2.0500 | 1.0000 |  |' in table
  assert '| muon | 1.5000 1.6100 | 1.5550 | 1.0000 | -0.4950 +- 0.0635' in table
  assert '(resolved; 1 seeds to resolve)' in table


def test_curves_average_steps_and_leave_out_the_rest():
  losses = [float(step) for step in range(25)]
  shifted = [loss + 2.0 for loss in losses]
  panel = compare_experiments.curves(
    {'one': [_trained(losses, 0.0), _trained(shifted, 0.0)]}
  )
  line = panel.lines['one']
  assert line.x == [5.0, 15.0]
  assert line.y == [5.5, 15.5]
  assert line.low == [4.5, 14.5]
  assert line.high == [6.5, 16.5]


def test_an_unknown_file_is_refused(tmp_path):
  with pytest.raises(
    ValueError, match='--experiments: got .* expected a Python'
  ):
    load.experiment(f'{tmp_path}/absent.py:adamw')


def test_a_page_is_loaded_with_its_variant():
  muon = load.experiment('experiments/muon_against_adamw.py:muon')
  assert isinstance(muon.optimizer.rule, update_rules.Muon)
  cosine, wsd = (
    load.experiment(f'experiments/wsd_against_cosine.py:{variant}')
    for variant in ('cosine', 'wsd')
  )
  assert (cosine.name, wsd.name) == ('equal_steps_adamw', 'equal_steps_wsd')
