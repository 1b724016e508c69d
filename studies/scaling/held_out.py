"""Extrapolation: fit without the largest budget, then predict it."""

import dataclasses

import numpy as np

from studies.scaling import parametric, points as points_lib
from training.planning import scaling_laws


@dataclasses.dataclass(frozen=True, kw_only=True)
class Prediction:
  """Losses of the largest budget, from a fit to all smaller ones."""

  fit: scaling_laws.Fit  # of the smaller budgets
  budget: float  # FLOPs
  times_larger: float  # than the largest budget that was fitted
  measured: np.ndarray  # losses, nats per token
  predicted: np.ndarray
  fitted_error: float  # mean absolute error of the fit's own points, nats

  @property
  def error(self) -> float:
    """Returns the mean absolute error of the prediction, nats per token."""
    return float(np.abs(self.predicted - self.measured).mean())

  @property
  def bias(self) -> float:
    """Returns the mean of predicted - measured, nats per token."""
    return float((self.predicted - self.measured).mean())

  @property
  def relative_error(self) -> float:
    """Returns the mean absolute error as a share of the loss."""
    return float(np.abs(self.predicted / self.measured - 1).mean())


def predict_largest(
  points: points_lib.Points, method: parametric.Method
) -> Prediction:
  """Returns the prediction of the largest budget.

  Raises:
    NoFitError: fewer than three budgets, or the smaller ones have no fit.
  """
  budgets = points.budgets
  if len(budgets) < 3:
    raise parametric.NoFitError(
      f'points: got {len(budgets)} budgets, expected at least 3 to predict the'
      ' largest from the others; add runs of another budget'
    )
  is_last = points.flops == budgets[-1]
  known, last = points.at(~is_last), points.at(is_last)
  fit = method(known)
  return Prediction(
    fit=fit,
    budget=float(budgets[-1]),
    times_larger=float(budgets[-1] / budgets[-2]),
    measured=last.losses,
    predicted=parametric.predict(fit, last),
    fitted_error=float(
      np.abs(parametric.predict(fit, known) - known.losses).mean()
    ),
  )
