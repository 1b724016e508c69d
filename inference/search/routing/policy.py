"""How much effort a question deserves, under a budget.

    policy = for_mean_budget(probs_BE, costs_BE, budget)    # on calibration
    effort = policy.choose(probs_1E, costs_1E, draws_1)

A policy has one price for a unit of cost, and takes the effort of the largest
P(correct) - price x cost. Over a population this is the most accurate choice
among all of the same mean cost (Everett 1963, theorem 1). Efforts are few, so
mostly no price has exactly the budget as its mean cost: two neighbouring prices
are then mixed by a draw per question, the optimum of the linear program.
`Pace` moves the price while requests are served, so that the budget holds
although questions are not those of calibration. NumPy alone.
"""

import dataclasses
import math
from typing import Self

import numpy as np

_HALVINGS = 200
_PRECISION = 1e-12  # of a price, relative
# Of a whole right answer per mean budget, where calibration needed no price.
_FIRST_PRICE = 0.1


@dataclasses.dataclass(frozen=True, kw_only=True)
class Policy:
  """A price per unit of cost, or two that are mixed."""

  low: float  # the price under which more is spent
  high: float  # at least `low`
  share: float  # of the questions that have the low price, 0 to 1

  def choose(
    self, probs_BE: np.ndarray, costs_BE: np.ndarray, draws_B: np.ndarray
  ) -> np.ndarray:
    """Returns the effort of each question, int [B].

    Args:
      probs_BE: P(correct) at each effort.
      costs_BE: expected cost of each.
      draws_B: uniform in [0, 1), one of each question.
    """
    prices_B = np.where(np.asarray(draws_B) < self.share, self.low, self.high)
    return _best(probs_BE, costs_BE, prices_B)

  def expected(
    self, probs_BE: np.ndarray, costs_BE: np.ndarray
  ) -> tuple[np.ndarray, np.ndarray]:
    """Returns the weights of the efforts [B, E], by low and by high price."""
    num_efforts = np.shape(probs_BE)[1]
    low, high = (
      np.eye(num_efforts)[
        _best(probs_BE, costs_BE, np.full(len(probs_BE), price))
      ]
      for price in (self.low, self.high)
    )
    return self.share * low, (1 - self.share) * high

  def scaled(self, factor: float) -> Self:
    """Returns the policy with both prices times a factor."""
    return dataclasses.replace(
      self, low=self.low * factor, high=self.high * factor
    )


def weights(
  policy: Policy, probs_BE: np.ndarray, costs_BE: np.ndarray
) -> np.ndarray:
  """Returns the probability of each effort for each question, [B, E]."""
  low_BE, high_BE = policy.expected(probs_BE, costs_BE)
  return low_BE + high_BE


def for_mean_budget(
  probs_BE: np.ndarray,
  costs_BE: np.ndarray,
  budget: float,
  paid_BE: np.ndarray | None = None,
) -> Policy:
  """Returns the policy whose mean cost over these questions is the budget.

  If the budget pays the most accurate effort of each question, no price is
  asked, and less is spent.

  Args:
    probs_BE: P(correct) of each question and effort.
    costs_BE: expected costs, of which the choice is made.
    budget: mean cost per question.
    paid_BE: costs that were paid, where they are known; None: `costs_BE`.

  Raises:
    ValueError: shapes differ, numbers are out of range, or the budget is below
      the cost of the cheapest efforts.
  """
  probs_BE, costs_BE = _checked(probs_BE, costs_BE)
  paid_BE = costs_BE if paid_BE is None else np.asarray(paid_BE, np.float64)
  rows = np.arange(len(probs_BE))

  def mean_cost(price: float) -> float:
    chosen_B = _best(probs_BE, costs_BE, np.full(len(rows), price))
    return float(np.mean(paid_BE[rows, chosen_B]))

  if mean_cost(0.0) <= budget:
    return Policy(low=0.0, high=0.0, share=1.0)
  # Above this price a gain of 1 pays no difference of costs.
  gaps_BE = np.diff(np.sort(costs_BE, axis=1), axis=1)
  gap = float(np.min(gaps_BE[gaps_BE > 0], initial=np.inf))
  low, high = 0.0, 2.0 / gap
  least = mean_cost(high)
  if least > budget:
    raise ValueError(
      f'budget: got {budget:g} per question, expected at least {least:g}, the'
      ' mean cost of the cheapest efforts'
    )
  for _ in range(_HALVINGS):
    middle = (low + high) / 2
    if not low < middle < high or high - low <= _PRECISION * high:
      break
    low, high = (middle, high) if mean_cost(middle) > budget else (low, middle)
  more, less = mean_cost(low), mean_cost(high)
  return Policy(low=low, high=high, share=(budget - less) / (more - less))


