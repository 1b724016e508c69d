"""The tests of scipy, and the number of seeds to know a difference."""

import math

import numpy as np
import pytest
from scipy import stats

from studies.comparison import differences


def _values(seed, size=6, mean=3.0, first=0):
  drawn = np.random.default_rng(seed).normal(mean, 0.1, size)
  return {first + i: float(value) for i, value in enumerate(drawn)}


def test_equal_seeds_are_paired():
  first, second = _values(0), _values(1, mean=3.05)
  found = differences.compare(first, second)
  expected = stats.ttest_rel(list(second.values()), list(first.values()))
  interval = expected.confidence_interval(0.95)
  assert found.test == differences.PAIRED
  assert (found.low, found.high) == pytest.approx((interval.low, interval.high))
  assert found.p_value == pytest.approx(expected.pvalue)


def test_other_seeds_are_compared_by_welch():
  first, second = _values(0), _values(1, size=4, mean=3.3, first=10)
  found = differences.compare(first, second)
  expected = stats.ttest_ind(
    list(second.values()), list(first.values()), equal_var=False
  )
  interval = expected.confidence_interval(0.95)
  assert found.test == differences.WELCH
  assert (found.low, found.high) == pytest.approx((interval.low, interval.high))
  assert found.p_value == pytest.approx(expected.pvalue)
  assert found.differs == (expected.pvalue < 0.05)


def test_one_run_against_several_is_a_test_of_equal_spreads():
  """False alarms of 5 % in 1,000 draws: within three standard errors."""
  rng = np.random.default_rng(0)
  alarms = 0
  for values in rng.normal(3.0, 0.1, (1000, 5)):
    one, several = {9: values[0]}, dict(enumerate(values[1:]))
    found = differences.compare(one, several)
    alarms += found.differs
  assert found.test == differences.ONE_SIDED
  assert 0.029 < alarms / 1000 < 0.071
  # Student's test with pooled variances, in which one value has none.
  expected = stats.ttest_ind(list(several.values()), list(one.values()))
  assert found.p_value == pytest.approx(expected.pvalue)


def test_single_runs_have_an_interval_by_the_spread_of_others():
  alone = differences.compare({0: 3.0}, {0: 3.1})
  assert not alone.test
  assert not alone.differs
  assert math.isnan(alone.low)
  assert alone.difference == pytest.approx(0.1)
  like = {0: 1.0, 1: 1.01, 2: 1.02}
  found = differences.compare({0: 3.0}, {0: 3.1}, like)
  assert found.test == differences.BORROWED
  half = stats.t.ppf(0.975, 2) * 0.01 * math.sqrt(2)
  assert found.high - found.low == pytest.approx(2 * half)
  assert found.differs
  # What is borrowed is not used where a spread was measured.
  both = differences.compare(_values(0), _values(1), like)
  assert both == differences.compare(_values(0), _values(1))


def test_so_many_seeds_see_the_difference_four_times_out_of_five():
  first, second = _values(2, size=200), _values(3, size=200, mean=3.05)
  found = differences.compare(first, second)
  spread = math.sqrt(np.var([second[s] - first[s] for s in first], ddof=1))
  num = math.ceil(found.seeds_to_know)
  rng = np.random.default_rng(0)
  gaps = rng.normal(found.difference, spread, (4000, num))
  power = np.mean(stats.ttest_1samp(gaps, 0, axis=1).pvalue < 0.05)
  # The normal approximation: a few points below 80 % with so few seeds.
  assert 0.74 < power < 0.84


def test_the_spread_for_a_number_of_seeds_is_the_inverse():
  like = {0: 1.0, 1: 1.2, 2: 1.1}  # a standard deviation of .1
  found = differences.compare({0: 3.0}, {0: 3.1}, like)
  spread = differences.most_spread(0.1, 1000)
  assert found.seeds_to_know == pytest.approx(1000 * (0.1 / spread) ** 2)


@pytest.mark.parametrize(
  ('first', 'second', 'seeds'),
  [
    ({0: 1.0, 1: 2.0}, {0: 1.0, 1: 2.0}, math.inf),
    # All seeds differ alike, but for rounding.
    ({0: 1.0, 1: 2.0, 2: 0.3}, {0: 1.1, 1: 2.1, 2: 0.4}, math.nan),
  ],
)
def test_some_differences_need_no_number_of_seeds(first, second, seeds):
  found = differences.compare(first, second)
  assert found.seeds_to_know == pytest.approx(seeds, nan_ok=True)
  assert not found.differs
