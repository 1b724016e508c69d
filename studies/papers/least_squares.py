"""Measurements of claims about least squares."""

import numpy as np

from evals import claims as claims_lib
from studies.papers import port

_NOISE = 0.5  # standard deviation of the labels
_NUM_POINTS = 100
_REPEATS = 200  # draws of a seed; their mean is one value
_DIMENSION = 20  # of regression in context


def double_descent(
  claim: claims_lib.Claim, setting: port.Setting
) -> port.Measured:
  """Returns the excess risk of minimum-norm regression, by simulation.

  Features are N(0, I), the true weights have length 1, and the risk is the
  squared distance of the fitted weights to the true weights.
  """
  del claim
  found = {}
  for width in (50, 90, 110, 150, 200, 400):
    found[f'{width} parameters'] = [
      _mean_risk(np.random.default_rng([seed, width]), width)
      for seed in setting.seeds
    ]
  return found


def _mean_risk(rng: np.random.Generator, width: int) -> float:
  risks = []
  for _ in range(_REPEATS):
    true = _unit(rng, width)
    x = rng.normal(size=(_NUM_POINTS, width))
    y = x @ true + _NOISE * rng.normal(size=_NUM_POINTS)
    risks.append(np.sum((_least_norm(x, y) - true) ** 2))
  return float(np.mean(risks))


def _least_norm(x: np.ndarray, y: np.ndarray) -> np.ndarray:
  """Returns the solution of least squares with the smallest norm."""
  if x.shape[0] >= x.shape[1]:
    return np.linalg.solve(x.T @ x, x.T @ y)
  return x.T @ np.linalg.solve(x @ x.T, y)


def _unit(rng: np.random.Generator, width: int) -> np.ndarray:
  weights = rng.normal(size=width)
  return weights / np.linalg.norm(weights)


def in_context_floor(
  claim: claims_lib.Claim, setting: port.Setting
) -> port.Measured:
  """Returns the error of least squares after k examples, over that of 0."""
  del claim
  found = {}
  for num_examples in (5, 10, 15, 19):
    found[f'{num_examples} examples'] = [
      _error_left(np.random.default_rng([seed, num_examples]), num_examples)
      for seed in setting.seeds
    ]
  return found


def _error_left(rng: np.random.Generator, num_examples: int) -> float:
  left = []
  for _ in range(4 * _REPEATS):
    true = rng.normal(size=_DIMENSION)
    x = rng.normal(size=(num_examples, _DIMENSION))
    miss = _least_norm(x, x @ true) - true
    # The squared error at a new point, over its expectation without examples.
    left.append(np.sum(miss**2) / _DIMENSION)
  return float(np.mean(left))
