"""Prices of tokens, in the currency of the operator."""

import dataclasses
import math

NANOS = 10**9  # parts of the currency: sums of whole numbers are exact
_TOKENS_PER_PRICE = 10**6


@dataclasses.dataclass(frozen=True, kw_only=True)
class Prices:
  """Money per million tokens; the currency is the operator's.

  Raises:
    ValueError: a price is negative or not finite.
  """

  prompt: float = 0.0  # prompt tokens computed for the request
  cached: float = 0.0  # prompt tokens found in the prefix cache
  completion: float = 0.0

  def __post_init__(self):
    for field in dataclasses.fields(self):
      if not 0 <= (price := getattr(self, field.name)) < math.inf:
        raise ValueError(
          f'server.price_{field.name}: got {price}, expected a finite amount'
          ' per million tokens, at least 0'
        )

  def money(self, *, prompt: int, cached: int, completion: int) -> float:
    """Returns the price of tokens; `prompt` includes the cached tokens."""
    money = (
      (prompt - cached) * self.prompt
      + cached * self.cached
      + completion * self.completion
    )
    return money / _TOKENS_PER_PRICE

  def nanos(self, *, prompt: int, cached: int, completion: int) -> int:
    """Returns the same price as a whole number of nanos."""
    money = self.money(prompt=prompt, cached=cached, completion=completion)
    return round(money * NANOS)

  def most_money(self, *, prompt: int, completion: int) -> float:
    """Returns the highest price of tokens, whether cached or not."""
    return max(
      self.money(prompt=prompt, cached=cached, completion=completion)
      for cached in (0, prompt)
    )

  def most_nanos(self, *, prompt: int, completion: int) -> int:
    """Returns the highest price as a whole number of nanos."""
    return round(self.most_money(prompt=prompt, completion=completion) * NANOS)
