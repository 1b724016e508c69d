"""How well a score is known, and whether two scores differ.

Scores here are means over examples: of what each example scored, or of its
influence on a score that is no plain mean (`ratio_values`,
`calibration.error_values`). Standard errors and tests see nothing but these
numbers, so every score is treated alike.

References: Miller 2024 (arXiv:2411.00640) on standard errors, clusters, paired
differences and power for evaluations of language models; McNemar 1947; Efron &
Tibshirani 1993, chapter 16, on tests by the bootstrap.
"""

from collections.abc import Hashable, Sequence
import dataclasses
import math

import numpy as np
from scipy import stats

LEVEL = 0.05  # probability of a difference that is not there
POWER = 0.8  # probability of seeing one that is
NUM_RESAMPLES = 10_000


@dataclasses.dataclass(frozen=True, kw_only=True)
class Difference:
  """Of two scores, B - A, and how well it is known."""

  value: float
  standard_error: float  # nan where unknown
  low: float  # of the interval of 1 - LEVEL
  high: float
  p_value: float  # two-sided
  test: str  # its name, and what it counted


def standard_error(
  values: Sequence[float] | np.ndarray,
  clusters: Sequence[Hashable] | None = None,
) -> float:
  """Returns the standard error of the mean; nan of fewer than two clusters.

  Args:
    values: one per example.
    clusters: which examples belong together (questions on one passage) and may
      err together; None: every example is on its own.

  Reference: Miller 2024, equation 4, times C / (C - 1) for C clusters, with
  which it is the usual error where every cluster has one example.
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

  Their standard error is that of the ratio to first order (the delta method):
  a value is the ratio plus the example's share in its deviation.
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
  """Returns the mean of b - a with Student's interval and test."""
  gaps = _gaps(a, b)
  value, error = _mean(gaps), standard_error(gaps, clusters)
  freedom = len(_cluster_sums(gaps, clusters)) - 1
  if freedom < 1:
    half_width, p_value = math.nan, math.nan
  else:
    half_width = float(stats.t.ppf(1 - LEVEL / 2, freedom)) * error
    p_value = _two_sided(
      value, error, lambda t: 2 * float(stats.t.sf(t, freedom))
    )
  name = 'paired t' if clusters is None else 'paired t over clusters'
  return Difference(
    value=value,
    standard_error=error,
    low=value - half_width,
    high=value + half_width,
    p_value=p_value,
    test=f'{name}, {freedom} degrees of freedom',
  )


def mcnemar(a: Sequence[float], b: Sequence[float]) -> Difference:
  """Returns b - a of answers that are right (1) or wrong (0), tested exactly.

  Only examples on which the two differ tell them apart; under the hypothesis
  each of these is as likely to favour one as the other. The interval is that of
  `paired_t`.

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
  p_value = (
    float(stats.binomtest(gained, gained + lost).pvalue)
    if gained + lost
    else 1.0
  )
  return dataclasses.replace(
    paired_t(a, b),
    p_value=p_value,
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

  Clusters are drawn whole. The test compares with differences that were shifted
  to have no mean.
  """
  gaps = _gaps(a, b)
  value = _mean(gaps)
  sums = _cluster_sums(gaps, clusters)
  counts = _cluster_sums(np.ones_like(gaps), clusters)
  rng = np.random.default_rng(seed)
  drawn = np.empty(num_resamples)
  for i in range(num_resamples):  # one at a time: memory of one sample
    index = rng.integers(0, len(sums), len(sums))
    drawn[i] = np.sum(sums[index]) / np.sum(counts[index])
  low, high = np.quantile(drawn, [LEVEL / 2, 1 - LEVEL / 2])
  # Rounding is not to make the observed difference smaller than itself.
  slack = 1e-12 * max(abs(value), 1e-300)
  beyond = int(np.sum(np.abs(drawn - value) >= abs(value) - slack))
  return Difference(
    value=value,
    standard_error=float(np.std(drawn, ddof=1)),
    low=float(low),
    high=float(high),
    p_value=(beyond + 1) / (num_resamples + 1),
    test=f'paired bootstrap, {num_resamples} resamples',
  )


def unpaired(
  value_a: float, error_a: float, value_b: float, error_b: float
) -> Difference:
  """Returns b - a of two scores on different examples, by the normal law."""
  value, error = value_b - value_a, math.hypot(error_a, error_b)
  half_width = float(stats.norm.ppf(1 - LEVEL / 2)) * error
  return Difference(
    value=value,
    standard_error=error,
    low=value - half_width,
    high=value + half_width,
    p_value=_two_sided(value, error, lambda z: 2 * float(stats.norm.sf(z))),
    test='unpaired z',
  )


def compare(
  a: Sequence[float],
  b: Sequence[float],
  clusters: Sequence[Hashable] | None = None,
) -> Difference:
  """Returns the difference by McNemar's test where it applies, else by t's."""
  if clusters is None and is_binary(a) and is_binary(b):
    return mcnemar(a, b)
  return paired_t(a, b, clusters)


def num_to_resolve(
  difference: float, standard_error: float, num_examples: int
) -> float:
  """Returns how many examples a test needs to see a difference.

  With probability POWER at LEVEL, two-sided, by the normal approximation:
  n = (z(1 - LEVEL/2) + z(POWER))^2 s^2 / difference^2 (Miller 2024, equation
  9), where s^2 is the variance of one example, here num_examples times the
  squared error, which has the clusters in it.

  Args:
    difference: to be seen, on the scale of the score.
    standard_error: of what is tested: of the paired difference where the
      examples are the same, or of one score, times sqrt(2), where they are not.
    num_examples: that the error was found with.

  Returns:
    A whole number; inf for a difference of 0, nan where the examples do not
    show how much they vary.
  """
  if math.isnan(standard_error) or not standard_error:
    return math.nan
  if not difference:
    return math.inf
  needed = (_z() * standard_error / difference) ** 2 * num_examples
  return max(math.ceil(needed - 1e-9), 1)


def smallest_seen(standard_error: float) -> float:
  """Returns the difference that a test with such an error sees, with POWER."""
  return _z() * standard_error


def is_binary(values: Sequence[float]) -> bool:
  """Returns whether every value is 0 or 1."""
  return all(value in (0, 1) for value in values)


def _z() -> float:
  return float(stats.norm.ppf(1 - LEVEL / 2) + stats.norm.ppf(POWER))


def _two_sided(value, error, tail) -> float:
  if math.isnan(error):
    return math.nan
  if not error:  # all examples differ by the same
    return 0.0 if value else 1.0
  return tail(abs(value) / error)


def _gaps(a, b) -> np.ndarray:
  a, b = np.asarray(a, np.float64), np.asarray(b, np.float64)
  if a.shape != b.shape or not a.size:
    raise ValueError(
      f'got {a.size} and {b.size} values, expected pairs of the same examples'
    )
  return b - a


def _mean(values: np.ndarray) -> float:
  # In float64, and exact where the numbers are: a mean of 0s and 1s is.
  return math.fsum(values) / len(values)


def _cluster_sums(values, clusters) -> np.ndarray:
  """Returns the sum of the values of each cluster."""
  if clusters is None:
    return values
  if len(clusters) != len(values):
    raise ValueError(
      f'clusters: got {len(clusters)} of {len(values)} examples, expected one'
      ' for each'
    )
  index_of: dict[Hashable, int] = {}
  index = [index_of.setdefault(cluster, len(index_of)) for cluster in clusters]
  sums = np.zeros(len(index_of))
  np.add.at(sums, index, values)
  return sums
