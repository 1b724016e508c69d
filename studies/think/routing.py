"""Routers measured from a pool: accuracy against FLOPs, and what is in reach.

An effort is a number of samples, of which one answer is chosen (`EFFORTS`): the
majority's, or the one with the largest share of right steps. What it
makes of a question, the expected share of right answers and the expected FLOPs,
comes from the pool (`studies/think/estimates.py`). The predictor is cross-
fitted over five folds of questions: three train it, one calibrates it and the
price, and one is measured, in turn, so that every question is held out once.

    always       one effort for all questions
    mix          two neighbouring efforts at random, at the same cost
    vote stop    a majority that stops when its leader cannot be overtaken
    router       the policy of inference/search/routing/policy.py
    oracle       that policy with the pool's own shares in place of predictions:
                 it knows each question, and is too good by the pool's noise
"""

from collections.abc import Sequence
import dataclasses

import numpy as np

from evals.results import calibration
from frozen import effort_predictor
from inference.search.routing import policy as policy_lib
from studies.think import estimates, pool as pool_lib
from training.effort import fit as fit_lib, outcomes

# Samples by name of the effort, for each choice. A server does what the name
# says; for the second choice it needs --server.verifiers=column_sum.
MAJORITY, STEPS = 'majority', 'steps'
EFFORTS = {
  MAJORITY: {'once': 1, 'self_consistency:4': 4, 'self_consistency:16': 16},
  STEPS: {
    'once': 1,
    'best_of_n:4:column_sum': 4,
    'best_of_n:16:column_sum': 16,
  },
}
NUM_FOLDS = 5


def outcomes_of(
  pool: pool_lib.Pool, pooling: str = 'last', chosen_by: str = MAJORITY
) -> outcomes.Outcomes:
  """Returns the table of outcomes of a pool.

  Args:
    pool: samples.
    pooling: hidden states of the prompt that are the features.
    chosen_by: how an effort chooses among its samples, a key of `EFFORTS`.

  Raises:
    ValueError: the pool has fewer samples than the highest effort.
  """
  efforts = EFFORTS[chosen_by]
  ks = list(efforts.values())
  if chosen_by == MAJORITY:
    curve = estimates.majority(pool, ks)
  else:
    scores_QN = pool.scores_CQN[pool_lib.SCORES.index(chosen_by)]
    curve = estimates.best_of(pool, scores_QN, ks)
  tokens_Q = pool.tokens_QN.mean(axis=1)
  return outcomes.Outcomes(
    ids=tuple(map(str, pool.ids)),
    efforts=tuple(efforts),
    features_BF={'last': pool.last_QF, 'mean': pool.mean_QF}[pooling],
    correct_BE=curve.accuracy_KQ.T,
    flops_BE=curve.flops_KQ.T,
    tokens_BE=np.stack([tokens_Q * k for k in ks], axis=1),
  )


@dataclasses.dataclass(frozen=True, kw_only=True)
class Fold:
  """Questions that were held out, and what their predictor says of them."""

  places: np.ndarray  # in the table
  calibration: outcomes.Outcomes
  predictor: effort_predictor.Predictor


def folds(
  table: outcomes.Outcomes, config: fit_lib.FitConfig = fit_lib.FitConfig()
) -> list[Fold]:
  """Returns a predictor for each fold, which has seen no question of it."""
  order = np.random.default_rng(config.seed).permutation(len(table))
  parts = [order[i::NUM_FOLDS] for i in range(NUM_FOLDS)]
  found = []
  for i, places in enumerate(parts):
    second = (i + 1) % NUM_FOLDS
    rest = [parts[j] for j in range(NUM_FOLDS) if j not in (i, second)]
    kept = table.take(parts[second])
    fitted = fit_lib.fit(table.take(np.concatenate(rest)), kept, config)
    found.append(
      Fold(
        places=places,
        calibration=kept,
        predictor=effort_predictor.Predictor(
          params=fitted.params, efforts=fitted.efforts, weights_digest=''
        ),
      )
    )
  return found


def predicted(
  table: outcomes.Outcomes, found: Sequence[Fold]
) -> tuple[np.ndarray, np.ndarray]:
  """Returns held-out P(correct) and FLOPs of all questions, [B, E]."""
  probs_BE = np.zeros_like(table.correct_BE)
  costs_BE = np.zeros_like(table.correct_BE)
  for fold in found:
    features_BF = table.features_BF[fold.places]
    probs_BE[fold.places], costs_BE[fold.places] = fold.predictor(features_BF)
  return probs_BE, costs_BE


def routed(
  table: outcomes.Outcomes, found: Sequence[Fold], budget: float
) -> np.ndarray:
  """Returns the probability of each effort, [B, E], at a mean budget.

  The price is that of the calibration questions, by what they have cost.

  Raises:
    ValueError: the budget is below the cheapest efforts.
  """
  weights_BE = np.zeros_like(table.correct_BE)
  for fold in found:
    kept = fold.calibration
    probs_BE, costs_BE = fold.predictor(kept.features_BF)
    policy = policy_lib.for_mean_budget(
      probs_BE, costs_BE, budget, paid_BE=kept.flops_BE
    )
    own = fold.predictor(table.features_BF[fold.places])
    weights_BE[fold.places] = policy_lib.weights(policy, *own)
  return weights_BE


