"""Standard errors of scores, and tests of the difference between two scores.

Every score here is a mean of one value per example. For a score that is no
plain mean, the value is the influence of the example on the score
(`ratio_values`, `calibration.error_values`). Standard errors and tests read
only these values, so they treat every score alike.

References: Miller 2024 (arXiv:2411.00640) on standard errors, clusters, paired
differences and power for evaluations of language models; McNemar 1947; Efron &
Tibshirani 1993, chapter 16, on tests by the bootstrap.
"""

from collections.abc import Hashable, Sequence
import dataclasses
import math
import types
from typing import Any

import numpy as np

LEVEL = 0.05  # probability that a test finds a difference where there is none
POWER = 0.8  # probability that a test finds a difference that is there
NUM_RESAMPLES = 10_000
# A standard error below this part of the difference, or of the values times the
# other number, is rounding: all examples differ alike, and do not show how much
# examples vary.
_ROUNDING, _ROUNDING_OF_VALUES = 1e-9, 1e-14
_FEWEST_FOR_T = 3  # clusters; the spread of two shows nothing about a third


@dataclasses.dataclass(frozen=True, kw_only=True)
class Difference:
  """The difference of two scores, B - A, with its error and test."""

  value: float
  standard_error: float  # nan if unknown
  low: float  # the confidence interval, of probability 1 - LEVEL
  high: float
  p_value: float  # two-sided
  test: str  # name of the test, and its counts


def standard_error(
  values: Sequence[float] | np.ndarray,
  clusters: Sequence[Hashable] | None = None,
) -> float:
  """Returns the standard error of the mean; nan for fewer than two clusters.

  Args:
    values: one per example.
    clusters: the cluster of each example. Examples of one cluster, such as
      questions on one passage, may err together. None: each is independent.

  Reference: Miller 2024, equation 4, times C / (C - 1) for C clusters. With
  this factor it equals the usual standard error if each cluster has one
  example.
  """
  values = np.asarray(values, np.float64)
  sums = _cluster_sums(values - _mean(values), clusters)
  if len(sums) < 2:
    return math.nan
  scale = len(sums) / (len(sums) - 1)
  return math.sqrt(scale * float(np.sum(sums**2))) / len(values)


def ratio_values(
  numerators: Sequence[float] | np.ndarray,
  denominators: Sequence[float] | np.ndarray,
) -> np.ndarray:
  """Returns values whose mean is sum(numerators) / sum(denominators).

  The standard error of the values is the standard error of the ratio to first
  order (the delta method): a value is the ratio plus the example's influence.
  """
  x = np.asarray(numerators, np.float64)
  w = np.asarray(denominators, np.float64)
  ratio = np.sum(x) / np.sum(w)
  return ratio + (x - ratio * w) / np.mean(w)


def paired_t(
  a: Sequence[float],
  b: Sequence[float],
  clusters: Sequence[Hashable] | None = None,
) -> Difference:
  """Returns the mean of b - a with Student's interval and test.

  Two examples, and examples that all differ alike, have no interval; they are
  tested by their signs, exactly.
  """
  gaps = _gaps(a, b)
  value, error = _mean(gaps), standard_error(gaps, clusters)
  sums = _cluster_sums(gaps, clusters)
  freedom = len(sums) - 1
  if len(sums) < _FEWEST_FOR_T or _is_rounding(error, value, a, b):
    return _by_signs(value, sums)
  half_width = float(_scipy_stats().t.ppf(1 - LEVEL / 2, freedom)) * error
  name = 'paired t' if clusters is None else 'paired t over clusters'
  return Difference(
    value=value,
    standard_error=error,
    low=value - half_width,
    high=value + half_width,
    p_value=2 * float(_scipy_stats().t.sf(abs(value) / error, freedom)),
    test=f'{name}, {freedom} degrees of freedom',
  )


