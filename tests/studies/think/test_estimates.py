"""Strategies from pools, against enumeration and theory."""

import itertools

import numpy as np
import pytest

from evals.results import voting
from studies.think import estimates, strategies
from tests.helpers import sample_pools


@pytest.mark.parametrize('k', [1, 2, 4, 5])
def test_best_of_and_coverage_are_means_over_all_subsets(k):
  rng = np.random.default_rng(0)
  right_QN = rng.random((6, 5)) < 0.4
  scores_QN = rng.integers(0, 3, (6, 5)) / 2  # with equals
  pool = sample_pools.of(right_QN * 1 - 1, right_QN, scores_QN)
  best = estimates.best_of(pool, scores_QN, [k]).accuracy_KQ[0]
  any_right = estimates.coverage(pool, [k]).accuracy_KQ[0]
  subsets = [list(x) for x in itertools.combinations(range(5), k)]
  for q in range(6):
    chosen = []
    for subset in subsets:
      top = scores_QN[q, subset].max()
      ties = [i for i in subset if scores_QN[q, i] == top]
      chosen.append(right_QN[q, ties].mean())
    assert best[q] == pytest.approx(np.mean(chosen))
    assert any_right[q] == pytest.approx(
      np.mean([right_QN[q, subset].any() for subset in subsets])
    )


@pytest.mark.slow
def test_votes_rise_and_fall_as_theory_says():
  """Chen et al. 2024: .6250, .6456, .6454, .6219 for 1, 3, 5 and 11 votes.

  Within 4 standard errors over questions: 1 in 16,000 is a false alarm.
  """
  rng = np.random.default_rng(0)
  num = 4000
  probs_Q1 = np.where(np.arange(num) % 2, 0.85, 0.4)[:, None]
  right_QN = rng.random((num, 16)) < probs_Q1
  ks = (1, 3, 5, 11)
  curve = estimates.majority(sample_pools.of(~right_QN * 1, right_QN), ks)
  for i, k in enumerate(ks):
    found_Q = curve.accuracy_KQ[i]
    error = found_Q.std() / num**0.5
    expected = voting.mixed_accuracy([0.85, 0.4], [0.5, 0.5], k)
    assert abs(found_Q.mean() - expected) < 4 * error
    np.testing.assert_allclose(curve.flops_KQ[i], 10 + k)


def test_an_early_stop_has_the_same_winners_for_less():
  rng = np.random.default_rng(1)
  codes_QN = rng.integers(-1, 3, (50, 12))
  pool = sample_pools.of(codes_QN, codes_QN == 0, rng.random((50, 12)))
  for weights_QN in (None, pool.scores_CQN[0]):
    whole, early = (
      estimates.majority(
        pool, (3, 8, 12), weights_QN=weights_QN, stops_early=stops
      )
      for stops in (False, True)
    )
    np.testing.assert_array_equal(early.accuracy_KQ, whole.accuracy_KQ)
    assert np.all(early.flops_KQ <= whole.flops_KQ)
    assert np.mean(early.flops_KQ) < np.mean(whole.flops_KQ)
  # Three equal votes of four decide; so do two of three.
  sure = sample_pools.of([[0, 0, 0, 0]], [[True] * 4])
  early = estimates.majority(sure, (3, 4), stops_early=True)
  np.testing.assert_allclose(early.flops_KQ[:, 0], [10 + 2, 10 + 3])


def test_weights_outvote_numbers_and_no_answer_has_no_vote():
  codes_QN, right_QN = [[0, 0, 1, -1]], [[False, False, True, False]]
  pool = sample_pools.of(codes_QN, right_QN)
  assert estimates.majority(pool, [4]).accuracy_KQ[0, 0] == 0
  weights_QN = np.array([[0.2, 0.2, 0.9, 1.0]])
  found = estimates.majority(pool, [4], weights_QN=weights_QN)
  assert found.accuracy_KQ[0, 0] == 1


def test_more_samples_than_a_pool_has_are_refused():
  pool = sample_pools.of([[0, 0]], [[True, True]])
  with pytest.raises(ValueError, match=r'ks: got \[1, 4\] with 2 samples'):
    estimates.majority(pool, [1, 4])


def test_intervals_of_means_cover_as_often_as_they_say():
  """Of 200 intervals of 95 %, 178 to 199 cover: 1 in 10,000 fails."""
  rng = np.random.default_rng(0)
  covered = 0
  for _ in range(200):
    low, high = estimates.interval(rng.random((1, 100)), num_resamples=400)
    covered += low <= 0.5 <= high
  assert 178 <= covered <= 199


def test_the_compute_optimal_choice_differs_by_level_and_is_held_out():
  levels_Q = np.repeat([1, 2], 40)

  def option(strategy, easy, hard, flops):
    return strategies.Option(
      size='small',
      strategy=strategy,
      k=2,
      accuracy_Q=np.where(levels_Q == 1, easy, hard),
      flops_Q=np.full(80, flops),
    )

  among = [
    option('a', 0.9, 0.1, 1.0),
    option('b', 0.8, 0.5, 2.0),
    option('c', 1.0, 1.0, 9.0),
  ]
  found = strategies.compute_optimal(among, levels_Q, budget=2.0)
  assert found is not None
  assert found.accuracy_Q.mean() == pytest.approx(0.7)
  assert found.names == (('small, a, 2', 'small, b, 2'),) * 2
  best = strategies.best_within(among, levels_Q, budget=2.0)
  assert best is not None
  assert best.accuracy_Q.mean() == pytest.approx(0.65)
  assert strategies.compute_optimal(among, levels_Q, budget=0.5) is None
  # A budget of all levels together: what easy questions leave pays hard ones.
  for budget, accuracy, chosen in (
    (1.0, 0.5, 'aa'), (1.5, 0.7, 'ab'), (4.9, 0.7, 'ab'), (5.0, 0.95, 'ac'),
    (9.0, 1.0, 'cc'),
  ):  # fmt: skip
    shared = strategies.allocated(among, levels_Q, budget)
    assert shared is not None
    assert shared.accuracy_Q.mean() == pytest.approx(accuracy)
    assert shared.flops_Q.mean() <= budget
    assert shared.names == (tuple(f'small, {x}, 2' for x in chosen),) * 2
  assert strategies.allocated(among, levels_Q, budget=0.9) is None
  # Chosen by noise: what is good on one half is measured on the other.
  half_Q = strategies.halves(levels_Q)
  lucky = strategies.Option(
    size='small',
    strategy='d',
    k=2,
    accuracy_Q=1.0 * (half_Q == 0),
    flops_Q=np.ones(80),
  )
  found = strategies.compute_optimal([lucky, among[0]], levels_Q, budget=2.0)
  assert found is not None
  assert found.accuracy_Q[half_Q == 1].mean() == 0


def test_a_shared_budget_is_kept_and_nearly_all_of_it_is_worth_is_reached():
  rng, shares = np.random.default_rng(0), []
  for _ in range(50):
    gains_LO, costs_LO = rng.random((2, 3, 5))
    budget = rng.uniform(costs_LO.min(axis=1).sum(), costs_LO.sum() / 5)
    chosen_L = strategies._affordable(gains_LO, costs_LO, budget)
    exact = max(
      sum(gains_LO[range(3), each])
      for each in itertools.product(range(5), repeat=3)
      if sum(costs_LO[range(3), each]) <= budget
    )
    if chosen_L is None:
      continue
    assert costs_LO[range(3), chosen_L].sum() <= budget
    shares.append(gains_LO[range(3), chosen_L].sum() / exact)
  assert len(shares) > 25
  assert np.mean(shares) > 0.97, np.mean(shares)