def paced(
  table: outcomes.Outcomes,
  found: Sequence[Fold],
  budget: float,
  *,
  num_requests: int = 2000,
  seed: int = 0,
) -> tuple[float, float]:
  """Serves questions one by one; returns accuracy and mean FLOPs.

  Questions are drawn with replacement, and the price follows what was spent.
  """
  rng = np.random.default_rng(seed)
  probs_BE, costs_BE = predicted(table, found)
  fold = found[0]
  policy = policy_lib.for_mean_budget(
    *fold.predictor(fold.calibration.features_BF),
    budget,
    paid_BE=fold.calibration.flops_BE,
  )
  pace, right = policy_lib.Pace(policy=policy, budget=budget), 0.0
  for place in rng.integers(0, len(table), num_requests):
    effort = pace.choose(probs_BE[place], costs_BE[place], rng.random())
    pace = pace.paid(table.flops_BE[place, effort])
    right += table.correct_BE[place, effort]
  return right / num_requests, pace.spent / num_requests


def oracle(table: outcomes.Outcomes, budget: float) -> np.ndarray:
  """Returns the weights of the optimum that knows every question."""
  policy = policy_lib.for_mean_budget(table.correct_BE, table.flops_BE, budget)
  return policy_lib.weights(policy, table.correct_BE, table.flops_BE)


def mixed(table: outcomes.Outcomes, budget: float) -> np.ndarray:
  """Returns the weights of the best random mix of a mean cost, for all alike.

  Two efforts of the concave hull of (mean cost, mean accuracy): the best that
  is in reach without a look at the question.
  """
  means_1E = table.correct_BE.mean(axis=0)[None]
  costs_1E = table.flops_BE.mean(axis=0)[None]
  policy = policy_lib.for_mean_budget(means_1E, costs_1E, budget)
  weights_1E = policy_lib.weights(policy, means_1E, costs_1E)
  return np.repeat(weights_1E, len(table), axis=0)


def value_Q(weights_BE: np.ndarray, values_BE: np.ndarray) -> np.ndarray:
  """Returns the expected value of each question."""
  return np.sum(weights_BE * values_BE, axis=1)


@dataclasses.dataclass(frozen=True, kw_only=True)
class AtBudget:
  """What a budget buys, per question."""

  budget: float
  accuracy: dict[str, np.ndarray]  # by way, [B]
  flops: dict[str, np.ndarray]

  @property
  def share(self) -> float:
    """Part of the way from the best mix to the oracle that the router goes."""
    mix, router, best = (
      float(self.accuracy[name].mean()) for name in ('mix', 'router', 'oracle')
    )
    return (router - mix) / (best - mix) if best > mix else float('nan')

  def share_interval(
    self, num_resamples: int = 2000, seed: int = 0
  ) -> tuple[float, float]:
    """Returns the 95 % interval of `share`, by the paired bootstrap."""
    num = len(self.accuracy['mix'])
    rng = np.random.default_rng(seed)
    which = rng.integers(0, num, (num_resamples, num))
    mix, router, best = (
      self.accuracy[name][which].mean(axis=1)
      for name in ('mix', 'router', 'oracle')
    )
    shares = (router - mix) / np.maximum(best - mix, 1e-12)
    low, high = np.quantile(shares, [0.025, 0.975])
    return float(low), float(high)


def at_budget(
  table: outcomes.Outcomes, found: Sequence[Fold], budget: float
) -> AtBudget:
  """Returns mix, router and oracle at one mean cost."""
  ways = {
    'mix': mixed(table, budget),
    'router': routed(table, found, budget),
    'oracle': oracle(table, budget),
  }
  # Calibration is of other questions: the others get what the router spends.
  spent = float(value_Q(ways['router'], table.flops_BE).mean())
  least = float(table.flops_BE.min(axis=1).mean())
  if spent > least:
    ways |= {'mix': mixed(table, spent), 'oracle': oracle(table, spent)}
  return AtBudget(
    budget=budget,
    accuracy={k: value_Q(v, table.correct_BE) for k, v in ways.items()},
    flops={k: value_Q(v, table.flops_BE) for k, v in ways.items()},
  )


def calibration_error(
  probs_BE: np.ndarray, correct_BE: np.ndarray, num_tries: int
) -> tuple[float, float, float, float]:
  """Returns ECE, its standard error, and mean and spread of a perfect one's.

  Over all questions and efforts together. The error is over questions: the
  efforts of a question are right or wrong together.
  """
  values_BE = calibration.error_values(
    probs_BE.ravel(), correct_BE.ravel()
  ).reshape(probs_BE.shape)
  per_question_B = values_BE.mean(axis=1)
  error = float(np.std(per_question_B, ddof=1) / len(per_question_B) ** 0.5)
  perfect = calibration.error_of_perfect(
    probs_BE.ravel(), num_tries, num_draws=100
  )
  return float(values_BE.mean()), error, *perfect