def _is_rounding(error: float, value: float, a: Any, b: Any) -> bool:
  largest = max(np.max(np.abs(a)), np.max(np.abs(b)))
  return error <= max(_ROUNDING * abs(value), _ROUNDING_OF_VALUES * largest)


def _by_signs(value: float, sums: np.ndarray) -> Difference:
  """Returns a difference whose error is unknown, with the exact sign test."""
  gained, lost = int(np.sum(sums > 0)), int(np.sum(sums < 0))
  return Difference(
    value=value,
    standard_error=math.nan,
    low=math.nan,
    high=math.nan,
    p_value=math.nan if len(sums) < 2 else _sign_test(gained, lost),
    test=f'exact sign test, {gained} above and {lost} below',
  )


def _sign_test(gained: int, lost: int) -> float:
  if not gained + lost:
    return 1.0
  return float(_scipy_stats().binomtest(gained, gained + lost).pvalue)


def mcnemar(a: Sequence[float], b: Sequence[float]) -> Difference:
  """Returns b - a of answers that are right (1) or wrong (0), tested exactly.

  The test counts only examples on which the answers differ. Under the null
  hypothesis each of them favours a or b with probability 1/2. The interval is
  the interval of `paired_t`.

  Raises:
    ValueError: a value is neither 0 nor 1.
  """
  if not (is_binary(a) and is_binary(b)):
    raise ValueError(
      'mcnemar: got values other than 0 and 1, expected right or wrong; use'
      ' paired_t'
    )
  gaps = _gaps(a, b)
  gained, lost = int(np.sum(gaps > 0)), int(np.sum(gaps < 0))
  return dataclasses.replace(
    paired_t(a, b),
    p_value=_sign_test(gained, lost),
    test=f'McNemar exact, {gained} gained and {lost} lost',
  )


def paired_bootstrap(
  a: Sequence[float],
  b: Sequence[float],
  clusters: Sequence[Hashable] | None = None,
  *,
  seed: int = 0,
  num_resamples: int = NUM_RESAMPLES,
) -> Difference:
  """Returns the mean of b - a with a percentile interval and a bootstrap test.

  Clusters are drawn whole. The p-value is the share of resampled differences,
  shifted to mean 0, that are at least as large as the observed one. It is not
  below 2^(1 - C) for C clusters, the least of any exact test of their signs.
  Clusters that all differ alike are tested by their signs.
  """
  gaps = _gaps(a, b)
  value = _mean(gaps)
  sums = _cluster_sums(gaps, clusters)
  error = standard_error(gaps, clusters)
  if len(sums) < 2 or _is_rounding(error, value, a, b):
    return _by_signs(value, sums)
  counts = _cluster_sums(np.ones_like(gaps), clusters)
  rng = np.random.default_rng(seed)
  drawn = np.empty(num_resamples)
  for i in range(num_resamples):  # a loop holds one resample in memory
    index = rng.integers(0, len(sums), len(sums))
    drawn[i] = np.sum(sums[index]) / np.sum(counts[index])
  low, high = np.quantile(drawn, [LEVEL / 2, 1 - LEVEL / 2])
  # Without slack, rounding could exclude a resample equal to the observation.
  slack = 1e-12 * max(abs(value), 1e-300)
  beyond = int(np.sum(np.abs(drawn - value) >= abs(value) - slack))
  return Difference(
    value=value,
    standard_error=float(np.std(drawn, ddof=1)),
    low=float(low),
    high=float(high),
    p_value=max((beyond + 1) / (num_resamples + 1), 2.0 ** (1 - len(sums))),
    test=f'paired bootstrap, {num_resamples} resamples',
  )