def within(
  probs_BE: np.ndarray, costs_BE: np.ndarray, most: float
) -> np.ndarray:
  """Returns the most probable effort whose cost is at most `most`, int [B].

  Of equals, the cheapest.

  Raises:
    ValueError: no effort of a question is as cheap.
  """
  probs_BE, costs_BE = _checked(probs_BE, costs_BE)
  dear_B = np.min(costs_BE, axis=1) > most
  if np.any(dear_B):
    raise ValueError(
      f'budget: got {most:g} for a request, expected at least'
      f' {np.max(np.min(costs_BE, axis=1)):g}, the cost of its cheapest effort'
    )
  allowed_BE = np.where(costs_BE <= most, probs_BE, -1.0)
  return _best(allowed_BE, costs_BE, np.zeros(len(probs_BE)))


@dataclasses.dataclass(frozen=True, kw_only=True)
class Pace:
  """A policy that pays attention to what it has spent.

  The price is the policy's, times exp((spent - budget x requests) / (budget x
  window)): one window of mean budgets too much raises it by e. A request is
  chosen and then paid, state in, state out.
  """

  policy: Policy
  budget: float  # mean cost per request
  window: float = 10.0  # requests
  spent: float = 0.0
  num_requests: int = 0

  def __post_init__(self):
    """Raises ValueError for a budget or a window that is not positive."""
    for name in ('budget', 'window'):
      if not 0 < getattr(self, name) < math.inf:
        raise ValueError(
          f'{name}: got {getattr(self, name)}, expected a positive number'
        )

  def choose(
    self, probs_E: np.ndarray, costs_E: np.ndarray, draw: float
  ) -> int:
    """Returns the effort of the next request."""
    over = self.spent - self.budget * self.num_requests
    factor = math.exp(min(max(over / (self.budget * self.window), -50.0), 50.0))
    policy = self.policy
    if not policy.high:
      # No price was needed on calibration: one that can grow is needed here.
      price = _FIRST_PRICE / self.budget
      policy = Policy(low=price, high=price, share=1.0)
    return int(
      policy.scaled(factor).choose(
        np.asarray(probs_E)[None], np.asarray(costs_E)[None], np.array([draw])
      )[0]
    )

  def paid(self, cost: float) -> Self:
    """Returns the state after a request of this cost."""
    return dataclasses.replace(
      self, spent=self.spent + cost, num_requests=self.num_requests + 1
    )

  def paid_late(self, cost: float) -> Self:
    """Returns the state after more cost of a request that was paid before."""
    return dataclasses.replace(self, spent=self.spent + cost)


def _best(
  probs_BE: np.ndarray, costs_BE: np.ndarray, prices_B: np.ndarray
) -> np.ndarray:
  """Returns the effort of the largest value; of equals, the cheapest."""
  costs_BE = np.asarray(costs_BE, np.float64)
  order_BE = np.argsort(costs_BE, axis=1, kind='stable')
  values_BE = np.asarray(probs_BE) - prices_B[:, None] * costs_BE
  ordered_BE = np.take_along_axis(values_BE, order_BE, axis=1)
  best_B1 = np.argmax(ordered_BE, axis=1)[:, None]
  return np.take_along_axis(order_BE, best_B1, axis=1)[:, 0]


def _checked(probs_BE, costs_BE) -> tuple[np.ndarray, np.ndarray]:
  probs_BE = np.asarray(probs_BE, np.float64)
  costs_BE = np.asarray(costs_BE, np.float64)
  is_table = probs_BE.ndim == 2 and probs_BE.size > 0
  if not is_table or probs_BE.shape != costs_BE.shape:
    raise ValueError(
      f'efforts: got probabilities {probs_BE.shape} and costs'
      f' {costs_BE.shape}, expected both [questions, efforts]'
    )
  if not np.all((probs_BE >= 0) & (probs_BE <= 1)):
    raise ValueError('efforts: got probabilities outside of 0 to 1')
  if not np.all((costs_BE > 0) & np.isfinite(costs_BE)):
    raise ValueError('efforts: got costs that are not positive, expected some')
  return probs_BE, costs_BE
