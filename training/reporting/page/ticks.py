"""Ticks of an axis: round numbers, few enough to read, and their text."""

from collections.abc import Sequence
import math

_STEPS = 1.0, 2.0, 5.0, 10.0
_EPSILON = 1e-9  # share of a step: rounding must not lose the last tick


def linear(low: float, high: float, most: int) -> list[float]:
  """Returns multiples of 1, 2 or 5 times a power of ten, at most `most`.

  Args:
    low: end of the axis; ticks outside of the axis are left out.
    high: the other end, above `low`.
    most: number of ticks, at least 2.
  """
  rough = (high - low) / most
  power = 10.0 ** math.floor(math.log10(rough))
  step = next(s * power for s in _STEPS if s * power >= rough * (1 - _EPSILON))
  first = math.ceil(low / step - _EPSILON)
  last = math.floor(high / step + _EPSILON)
  return [i * step for i in range(first, last + 1)]


def logarithmic(low: float, high: float, most: int) -> list[float]:
  """Returns powers of ten, with 2 and 5 times them where there is room.

  Args:
    low: end of the axis, above 0.
    high: the other end, above `low`.
    most: number of ticks, at least 2.
  """
  first, last = math.floor(math.log10(low)), math.ceil(math.log10(high))
  for factors in ((1, 2, 5), (1, 3), (1,)):
    found = [
      factor * 10.0**power
      for power in range(first, last + 1)
      for factor in factors
    ]
    inside = [
      x for x in found if low * (1 - _EPSILON) <= x <= high * (1 + _EPSILON)
    ]
    if len(inside) <= most:
      break
  else:
    inside = inside[:: math.ceil(len(inside) / most)]
  # A short axis may lie between two powers.
  return inside if len(inside) > 1 else linear(low, high, most)


def texts(values: Sequence[float]) -> list[str]:
  """Returns the ticks as text, each with the digits that tell it apart."""
  gaps = [b - a for a, b in zip(values, values[1:], strict=False)]
  if not gaps or max(gaps) > 1.5 * min(gaps):  # logarithmic
    return [number(value) for value in values]
  largest = max(map(abs, values))
  if largest >= 1e6 or largest < 1e-3:
    return [f'{value:.3g}' for value in values]
  decimals = max(0, -math.floor(math.log10(gaps[0]) + _EPSILON))
  return [f'{value:,.{decimals}f}' for value in values]


def number(value: float) -> str:
  """Returns a number with at most four digits, thousands separated."""
  if 1000 <= abs(value) < 1e7:
    return f'{value:,.0f}'
  return f'{value:.4g}'
