"""Standard errors, tests and sample sizes, against closed forms and counts."""

import math

import numpy as np
import pytest
from scipy import stats

from evals.results import statistics


def test_a_standard_error_is_the_usual_one():
  values = [0.0, 1.0, 1.0, 0.5, 0.25]
  expected = np.std(values, ddof=1) / math.sqrt(5)
  assert statistics.standard_error(values) == pytest.approx(expected)


def test_one_example_has_no_standard_error():
  assert math.isnan(statistics.standard_error([1.0]))
  assert math.isnan(statistics.standard_error([1.0, 0.0], ['a', 'a']))


def test_clusters_of_one_change_nothing():
  values = np.random.default_rng(0).normal(size=20)
  assert statistics.standard_error(values, range(20)) == pytest.approx(
    statistics.standard_error(values)
  )


def test_a_cluster_of_copies_counts_once():
  values = np.random.default_rng(0).normal(size=20)
  copies = np.repeat(values, 7)
  clusters = np.repeat(np.arange(20), 7).tolist()
  assert statistics.standard_error(copies, clusters) == pytest.approx(
    statistics.standard_error(values)
  )


def test_clusters_of_unequal_size_are_as_variable_as_they_are():
  # The spread of the mean over 2000 fresh samples is the standard error. Its
  # own relative error is 1/sqrt(2 * 2000) = 1.6 %, that of the mean estimate
  # less; the estimate is low by about 1/(2 * 30) = 1.7 % with 30 clusters of
  # unequal size. Seeds are fixed; 8 % is three times their sum.
  rng = np.random.default_rng(0)
  sizes = rng.integers(1, 9, 30)
  clusters = np.repeat(np.arange(30), sizes).tolist()
  means, errors = [], []
  for _ in range(2000):
    values = np.repeat(rng.normal(size=30), sizes)
    values = values + 0.5 * rng.normal(size=len(values))
    means.append(np.mean(values))
    errors.append(statistics.standard_error(values, clusters))
  assert np.mean(errors) == pytest.approx(np.std(means), rel=0.08)


def test_values_of_a_ratio_have_its_mean_and_its_spread():
  rng = np.random.default_rng(0)
  x, w = rng.gamma(3, size=50), rng.integers(1, 9, 50)
  values = statistics.ratio_values(x, w)
  assert np.mean(values) == pytest.approx(np.sum(x) / np.sum(w))
  # The jackknife estimates the same error to first order.
  left_out = [(np.sum(x) - x[i]) / (np.sum(w) - w[i]) for i in range(len(x))]
  jackknife = math.sqrt(49 / 50 * np.sum((left_out - np.mean(left_out)) ** 2))
  assert statistics.standard_error(values) == pytest.approx(jackknife, rel=0.05)


def test_the_paired_t_test_is_that_of_scipy():
  rng = np.random.default_rng(0)
  a, b = rng.normal(size=30), rng.normal(0.3, 1, size=30)
  found = statistics.paired_t(a, b)
  expected = stats.ttest_rel(b, a)
  assert found.p_value == pytest.approx(expected.pvalue)
  interval = expected.confidence_interval()
  assert (found.low, found.high) == pytest.approx((interval.low, interval.high))


def test_a_paired_t_test_over_clusters_counts_clusters():
  rng = np.random.default_rng(0)
  a, b = rng.normal(size=12), rng.normal(0.5, 1, size=12)
  clusters = np.repeat(np.arange(12), 5).tolist()
  found = statistics.paired_t(np.repeat(a, 5), np.repeat(b, 5), clusters)
  assert found.p_value == pytest.approx(stats.ttest_rel(b, a).pvalue)


