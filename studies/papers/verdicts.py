"""The verdict on a quantity of a claim, from the measured value alone.

    reproduced       the value, with its whole interval, is in the range
    not reproduced   the value, with its whole interval, is outside
    inconclusive     the interval crosses an end of the range

An inconclusive verdict says how many seeds would decide. A paper's result that
is not reproduced is a result.
"""

from collections.abc import Sequence
import dataclasses
import math
import statistics

from scipy import stats

from evals import claims as claims_lib
from studies.papers import port

LEVEL = 0.95  # of all intervals
REPRODUCED = 'reproduced'
NOT_REPRODUCED = 'not reproduced'
INCONCLUSIVE = 'inconclusive'
VERDICTS = REPRODUCED, NOT_REPRODUCED, INCONCLUSIVE
# A value close to an end of the range would need too many seeds.
_MOST_SEEDS = 10_000


@dataclasses.dataclass(frozen=True, kw_only=True)
class Finding:
  """A measured quantity. The ends of an exact value are the value itself."""

  value: float
  low: float
  high: float
  seeds: int  # 0: without seeds

  @property
  def is_exact(self) -> bool:
    """Whether the value has no interval."""
    return self.low == self.value == self.high


def finding(value: port.Value) -> Finding:
  """Returns a measured value with its interval; Student's, over seeds.

  Raises:
    ValueError: a number is not finite, or there is one seed only.
  """
  if isinstance(value, port.Interval):
    found = Finding(value=value.value, low=value.low, high=value.high, seeds=0)
  elif isinstance(value, Sequence):
    found = _over_seeds(list(value))
  else:
    number = float(value)
    found = Finding(value=number, low=number, high=number, seeds=0)
  if not all(map(math.isfinite, (found.value, found.low, found.high))):
    raise ValueError(f'measured: got {value}, expected finite numbers')
  if not found.low <= found.value <= found.high:
    raise ValueError(f'measured: got {value}, expected low <= value <= high')
  return found


def _over_seeds(values: list[float]) -> Finding:
  if len(values) < 2:
    raise ValueError(
      f'measured: got {len(values)} seed, expected at least 2: one run does not'
      ' show how much runs vary; raise --seeds'
    )
  if not all(map(math.isfinite, values)):
    raise ValueError(f'measured: got {values}, expected finite numbers')
  mean, deviation = statistics.mean(values), statistics.stdev(values)
  quantile = float(stats.t.ppf((1 + LEVEL) / 2, len(values) - 1))
  half = quantile * deviation / math.sqrt(len(values))
  return Finding(
    value=mean, low=mean - half, high=mean + half, seeds=len(values)
  )


def verdict(quantity: claims_lib.Quantity, found: Finding) -> str:
  """Returns one of `VERDICTS`."""
  ends = quantity.accepts(found.low), quantity.accepts(found.high)
  if all(ends):
    return REPRODUCED
  is_outside = found.high < quantity.low or found.low > quantity.high
  return NOT_REPRODUCED if is_outside else INCONCLUSIVE


def would_decide(quantity: claims_lib.Quantity, found: Finding) -> str:
  """Returns the measurement that would settle an inconclusive verdict."""
  if not found.seeds:
    return 'a narrower interval'
  distance = min(
    abs(found.value - end)
    for end in (quantity.low, quantity.high)
    if math.isfinite(end)
  )
  half = found.high - found.value
  # With more seeds, the interval shrinks as 1 / sqrt(seeds).
  ratio = half / distance if distance else math.inf
  seeds = found.seeds * ratio**2
  if seeds > _MOST_SEEDS:
    return 'no number of seeds: the value is at an end of the range'
  return f'about {math.ceil(seeds)} seeds'
