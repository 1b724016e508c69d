"""IsoFLOP analysis: a parabola per budget, a power law through their minima.

Approach 2 of Hoffmann et al. (arXiv:2203.15556): for each budget the loss is a
parabola in log N, and the minima give N_opt = k C^a. The law
L = E + A / N^alpha + B / D^beta is no parabola in log N unless alpha = beta, so
that the minimum is biased where the grid is wide, or lies to one side of the
optimum (arXiv:2603.22339). `bias` says by how much, for the grid of the points.
"""

import dataclasses

import numpy as np

from studies.scaling import parametric, points as points_lib
from training.planning import scaling_laws

LEAST_SIZES = 4  # a parabola through three points has no residual


@dataclasses.dataclass(frozen=True, kw_only=True)
class Parabola:
  """One budget: loss = minimum + curvature (log N - log N_opt)^2."""

  budget: float  # FLOPs
  best_params: float  # N_opt
  minimum: float  # nats per token
  curvature: float
  is_inside: bool  # whether N_opt lies between the sizes of the budget
  residuals: np.ndarray  # per point of the budget

  def loss(self, params: np.ndarray) -> np.ndarray:
    """Returns the parabola at sizes, nats per token."""
    offset = np.log(params / self.best_params)
    return self.minimum + self.curvature * offset**2


@dataclasses.dataclass(frozen=True, kw_only=True)
class PowerLaw:
  """N_opt = scale x C^exponent, through the minima of the parabolas."""

  scale: float
  exponent: float
  parabolas: tuple[Parabola, ...]

  def best_params(self, flops: float) -> float:
    """Returns the best number of parameters of a budget."""
    return self.scale * flops**self.exponent


def fit(points: points_lib.Points) -> PowerLaw:
  """Returns the power law of points that belong to budgets.

  Raises:
    NoFitError: fewer than two budgets, too few sizes in one, or a budget
      whose losses have no minimum.
  """
  budgets = points.budgets
  if len(budgets) < 2:
    raise parametric.NoFitError(
      f'points: got {len(budgets)} budget of FLOPs, expected at least 2 for a'
      ' power law; add runs of another budget'
    )
  parabolas = tuple(
    _parabola(points.at(points.flops == budget), budget) for budget in budgets
  )
  slope, intercept = np.polyfit(
    np.log(budgets), np.log([each.best_params for each in parabolas]), 1
  )
  return PowerLaw(
    scale=float(np.exp(intercept)), exponent=float(slope), parabolas=parabolas
  )


def _parabola(points: points_lib.Points, budget: float) -> Parabola:
  sizes = np.unique(points.params)
  if len(sizes) < LEAST_SIZES:
    raise parametric.NoFitError(
      f'points: got {len(sizes)} sizes at {budget:.3g} FLOPs, expected at least'
      f' {LEAST_SIZES} for a parabola; add sizes, or leave the budget out'
    )
  center = np.log(points.params).mean()
  x = np.log(points.params) - center
  curvature, slope, level = np.polyfit(x, points.losses, 2)
  if curvature <= 0:
    raise parametric.NoFitError(
      f'points: got losses without a minimum at {budget:.3g} FLOPs, expected'
      ' sizes on both sides of it; add sizes, or leave the budget out'
    )
  best = -slope / (2 * curvature)
  return Parabola(
    budget=float(budget),
    best_params=float(np.exp(best + center)),
    minimum=float(level - slope**2 / (4 * curvature)),
    curvature=float(curvature),
    is_inside=bool(x.min() <= best <= x.max()),
    residuals=points.losses - np.polyval([curvature, slope, level], x),
  )


def bootstrap(
  points: points_lib.Points, *, num_resamples: int = 200, seed: int = 0
) -> parametric.Interval:
  """Returns the interval of the exponent, by resampled residuals.

  A budget has too few sizes to draw them with replacement: a draw of three
  distinct sizes leaves no residual. So residuals, scaled by sqrt(n / (n - 3))
  for the three numbers of a parabola, are drawn within each budget instead.
  """
  found = fit(points)
  rng = np.random.default_rng(seed)
  exponents = []
  for _ in range(num_resamples):
    losses = points.losses.copy()
    for each in found.parabolas:
      of = np.flatnonzero(points.flops == each.budget)
      freedom = np.sqrt(len(of) / (len(of) - 3))
      drawn = rng.choice(each.residuals, len(of)) * freedom
      losses[of] = each.loss(points.params[of]) + drawn
    try:
      again = fit(dataclasses.replace(points, losses=losses))
    except parametric.NoFitError:
      continue
    exponents.append(again.exponent)
  if len(exponents) * 2 < num_resamples:
    raise parametric.NoFitError(
      f'bootstrap: got {num_resamples - len(exponents)} of {num_resamples}'
      ' resamples without a minimum, expected few; add sizes on both sides of'
      ' the minima'
    )
  return parametric.interval(exponents)


@dataclasses.dataclass(frozen=True, kw_only=True)
class Bias:
  """The error of the parabolas on noise-free losses of a known law."""

  # Parabola's N_opt over the law's own, minus 1, by budget.
  best_params: dict[float, float]
  exponent: float  # of the power law, minus that of the law's optimum


def bias(law: scaling_laws.Fit, points: points_lib.Points) -> Bias:
  """Returns the error of `fit` on the grid of points, without noise.

  The losses come from `law` at the sizes and tokens of the points. The rest of
  the difference between both methods is noise, or a law that does not hold.
  """
  exact = dataclasses.replace(points, losses=parametric.predict(law, points))
  found = fit(exact)
  return Bias(
    best_params={
      each.budget: each.best_params / law.optimum(each.budget)[0] - 1
      for each in found.parabolas
    },
    exponent=found.exponent - parametric.quantities(law)['a'],
  )
