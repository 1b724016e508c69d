"""Strategies over pools of several models, and which is best for what it costs.

An option is a model size, a strategy and a number of samples. The
compute-optimal choice takes, for each level of difficulty, the most accurate
option within a budget (Snell et al. 2024, arXiv:2408.03314, section 3). Each
level has that budget (`compute_optimal`), or all share it (`allocated`). It is
found on one half of the questions and measured on the other, both ways round,
so that it is not measured on the noise that it was chosen by.
"""

from collections.abc import Mapping, Sequence
import dataclasses

import numpy as np

from studies.think import estimates, pool as pool_lib

ONCE, LIKELIEST, STEPS = 'once', 'best of n: likelihood', 'best of n: steps'
MAJORITY, EARLY = 'majority', 'majority, early stop'
WEIGHTED, COVERAGE = 'majority by steps', 'pass@n'
# Strategies without the right answer, which pass@n knows.
USABLE = LIKELIEST, STEPS, MAJORITY, EARLY, WEIGHTED


def curves(
  pool: pool_lib.Pool, ks: Sequence[int]
) -> dict[str, estimates.Curve]:
  """Returns each strategy at each number of samples."""
  likelihood, _, steps = pool.scores_CQN
  return {
    LIKELIEST: estimates.best_of(pool, likelihood, ks),
    STEPS: estimates.best_of(pool, steps, ks),
    MAJORITY: estimates.majority(pool, ks),
    EARLY: estimates.majority(pool, ks, stops_early=True),
    WEIGHTED: estimates.majority(pool, ks, weights_QN=steps),
    COVERAGE: estimates.coverage(pool, ks),
  }


@dataclasses.dataclass(frozen=True, kw_only=True)
class Option:
  """A size, a strategy and a number of samples, measured."""

  size: str
  strategy: str
  k: int
  accuracy_Q: np.ndarray
  flops_Q: np.ndarray

  @property
  def name(self) -> str:
    """Words for tables."""
    return f'{self.size}, {self.strategy if self.k > 1 else ONCE}, {self.k}'


def options(
  found: Mapping[str, Mapping[str, estimates.Curve]],
  strategies: Sequence[str] = USABLE,
) -> list[Option]:
  """Returns all options of curves by size and strategy."""
  return [
    Option(
      size=size,
      strategy=strategy,
      k=k,
      accuracy_Q=curve.accuracy_KQ[i],
      flops_Q=curve.flops_KQ[i],
    )
    for size, curves_ in found.items()
    for strategy, curve in curves_.items()
    if strategy in strategies
    for i, k in enumerate(curve.ks)
  ]


@dataclasses.dataclass(frozen=True, kw_only=True)
class Chosen:
  """A choice per level: accuracy and FLOPs of each question."""

  accuracy_Q: np.ndarray
  flops_Q: np.ndarray
  names: tuple[tuple[str, ...], ...]  # of the options, by half and level


def compute_optimal(
  among: Sequence[Option], levels_Q: np.ndarray, budget: float
) -> Chosen | None:
  """Returns the best option per level within a budget, cross-fitted.

  Args:
    among: options; the cheapest of a level is taken if it alone fits.
    levels_Q: of the questions.
    budget: mean FLOPs of a question of each level.

  Returns:
    None if the budget pays no option of a level.
  """
  half_Q = halves(levels_Q)
  accuracy_Q, flops_Q = np.zeros((2, len(levels_Q)))
  names: list[tuple[str, ...]] = []
  for half in (0, 1):
    row = []
    for level in np.unique(levels_Q):
      seen = (levels_Q == level) & (half_Q == half)
      fitting = [x for x in among if x.flops_Q[seen].mean() <= budget]
      if not fitting:
        return None
      best = max(
        fitting,
        key=lambda x: (x.accuracy_Q[seen].mean(), -x.flops_Q[seen].mean()),
      )
      other = (levels_Q == level) & (half_Q != half)
      accuracy_Q[other] = best.accuracy_Q[other]
      flops_Q[other] = best.flops_Q[other]
      row.append(best.name)
    names.append(tuple(row))
  return Chosen(accuracy_Q=accuracy_Q, flops_Q=flops_Q, names=tuple(names))


