"""Recalibration: a line in the logits, fitted to outcomes.

    line = fit(logits_N, labels_N)        # Platt: slope and offset
    line = fit(logits_N, labels_N, has_offset=False)    # a temperature

Both minimise the negative log-likelihood, which is convex, by Newton's method.
They are fitted on questions that the predictor was not trained on.

References: Platt 1999, section 2.2; Guo et al. 2017 (arXiv:1706.04599), section
4.2, whose temperature is 1 / slope.
"""

from typing import NamedTuple

import numpy as np

_MOST_STEPS = 100
# A prior of this many standard deviations keeps separable data finite.
_SPREAD = 10.0


class Line(NamedTuple):
  """logit = slope x raw logit + offset."""

  slope: float
  offset: float

  def __call__(self, logits: np.ndarray) -> np.ndarray:
    """Returns the calibrated logits."""
    return self.slope * np.asarray(logits, np.float64) + self.offset


def sigmoid(logits: np.ndarray) -> np.ndarray:
  """Returns the probabilities of logits, without overflow."""
  return np.exp(-np.logaddexp(0.0, -np.asarray(logits, np.float64)))


def fit(
  logits_N: np.ndarray, labels_N: np.ndarray, *, has_offset: bool = True
) -> Line:
  """Returns the line with the least negative log-likelihood.

  Args:
    logits_N: raw logits.
    labels_N: from 0 to 1; a share counts as that many tries of one.
    has_offset: False fits a temperature alone.

  Raises:
    ValueError: no outcomes, not as many as logits, or values out of range.
  """
  logits_N = np.asarray(logits_N, np.float64)
  labels_N = np.asarray(labels_N, np.float64)
  if logits_N.shape != labels_N.shape or not logits_N.size:
    raise ValueError(
      f'calibration: got {logits_N.size} logits and {labels_N.size} outcomes,'
      ' expected one for each, and at least one'
    )
  if not np.all((labels_N >= 0) & (labels_N <= 1)):
    raise ValueError('calibration: got outcomes outside of 0 to 1')
  inputs_NP = np.stack([logits_N, np.ones_like(logits_N)], axis=1)
  inputs_NP = inputs_NP[:, : 1 + has_offset]
  start_P = np.array([1.0, 0.0])[: 1 + has_offset]
  weights_P = start_P.copy()
  prior = 1 / _SPREAD**2

  def loss(weights_P):
    scores_N = inputs_NP @ weights_P
    nll = np.sum(np.logaddexp(0.0, scores_N) - labels_N * scores_N)
    return nll + prior * np.sum((weights_P - start_P) ** 2) / 2

  for _ in range(_MOST_STEPS):
    found_N = sigmoid(inputs_NP @ weights_P)
    slope_P = inputs_NP.T @ (found_N - labels_N)
    slope_P += prior * (weights_P - start_P)
    curve_PP = (inputs_NP * (found_N * (1 - found_N))[:, None]).T @ inputs_NP
    curve_PP += prior * np.eye(len(weights_P))
    step_P, size = np.linalg.solve(curve_PP, slope_P), 1.0
    # Far from the optimum a whole step may overshoot.
    while size > 1e-8 and loss(weights_P - size * step_P) > loss(weights_P):
      size /= 2
    weights_P = weights_P - size * step_P
    if np.max(np.abs(size * step_P)) < 1e-10:
      break
  slope, offset = (*weights_P, 0.0)[:2]
  return Line(float(slope), float(offset))
