"""Routing on populations whose P(correct) is known: exact optima."""

import itertools

import numpy as np
import pytest

from inference.search.routing import policy as policy_lib

COSTS_E = np.array([1.0, 4.0, 16.0])


def _population(num: int, seed: int = 0) -> tuple[np.ndarray, np.ndarray]:
  """Returns P(correct) [B, E], which may fall with effort, and costs."""
  rng = np.random.default_rng(seed)
  first_B = rng.uniform(0.05, 0.95, num)
  # Votes help above one half, and harm below it (Chen et al. 2024).
  gains_BE = (first_B - 0.4)[:, None] * np.array([0.0, 0.3, 0.5])
  probs_BE = np.clip(first_B[:, None] + gains_BE, 0, 1)
  return probs_BE, COSTS_E * rng.uniform(0.8, 1.2, (num, 1))


def _value(weights_BE, probs_BE, costs_BE) -> tuple[float, float]:
  return (
    float(np.mean(np.sum(weights_BE * probs_BE, axis=1))),
    float(np.mean(np.sum(weights_BE * costs_BE, axis=1))),
  )


def _knapsack(probs_BE, costs_BE, budget: float) -> float:
  """Returns the accuracy of the best assignment, of all of them."""
  num, num_efforts = probs_BE.shape
  rows = np.arange(num)
  return max(
    probs_BE[rows, choice].mean()
    for choice in map(list, itertools.product(range(num_efforts), repeat=num))
    if costs_BE[rows, choice].mean() <= budget + 1e-12
  )


@pytest.mark.parametrize('seed', range(5))
def test_a_pure_policy_is_the_best_of_all_assignments(seed):
  """Everett's theorem: a price's choice is optimal for the cost it has."""
  probs_BE, costs_BE = _population(7, seed)
  policy = policy_lib.for_mean_budget(probs_BE, costs_BE, 4.0)
  for share in (0.0, 1.0):
    one = policy_lib.Policy(low=policy.low, high=policy.high, share=share)
    chosen_B = one.choose(probs_BE, costs_BE, np.full(7, 0.5))
    rows = np.arange(7)
    assert probs_BE[rows, chosen_B].mean() == pytest.approx(
      _knapsack(probs_BE, costs_BE, costs_BE[rows, chosen_B].mean()), abs=1e-12
    )


@pytest.mark.parametrize('budget', [1.5, 4.0, 9.0])
def test_the_mixed_policy_is_the_optimum_of_the_linear_program(budget):
  """An independent solver: scipy's HiGHS."""
  from scipy import optimize

  probs_BE, costs_BE = _population(60)
  policy = policy_lib.for_mean_budget(probs_BE, costs_BE, budget)
  accuracy, cost = _value(
    policy_lib.weights(policy, probs_BE, costs_BE), probs_BE, costs_BE
  )
  num, num_efforts = probs_BE.shape
  found = optimize.linprog(
    -probs_BE.ravel() / num,
    A_ub=costs_BE.ravel()[None] / num,
    b_ub=[budget],
    A_eq=np.kron(np.eye(num), np.ones(num_efforts)),
    b_eq=np.ones(num),
    bounds=(0, 1),
  )
  assert cost <= budget * (1 + 1e-9)
  assert accuracy == pytest.approx(-found.fun, abs=1e-9)


def test_oracle_is_above_a_noisy_policy_above_a_random_mix():
  probs_BE, costs_BE = _population(4000)
  noise_BE = np.random.default_rng(1).normal(0, 0.1, (4000, 1))
  guessed_BE = np.clip(probs_BE + noise_BE, 0, 1)
  for budget in (2.0, 4.0, 8.0):
    found = []
    for seen_BE in (probs_BE, guessed_BE):
      policy = policy_lib.for_mean_budget(seen_BE, costs_BE, budget)
      weights_BE = policy_lib.weights(policy, seen_BE, costs_BE)
      found.append(_value(weights_BE, probs_BE, costs_BE))
    # The same efforts in the same shares, given to questions at random.
    mix_E = weights_BE.mean(axis=0)
    mixed = float(probs_BE.mean(axis=0) @ mix_E)
    (best, spent), (routed, _) = found
    assert best > routed > mixed
    assert spent == pytest.approx(budget, rel=1e-9)


