"""Calibration: whether the confidence of a model matches its accuracy.

The confidence of an answer is the probability of the option that was chosen. A
calibrated model is right in seven of ten answers with confidence 0.7.

References: Guo et al. 2017 (arXiv:1706.04599), equation 3, for the expected
calibration error; Brier 1950 for the score of the same name.
"""

from collections.abc import Sequence
from typing import NamedTuple

import numpy as np

NUM_BINS = 15  # as Guo et al.


class Bin(NamedTuple):
  """The answers whose confidence is in (low, high]."""

  low: float
  high: float
  count: int
  confidence: float  # mean of the answers
  accuracy: float  # share of right answers


def probabilities(logprobs: Sequence[float] | np.ndarray) -> np.ndarray:
  """Returns the probability of each option, given that one is chosen."""
  logprobs = np.asarray(logprobs, np.float64)
  weights = np.exp(logprobs - np.max(logprobs))
  return weights / np.sum(weights)


def bins(
  confidences: Sequence[float] | np.ndarray,
  is_right: Sequence[float] | np.ndarray,
  num_bins: int = NUM_BINS,
) -> list[Bin]:
  """Returns the reliability diagram: the bins that are not empty."""
  confidences_N, is_right_N, index_N = _binned(confidences, is_right, num_bins)
  found = []
  for i in np.unique(index_N):
    members = index_N == i
    found.append(
      Bin(
        low=float(i / num_bins),
        high=float((i + 1) / num_bins),
        count=int(np.sum(members)),
        confidence=float(np.mean(confidences_N[members])),
        accuracy=float(np.mean(is_right_N[members])),
      )
    )
  return found


def error_values(
  confidences: Sequence[float] | np.ndarray,
  is_right: Sequence[float] | np.ndarray,
  num_bins: int = NUM_BINS,
) -> np.ndarray:
  """Returns values whose mean is the expected calibration error.

  The ECE is 1/N times the sum over bins of |sum of (is_right - confidence)|. So
  the value of an answer is its gap, is_right - confidence, times the sign of
  the sum of its bin. The standard error of the values is the standard error of
  the ECE to first order. It ignores that the signs come from the same data:
  with few answers per bin, the ECE of a calibrated model is above 0.
  """
  confidences_N, is_right_N, index_N = _binned(confidences, is_right, num_bins)
  gaps_N = is_right_N - confidences_N
  sums = np.bincount(index_N, weights=gaps_N, minlength=num_bins)
  return np.sign(sums)[index_N] * gaps_N


def error_of_perfect(
  confidences: Sequence[float] | np.ndarray,
  num_tries: int = 1,
  *,
  num_bins: int = NUM_BINS,
  num_draws: int = 500,
  seed: int = 0,
) -> tuple[float, float]:
  """Returns the mean and the spread of the ECE of perfect confidences.

  Outcomes are drawn with the confidences as their probabilities. An ECE that is
  near this mean shows no miscalibration, even if it is far above 0.

  Args:
    confidences: confidence of each answer.
    num_tries: number of tries behind each outcome, the share that was right.
    num_bins: number of bins of the ECE.
    num_draws: number of tables of outcomes to draw.
    seed: seed of the draws.
  """
  confidences_N = np.asarray(confidences, np.float64)
  rng = np.random.default_rng(seed)
  errors = []
  for _ in range(num_draws):
    outcomes_N = rng.binomial(num_tries, confidences_N) / num_tries
    errors.append(np.mean(error_values(confidences, outcomes_N, num_bins)))
  return float(np.mean(errors)), float(np.std(errors))


def brier_value(probabilities: np.ndarray, label: int) -> float:
  """Returns the Brier score of one answer: 0 is the best, 2 the worst."""
  hit = np.zeros(len(probabilities))
  hit[label] = 1.0
  return float(np.sum((np.asarray(probabilities) - hit) ** 2))


def nll_value(logprobs: Sequence[float] | np.ndarray, label: int) -> float:
  """Returns -log of the probability of the right option, in nats."""
  logprobs = np.asarray(logprobs, np.float64)
  top = np.max(logprobs)
  log_total = top + np.log(np.sum(np.exp(logprobs - top)))
  return float(log_total - logprobs[label])


def _binned(confidences, is_right, num_bins):
  confidences_N = np.asarray(confidences, np.float64)
  is_right_N = np.asarray(is_right, np.float64)
  if confidences_N.shape != is_right_N.shape or not confidences_N.size:
    raise ValueError(
      f'confidences: got {confidences_N.size} of {is_right_N.size} answers,'
      ' expected one for each answer, and at least one answer'
    )
  if np.any((confidences_N < 0) | (confidences_N > 1)):
    raise ValueError(
      f'confidences: got {confidences_N.min():g} to {confidences_N.max():g},'
      ' expected probabilities from 0 to 1'
    )
  index_N = np.ceil(confidences_N * num_bins).astype(int) - 1
  return confidences_N, is_right_N, np.clip(index_N, 0, num_bins - 1)