def unpaired(
  value_a: float,
  error_a: float,
  value_b: float,
  error_b: float,
  counts: tuple[int, int] | None = None,
) -> Difference:
  """Returns b - a of two scores on different examples, by a z-test.

  The test is unknown if all examples of a score are alike: an error of 0 is no
  estimate then.

  Args:
    value_a: score of a.
    error_a: its standard error.
    value_b: score of b.
    error_b: its standard error.
    counts: examples of a and of b. The p-value is not below 2 over the number
      of ways to divide them, the least of any exact permutation test.
  """
  value, error = value_b - value_a, math.hypot(error_a, error_b)
  if not (error_a and error_b):
    error = math.nan
  half_width = float(_scipy_stats().norm.ppf(1 - LEVEL / 2)) * error
  p_value = 2 * float(_scipy_stats().norm.sf(abs(value) / error))
  # For 20 and 20 examples there are more than 10^11 divisions.
  if counts is not None and min(counts) < 20 and not math.isnan(p_value):
    p_value = max(p_value, 2 / math.comb(sum(counts), counts[0]))
  return Difference(
    value=value,
    standard_error=error,
    low=value - half_width,
    high=value + half_width,
    p_value=p_value,
    test='unpaired z',
  )


def compare(
  a: Sequence[float],
  b: Sequence[float],
  clusters: Sequence[Hashable] | None = None,
) -> Difference:
  """Returns b - a by McNemar's test if it applies, else by paired t."""
  if clusters is None and is_binary(a) and is_binary(b):
    return mcnemar(a, b)
  return paired_t(a, b, clusters)


def num_to_resolve(
  difference: float, standard_error: float, num_examples: int
) -> float:
  """Returns the number of examples with which a test finds a difference.

  The two-sided test at LEVEL finds it with probability POWER, by the normal
  approximation: n = (z(1 - LEVEL/2) + z(POWER))^2 s^2 / difference^2 (Miller
  2024, equation 9). s^2 is the variance of one example, here num_examples times
  the squared error. The error takes clusters into account.

  Args:
    difference: difference to find, on the scale of the score.
    standard_error: standard error of the paired difference if the examples are
      the same, else of one score times sqrt(2).
    num_examples: the examples behind the standard error.

  Returns:
    A whole number; inf for a difference of 0, nan if the error is 0 or unknown.
  """
  if math.isnan(standard_error) or not standard_error:
    return math.nan
  if not difference:
    return math.inf
  needed = (_z() * standard_error / difference) ** 2 * num_examples
  return max(math.ceil(needed - 1e-9), 1)


def smallest_seen(standard_error: float) -> float:
  """Returns the smallest difference that a test finds, with POWER.

  nan if the error is unknown, or 0 because all examples are alike.
  """
  return _z() * standard_error if standard_error else math.nan


def is_binary(values: Sequence[float]) -> bool:
  """Returns whether every value is 0 or 1."""
  return all(value in (0, 1) for value in values)


def _z() -> float:
  return float(
    _scipy_stats().norm.ppf(1 - LEVEL / 2) + _scipy_stats().norm.ppf(POWER)
  )


def _gaps(a, b) -> np.ndarray:
  a, b = np.asarray(a, np.float64), np.asarray(b, np.float64)
  if a.shape != b.shape or not a.size:
    raise ValueError(
      f'got {a.size} and {b.size} values, expected one pair per example'
    )
  return b - a


def _mean(values: np.ndarray) -> float:
  # math.fsum rounds once: the mean of 0s and 1s is exactly the share of 1s.
  return math.fsum(values) / len(values)


def _cluster_sums(values, clusters) -> np.ndarray:
  """Returns the sum of the values of each cluster."""
  if clusters is None:
    return values
  if len(clusters) != len(values):
    raise ValueError(
      f'clusters: got {len(clusters)} for {len(values)} examples, expected one'
      ' for each example'
    )
  index_of: dict[Hashable, int] = {}
  index = [index_of.setdefault(cluster, len(index_of)) for cluster in clusters]
  sums = np.zeros(len(index_of))
  np.add.at(sums, index, values)
  return sums


def _scipy_stats() -> types.ModuleType:
  # Not at the top: importing it takes as long as a tenth of a prompt's answer.
  from scipy import stats

  return stats