@pytest.mark.parametrize(
  ('gained', 'lost', 'p_value'),
  [
    # 2 * P(at most 1 of 8), of a fair coin: 2 * 9 / 256.
    (7, 1, 18 / 256),
    (3, 3, 1.0),
    (0, 0, 1.0),
    (6, 0, 2 / 64),
  ],
)
def test_mcnemar_is_exact(gained, lost, p_value):
  a = [0.0] * gained + [1.0] * lost + [1.0] * 10 + [0.0] * 4
  b = [1.0] * gained + [0.0] * lost + [1.0] * 10 + [0.0] * 4
  found = statistics.compare(a, b)
  assert found.p_value == pytest.approx(p_value)
  assert f'{gained} gained and {lost} lost' in found.test
  assert found.value == pytest.approx((gained - lost) / len(a))


def test_mcnemar_refuses_what_is_neither_right_nor_wrong():
  with pytest.raises(ValueError, match='expected right or wrong'):
    statistics.mcnemar([0.5, 1.0], [0.0, 1.0])


def test_values_that_are_no_answers_are_compared_by_t():
  found = statistics.compare([0.1, 0.5, 0.2], [0.2, 0.4, 0.9])
  assert found.test.startswith('paired t, 2 degrees')


def test_the_bootstrap_agrees_with_t_where_both_hold():
  rng = np.random.default_rng(1)
  a = rng.normal(size=200)
  b = a + rng.normal(0.12, 1, size=200)
  by_t = statistics.paired_t(a, b)
  found = statistics.paired_bootstrap(a, b, num_resamples=4000)
  assert found.value == pytest.approx(by_t.value)
  # 4000 resamples know a p-value of 0.1 to 0.005; three times that, and the
  # normal law holds to about as much with 200 pairs.
  assert found.p_value == pytest.approx(by_t.p_value, abs=0.02)
  assert found.standard_error == pytest.approx(by_t.standard_error, rel=0.05)
  assert found == statistics.paired_bootstrap(a, b, num_resamples=4000)


def test_the_bootstrap_draws_whole_clusters():
  rng = np.random.default_rng(1)
  gaps = rng.normal(size=40)
  clusters = np.repeat(np.arange(40), 3).tolist()
  zeros = np.zeros(120)
  found = statistics.paired_bootstrap(
    zeros, np.repeat(gaps, 3), clusters, num_resamples=2000
  )
  alone = statistics.paired_bootstrap(np.zeros(40), gaps, num_resamples=2000)
  assert found.standard_error == pytest.approx(alone.standard_error)


def test_equal_results_do_not_differ():
  for found in (
    statistics.paired_t([0.5, 0.25], [0.5, 0.25]),
    statistics.paired_bootstrap([0.5, 0.25], [0.5, 0.25], num_resamples=100),
  ):
    assert found.p_value == 1.0
    assert found.value == 0.0


@pytest.mark.parametrize('scale', [1.0, 1e6])
@pytest.mark.parametrize('num', [2, 3, 5, 6, 20])
def test_examples_that_all_differ_alike_are_tested_by_their_signs(num, scale):
  """2^(1 - n), as n tosses of a fair coin that all fall alike."""
  a = (np.random.default_rng(0).uniform(size=num) * scale).tolist()
  b = [value + 0.1 for value in a]
  for found in (
    statistics.compare(a, b),
    statistics.paired_t(a, b),
    statistics.compare(np.repeat(a, 3), np.repeat(b, 3), np.repeat(a, 3)),
    statistics.paired_bootstrap(a, b, num_resamples=100),
  ):
    assert found.value == pytest.approx(0.1)
    assert found.p_value == pytest.approx(2.0 ** (1 - num))
    assert math.isnan(found.low)
    assert math.isnan(found.high)
    needed = statistics.num_to_resolve(0.1, found.standard_error, num)
    assert math.isnan(needed)


@pytest.mark.parametrize('num', [2, 3, 4, 5])
def test_few_examples_cannot_be_resolved_by_a_bootstrap(num):
  b = np.linspace(0.1, 0.2, num)
  found = statistics.paired_bootstrap(np.zeros(num), b, num_resamples=100)
  assert found.p_value >= 2.0 ** (1 - num) > statistics.LEVEL