def allocated(
  among: Sequence[Option], levels_Q: np.ndarray, budget: float
) -> Chosen | None:
  """Returns the best option per level, if levels share a budget, cross-fitted.

  What easy levels do not need is spent on others. A price per FLOP makes each
  level choose; it is the lowest one whose choices are within the budget, and
  what is left pays the upgrades that gain most.

  Args:
    among: options.
    levels_Q: of the questions.
    budget: mean FLOPs of all questions.

  Returns:
    None if the budget does not pay the cheapest options.
  """
  half_Q, levels = halves(levels_Q), np.unique(levels_Q)
  accuracy_Q, flops_Q = np.zeros((2, len(levels_Q)))
  names: list[tuple[str, ...]] = []
  for half in (0, 1):
    seen = [(levels_Q == level) & (half_Q == half) for level in levels]
    total = sum(each.sum() for each in seen)
    # Of each level and option, as shares of the means over all questions.
    gains_LO, costs_LO = (
      np.array(
        [
          [getattr(x, name)[which].sum() / total for x in among]
          for which in seen
        ]
      )
      for name in ('accuracy_Q', 'flops_Q')
    )
    chosen_L = _affordable(gains_LO, costs_LO, budget)
    if chosen_L is None:
      return None
    for level, best in zip(levels, chosen_L, strict=True):
      other = (levels_Q == level) & (half_Q != half)
      accuracy_Q[other] = among[best].accuracy_Q[other]
      flops_Q[other] = among[best].flops_Q[other]
    names.append(tuple(among[best].name for best in chosen_L))
  return Chosen(accuracy_Q=accuracy_Q, flops_Q=flops_Q, names=tuple(names))


def _affordable(
  gains_LO: np.ndarray, costs_LO: np.ndarray, budget: float
) -> np.ndarray | None:
  """Returns an option of each level, whose costs are within a budget."""
  rows = np.arange(len(gains_LO))

  def at(price: float) -> np.ndarray:
    # Of equal values, the cheapest.
    values_LO = gains_LO - price * costs_LO
    best_L1 = values_LO.max(axis=1, keepdims=True)
    return np.where(values_LO >= best_L1, costs_LO, np.inf).argmin(axis=1)

  def cost(chosen_L: np.ndarray) -> float:
    return costs_LO[rows, chosen_L].sum()

  chosen_L = costs_LO.argmin(axis=1)
  if cost(chosen_L) > budget:
    return None
  low, high = 0.0, 2 / costs_LO.min()  # no gain is worth the second price
  if cost(at(low)) <= budget:
    return at(low)
  for _ in range(100):
    middle = (low + high) / 2
    if cost(at(middle)) <= budget:
      high = middle
    else:
      low = middle
  chosen_L = at(high)
  while True:
    left = budget - cost(chosen_L)
    more_LO = gains_LO - gains_LO[rows, chosen_L][:, None]
    extra_LO = costs_LO - costs_LO[rows, chosen_L][:, None]
    more_LO = np.where(extra_LO <= left, more_LO, -np.inf)
    level, option = np.unravel_index(more_LO.argmax(), more_LO.shape)
    if more_LO[level, option] <= 0:
      return chosen_L
    chosen_L[level] = option


def best_within(
  among: Sequence[Option], levels_Q: np.ndarray, budget: float
) -> Chosen | None:
  """Returns the best option of all questions together, cross-fitted alike."""
  return compute_optimal(among, np.zeros_like(levels_Q), budget)


def halves(levels_Q: np.ndarray) -> np.ndarray:
  """Returns 0 or 1 of each question: equal halves of each level."""
  found = np.zeros(len(levels_Q), int)
  for level in np.unique(levels_Q):
    places = np.flatnonzero(levels_Q == level)
    found[places[1::2]] = 1
  return found
