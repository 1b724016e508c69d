"""Two sets of runs: the tests of scipy, seeds to know, and one-line errors."""

import json
import math

import numpy as np
import pytest
from scipy import stats

from studies import compare


def _values(seed, size=6, mean=3.0, first=0):
  drawn = np.random.default_rng(seed).normal(mean, 0.1, size)
  return {first + i: float(value) for i, value in enumerate(drawn)}


def test_equal_seeds_are_paired():
  first, second = _values(0), _values(1, mean=3.05)
  found = compare.compare(first, second)
  expected = stats.ttest_rel(list(second.values()), list(first.values()))
  interval = expected.confidence_interval(0.95)
  assert found.is_paired
  assert (found.low, found.high) == pytest.approx((interval.low, interval.high))
  assert found.p_value == pytest.approx(expected.pvalue)


def test_other_seeds_are_compared_by_welch():
  first, second = _values(0), _values(1, size=4, mean=3.3, first=10)
  found = compare.compare(first, second)
  expected = stats.ttest_ind(
    list(second.values()), list(first.values()), equal_var=False
  )
  interval = expected.confidence_interval(0.95)
  assert not found.is_paired
  assert (found.low, found.high) == pytest.approx((interval.low, interval.high))
  assert found.p_value == pytest.approx(expected.pvalue)
  assert found.differs == (expected.pvalue < 0.05)


def test_so_many_seeds_see_the_difference_four_times_out_of_five():
  first, second = _values(2, size=200), _values(3, size=200, mean=3.05)
  found = compare.compare(first, second)
  spread = math.sqrt(np.var([second[s] - first[s] for s in first], ddof=1))
  num = math.ceil(found.seeds_to_know)
  rng = np.random.default_rng(0)
  gaps = rng.normal(found.difference, spread, (4000, num))
  power = np.mean(stats.ttest_1samp(gaps, 0, axis=1).pvalue < 0.05)
  # The normal approximation: a few points below 80 % with so few seeds.
  assert 0.74 < power < 0.84


def test_sides_that_are_equal_need_endless_seeds():
  found = compare.compare({0: 1.0, 1: 2.0}, {0: 1.0, 1: 2.0})
  assert not found.differs
  assert found.seeds_to_know == math.inf
  text = compare.report({0: 1.0, 1: 2.0}, {0: 1.5, 1: 2.5}, 'loss')
  assert 'cannot be told: all seeds differ alike' in text


def _write(workdir, seed, loss):
  workdir.mkdir(parents=True)
  (workdir / 'run.json').write_text(json.dumps({'config': {'seed': seed}}))
  record = {'kind': 'eval', 'step': 3, 'loss': loss}
  (workdir / 'metrics.jsonl').write_text(json.dumps(record) + '\n')


def test_sets_are_lists_or_directories(tmp_path):
  for seed in (0, 1):
    _write(tmp_path / f'a/seed{seed}', seed, 1.0 + seed)
  expected = {0: 1.0, 1: 2.0}
  assert compare.read(f'{tmp_path}/a', 'loss') == expected
  listed = f'{tmp_path}/a/seed0,{tmp_path}/a/seed1'
  assert compare.read(listed, 'loss') == expected


@pytest.mark.parametrize(
  ('place', 'metric', 'words'),
  [
    ('{0}/none', 'loss', 'got a directory without runs, expected a workdir'),
    ('{0}/a', 'acc', "--metric: got 'acc', expected one of loss"),
    ('{0}/a/x,{0}/a/x', 'loss', 'got a second run of seed 0, expected each'),
  ],
)
def test_a_wrong_set_is_one_line(tmp_path, place, metric, words):
  _write(tmp_path / 'a/x', 0, 1.0)
  with pytest.raises(ValueError, match=words):
    compare.read(place.format(tmp_path), metric)


def test_one_run_has_no_spread():
  with pytest.raises(ValueError, match='runs of the second set: got 1, expect'):
    compare.compare({0: 1.0, 1: 2.0}, {0: 1.0})
