"""The budget of a search: what it may spend on one question, in any unit.

    budget = parsed('tokens:2000,seconds:5')
    budget.allows(spent + costs.most(num_prompt, num_new))

A search reserves the most that a sample can cost before it asks for it, so that
what was reserved and what was spent never exceed the budget together. A sample
that ends early returns the rest. Seconds cannot be reserved: the search ends at
its deadline, see `inference.search.drive`.
"""

import dataclasses
import math
from typing import Self

from checks import expect
from inference.requests import prices as prices_lib
from models import flops as flops_lib, model_config

UNITS = 'tokens', 'flops', 'money', 'seconds'


@dataclasses.dataclass(frozen=True, kw_only=True)
class Cost:
  """What something costs, in the units that can be reserved."""

  tokens: int = 0  # sampled, kept or not; those of prompts do not count
  flops: float = 0.0  # of matrix products, prompts included
  money: float = 0.0  # in the currency of the prices, prompts included

  def __add__(self, other: Self) -> 'Cost':
    return Cost(
      tokens=self.tokens + other.tokens,
      flops=self.flops + other.flops,
      money=self.money + other.money,
    )

  def __mul__(self, times: int) -> 'Cost':
    return Cost(
      tokens=self.tokens * times,
      flops=self.flops * times,
      money=self.money * times,
    )


@dataclasses.dataclass(frozen=True, kw_only=True)
class Budget:
  """The most that one question may cost; None does not limit a unit.

  Raises:
    ValueError: a limit is not a finite number above 0.
  """

  tokens: int | None = None
  flops: float | None = None
  money: float | None = None
  seconds: float | None = None

  def __post_init__(self):
    for unit in UNITS:
      value = getattr(self, unit)
      if value is None:
        continue
      is_number = isinstance(value, int | float) and not isinstance(value, bool)
      if not is_number or not 0 < value < math.inf:
        raise ValueError(
          f'budget: got {unit} = {expect.shown(value)}, expected a finite'
          ' number above 0; leave the unit out for no limit'
        )
    if self.tokens is not None and not isinstance(self.tokens, int):
      raise ValueError(
        f'budget: got tokens = {self.tokens}, expected a whole number'
      )

  def allows(self, cost: Cost) -> bool:
    """Returns whether a cost is within the budget."""
    return (
      (self.tokens is None or cost.tokens <= self.tokens)
      and (self.flops is None or cost.flops <= self.flops)
      and (self.money is None or cost.money <= self.money)
    )

  def within(self, most: 'Budget') -> 'Budget':
    """Returns the smaller limit of both in every unit."""
    limits = {}
    for unit in UNITS:
      both = getattr(self, unit), getattr(most, unit)
      known = [value for value in both if value is not None]
      limits[unit] = min(known) if known else None
    return Budget(**limits)

  def __str__(self) -> str:
    given = {unit: getattr(self, unit) for unit in UNITS}
    return ','.join(f'{unit}:{x:g}' for unit, x in given.items() if x) or 'none'


def parsed(text: str) -> Budget:
  """Returns the budget of a text such as 'tokens:2000,seconds:1.5'.

  Raises:
    ValueError: a unit is unknown or there twice, or a limit is no number above
      0.
  """
  limits: dict[str, int | float] = {}
  for part in text.split(','):
    unit, is_split, number = part.strip().partition(':')
    if unit not in UNITS or not is_split or unit in limits:
      raise ValueError(
        f'budget: got {expect.shown(part)}, expected UNIT:NUMBER with commas'
        f' between several, each unit once, of {", ".join(UNITS)}'
      )
    try:
      value = float(number)
    except ValueError:
      raise ValueError(
        f'budget: got {expect.shown(number)} {unit}, expected a number'
      ) from None
    is_whole = unit == 'tokens' and value.is_integer()
    limits[unit] = int(value) if is_whole else value
  return Budget(**limits)  # type: ignore[arg-type]


class Costs:
  """What samples of one model cost, by the formulas of the engine's counters.

  FLOPs are those of `models.flops.SpanFlops`, which the engine charges.
  """

  def __init__(
    self,
    config: model_config.ModelConfig,
    *,
    prices: prices_lib.Prices = prices_lib.Prices(),
    adapter_params: int = 0,
  ):
    """Prepares the formulas.

    Args:
      config: of the model.
      prices: of its tokens.
      adapter_params: weights of the adapter that answers, 0 for the base.
    """
    self.prices, self._span = prices, flops_lib.SpanFlops(config)
    self._per_token = 2 * adapter_params

  def flops(self, start: int, length: int, num_logits: int) -> float:
    """Returns the FLOPs of successive tokens, see `SpanFlops`."""
    return self._span(start, length, num_logits) + self._per_token * length

  def sample_flops(self, num_prompt: int, num_new: int) -> float:
    """Returns the FLOPs of a sample, its prompt computed from the start.

    The last token is sampled and never computed.
    """
    found = self.flops(0, num_prompt, 1)
    if num_new > 1:
      found += self.flops(num_prompt, num_new - 1, num_new - 1)
    return found

  def most(self, num_prompt: int, num_new: int) -> Cost:
    """Returns the most that a sample costs: no token of it is cached."""
    return Cost(
      tokens=num_new,
      flops=self.sample_flops(num_prompt, num_new),
      money=self.prices.most_money(prompt=num_prompt, completion=num_new),
    )


def of_engine(
  engine, adapter: str = '', prices: prices_lib.Prices = prices_lib.Prices()
) -> Costs:
  """Returns the costs of samples of an engine.

  Args:
    engine: an `Engine`.
    adapter: digest of the adapter that answers, '' for the base.
    prices: of its tokens.
  """
  return Costs(
    engine.model_config,
    prices=prices,
    adapter_params=engine.adapters.find(adapter).num_params,
  )