def test_the_budget_holds_on_other_questions_of_the_population():
  """Within 3 standard errors: 1 seed in 370 is a false alarm."""
  policy = policy_lib.for_mean_budget(*_population(20_000, 0), 4.0)
  probs_BE, costs_BE = _population(20_000, 1)
  draws_B = np.random.default_rng(2).random(20_000)
  chosen_B = policy.choose(probs_BE, costs_BE, draws_B)
  paid_B = costs_BE[np.arange(20_000), chosen_B]
  error = paid_B.std() * (2 / 20_000) ** 0.5
  assert error < 0.02 * 4.0
  assert abs(paid_B.mean() - 4.0) < 3 * error


@pytest.mark.parametrize('shift', [-0.3, 0.0, 0.3])
def test_pace_holds_the_budget_to_one_percent_under_shift(shift):
  policy = policy_lib.for_mean_budget(*_population(2000, 0), 4.0)
  probs_BE, costs_BE = _population(2000, 1)
  # Gains of effort that calibration has not seen.
  probs_BE = np.clip(
    probs_BE + shift * np.array([0, 0.3, 1.0]) * probs_BE, 0, 1
  )
  costs_BE = costs_BE * 1.3
  draws_B = np.random.default_rng(2).random(2000)
  pace = policy_lib.Pace(policy=policy, budget=4.0)
  for probs_E, costs_E, draw in zip(probs_BE, costs_BE, draws_B, strict=True):
    pace = pace.paid(costs_E[pace.choose(probs_E, costs_E, draw)])
  spent = pace.spent / pace.num_requests
  assert spent <= 4.0 * 1.01
  if shift >= 0:  # where effort harms, the budget is not used up
    assert spent == pytest.approx(4.0, rel=0.01)


def test_pace_finds_a_price_where_calibration_needed_none():
  probs_BE, costs_BE = _population(2000)
  policy = policy_lib.for_mean_budget(probs_BE, costs_BE, 100.0)
  assert policy.high == 0
  pace = policy_lib.Pace(policy=policy, budget=2.0)
  for probs_E, costs_E in zip(probs_BE, costs_BE, strict=True):
    pace = pace.paid(costs_E[pace.choose(probs_E, costs_E, 0.5)])
  assert pace.spent / 2000 == pytest.approx(2.0, rel=0.01)


def test_a_request_of_its_own_budget_never_costs_more():
  probs_BE, costs_BE = _population(200)
  for most in (1.3, 5.0, 30.0):
    chosen_B = policy_lib.within(probs_BE, costs_BE, most)
    rows = np.arange(200)
    assert np.all(costs_BE[rows, chosen_B] <= most)
    allowed_BE = np.where(costs_BE <= most, probs_BE, -1)
    np.testing.assert_array_equal(
      probs_BE[rows, chosen_B], allowed_BE.max(axis=1)
    )


def test_of_equal_values_the_cheapest_effort_is_taken():
  probs_BE = np.full((1, 3), 0.5)
  costs_BE = np.array([[3.0, 1.0, 2.0]])
  assert policy_lib.within(probs_BE, costs_BE, 10.0) == [1]


@pytest.mark.parametrize(
  ('call', 'error'),
  [
    (
      lambda p, c: policy_lib.for_mean_budget(p, c, 0.5),
      'budget: got 0.5 per question, expected at least',
    ),
    (
      lambda p, c: policy_lib.within(p, c, 0.1),
      'budget: got 0.1 for a request',
    ),
    (
      lambda p, c: policy_lib.for_mean_budget(p + 1, c, 4.0),
      'probabilities outside of 0 to 1',
    ),
    (
      lambda p, c: policy_lib.for_mean_budget(p, c[:, :2], 4.0),
      r'got probabilities \(9, 3\) and costs \(9, 2\)',
    ),
    (
      lambda p, c: policy_lib.for_mean_budget(p, c - 1, 4.0),
      'costs that are not positive',
    ),
    (
      lambda p, c: policy_lib.Pace(
        policy=policy_lib.for_mean_budget(p, c, 4.0), budget=-1.0
      ),
      'budget: got -1.0, expected a positive number',
    ),
  ],
)
def test_wrong_budgets_and_tables_are_refused(call, error):
  with pytest.raises(ValueError, match=error):
    call(*_population(9))