def test_two_examples_resolve_nothing():
  for gaps in ([0.1, 0.1000001], [1.0, 1.0], [0.1, 0.2]):
    for compare in (statistics.compare, statistics.paired_bootstrap):
      found = compare([0.0, 0.0], gaps)
      assert found.p_value == pytest.approx(0.5)


def test_one_example_or_cluster_tests_nothing():
  for test in (statistics.paired_t, statistics.paired_bootstrap):
    assert math.isnan(test([0.0], [0.7]).p_value)
    assert math.isnan(test([0.0, 0.0], [0.7, 0.6], ['a', 'a']).p_value)


def test_scores_without_spread_are_not_compared():
  """All right against all wrong, each with its own two examples."""
  for errors in ((0.0, 0.0), (0.01, 0.0), (0.0, 0.01), (math.nan, 0.01)):
    found = statistics.unpaired(0.0, errors[0], 1.0, errors[1])
    assert math.isnan(found.p_value)
    assert math.isnan(found.low)
  assert math.isnan(statistics.smallest_seen(0.0))


def test_few_examples_of_each_resolve_nothing():
  """Two and two can be divided in 6 ways, a thousand in all ways."""
  found = statistics.unpaired(0.1, 0.01, 0.9, 0.01, (2, 2))
  assert found.p_value == pytest.approx(2 / 6)
  many = statistics.unpaired(0.1, 0.01, 0.9, 0.01, (9000, 9000))
  assert many.p_value < 1e-9


def test_an_unpaired_difference_adds_errors_in_squares():
  found = statistics.unpaired(0.5, 0.03, 0.6, 0.04)
  assert found.standard_error == pytest.approx(0.05)
  assert found.p_value == pytest.approx(2 * stats.norm.sf(2.0))


def test_the_number_needed_is_the_textbook_s():
  # Two shares of one half, five points apart: n = 2 * (1.96 + 0.8416)^2 *
  # 0.25 / 0.05^2 = 1570 in each.
  error = math.sqrt(2) * 0.5 / math.sqrt(100)
  assert statistics.num_to_resolve(0.05, error, 100) == 1570
  assert statistics.num_to_resolve(0.0, error, 100) == math.inf
  assert math.isnan(statistics.num_to_resolve(0.1, math.nan, 1))
  # If all examples are alike, they do not show how much examples vary.
  assert math.isnan(statistics.num_to_resolve(0.1, 0.0, 50))
  assert statistics.num_to_resolve(9.0, error, 100) == 1


def test_the_number_needed_gives_the_power_it_promises():
  # Of 4000 repetitions the share that is resolved is known to 0.6 %; three of
  # these, and the normal approximation of t is off by less with 100 pairs.
  rng = np.random.default_rng(0)
  difference, deviation = 0.28, 1.0
  needed = statistics.num_to_resolve(difference, deviation / 10, 100)
  assert 95 <= needed <= 105
  gaps = rng.normal(difference, deviation, (4000, int(needed)))
  t = np.mean(gaps, 1) / (np.std(gaps, 1, ddof=1) / math.sqrt(needed))
  resolved = np.mean(2 * stats.t.sf(np.abs(t), needed - 1) < statistics.LEVEL)
  assert resolved == pytest.approx(statistics.POWER, abs=0.02)


def test_what_is_seen_at_a_size_needs_that_size():
  seen = statistics.smallest_seen(0.02)
  assert statistics.num_to_resolve(seen, 0.02, 500) == 500


def test_pairs_must_be_pairs():
  with pytest.raises(ValueError, match='got 2 and 3 values'):
    statistics.paired_t([1.0, 2.0], [1.0, 2.0, 3.0])
  with pytest.raises(ValueError, match='clusters: got 1 for 2'):
    statistics.standard_error([1.0, 2.0], ['a'])
