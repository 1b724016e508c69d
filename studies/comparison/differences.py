"""The difference of two sets of runs: its interval, and the seeds it needs.

There are four cases, by the known spread over seeds:

- Both sets have the same seeds, two or more: a paired t test. A seed gives both
  sides the same order of data, so common noise cancels.
- Two or more runs in both sets, of other seeds: Welch's test (Welch 1947,
  Biometrika 34).
- One run on one side: Student's test with the spread of the other side.
- One run on both sides: Student's test with the spread of a third set, if one
  is given. Otherwise the difference has no interval.

`seeds_to_know` is the number of runs on each side with which a test at 5 %
would see the measured difference four times out of five (normal approximation,
two-sided).
"""

from collections.abc import Mapping, Sequence
import dataclasses
import math
import statistics

from scipy import stats

LEVEL, POWER = 0.95, 0.8
PAIRED = 'paired by seed'
WELCH = "Welch's, unpaired"
ONE_SIDED = "Student's, with the spread of the side that has several seeds"
BORROWED = "Student's, with the spread of --spread_of"
# A spread below this part of the difference is rounding.
_ROUNDING = 1e-9


@dataclasses.dataclass(frozen=True, kw_only=True)
class Comparison:
  """The difference of two sets of runs, second minus first."""

  difference: float
  low: float  # of the 95 % interval; nan: no spread is known
  high: float
  p_value: float  # nan: no spread is known, or nothing varies
  test: str  # '': none
  # On each side; infinite if the means are equal, nan without a spread.
  seeds_to_know: float

  @property
  def differs(self) -> bool:
    """Whether the interval is known and excludes zero."""
    is_known = not math.isnan(self.seeds_to_know)
    return is_known and (self.low > 0 or self.high < 0)


@dataclasses.dataclass(frozen=True, kw_only=True)
class _Spread:
  error: float  # standard error of the difference
  freedom: float  # degrees of freedom of the error
  variance: float  # of the difference of one run on each side
  test: str


def compare(
  first: Mapping[int, float],
  second: Mapping[int, float],
  like: Mapping[int, float] | None = None,
) -> Comparison:
  """Compares two sets of values by seed, each of at least one.

  Args:
    like: values of runs of one experiment, whose spread over seeds is taken for
      both sets if each has one run.
  """
  a, b = list(first.values()), list(second.values())
  mean = statistics.mean(b) - statistics.mean(a)
  found = _spread(first, second, list((like or {}).values()))
  if found is None:
    return Comparison(
      difference=mean,
      low=math.nan,
      high=math.nan,
      p_value=math.nan,
      test='',
      seeds_to_know=math.nan,
    )
  half = float(stats.t.ppf((1 + LEVEL) / 2, found.freedom)) * found.error
  return Comparison(
    difference=mean,
    low=mean - half,
    high=mean + half,
    p_value=2 * float(stats.t.sf(abs(mean) / found.error, found.freedom))
    if found.error
    else math.nan,
    test=found.test,
    seeds_to_know=_seeds_to_know(mean, found.variance),
  )


def _spread(
  first: Mapping[int, float], second: Mapping[int, float], like: Sequence[float]
) -> _Spread | None:
  """Returns the error of the difference; None: no spread is known."""
  a, b = list(first.values()), list(second.values())
  several = [side for side in (a, b) if len(side) > 1]
  if len(several) == 2 and first.keys() == second.keys():
    gaps = [second[seed] - first[seed] for seed in sorted(first)]
    variance = statistics.variance(gaps)
    return _Spread(
      error=math.sqrt(variance / len(gaps)),
      freedom=len(gaps) - 1,
      variance=variance,
      test=PAIRED,
    )
  if len(several) == 2:
    parts = [statistics.variance(side) / len(side) for side in (a, b)]
    return _Spread(
      error=math.sqrt(sum(parts)),
      freedom=_welch(parts, (len(a), len(b))),
      variance=statistics.variance(a) + statistics.variance(b),
      test=WELCH,
    )
  known, test = (several[0], ONE_SIDED) if several else (like, BORROWED)
  if len(known) < 2:
    return None
  variance = statistics.variance(known)
  return _Spread(
    error=math.sqrt(variance * (1 / len(a) + 1 / len(b))),
    freedom=len(known) - 1,
    variance=2 * variance,
    test=test,
  )


def _welch(parts: Sequence[float], sizes: Sequence[int]) -> float:
  """Returns the degrees of freedom of Welch and Satterthwaite."""
  total = sum(parts)
  if not total:
    return float(sum(sizes) - 2)
  below = sum(p * p / (n - 1) for p, n in zip(parts, sizes, strict=True))
  return total * total / below


def _z() -> float:
  return float(stats.norm.ppf((1 + LEVEL) / 2) + stats.norm.ppf(POWER))


def _seeds_to_know(mean: float, variance: float) -> float:
  if not mean:
    return math.inf
  if math.sqrt(variance) <= _ROUNDING * abs(mean):
    return math.nan
  return variance * (_z() / mean) ** 2


def most_spread(difference: float, seeds: int) -> float:
  """Returns the largest standard deviation for which `seeds` are enough.

  Args:
    difference: difference of two means.
    seeds: runs on each side, unpaired.
  """
  return abs(difference) / _z() * math.sqrt(seeds / 2)
