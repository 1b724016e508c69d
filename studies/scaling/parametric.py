"""Fits of L(N, D) = E + A / N^alpha + B / D^beta to trained models.

Two methods, which agree where points have little noise:

- `project`: variable projection. For fixed exponents the law is linear in E, A
  and B, which are solved for exactly (non-negative least squares of the
  relative residuals); only the two exponents are searched. It needs no starting
  values of E, A and B, whose scales differ by orders of magnitude.
- `huber`: the Huber loss, with delta = 1e-3, of the residuals of log L,
  minimised by L-BFGS from a grid of starts (Hoffmann et al., arXiv:2203.15556,
  equation 3 and appendix D.3). log L is written as a log-sum-exp of
  (log A - alpha log N, log B - beta log D, log E). The loss is a sum over
  points: L-BFGS ends too early on a mean (Besiroglu et al., arXiv:2404.10102).

N and D are scaled by their geometric means inside both, so that exponents and
factors are not nearly collinear; results are in the units of the points.
"""

from collections.abc import Callable
import dataclasses
import itertools

import numpy as np
from scipy import optimize, special

from studies.scaling import points as points_lib
from training.planning import scaling_laws

LEVEL = 0.95  # of all intervals
_DELTA = 1e-3  # of the Huber loss, arXiv:2203.15556, appendix D.3
_MOST = 3.0  # largest exponent that is searched
_LEAST = 1e-3
_NUM_UNKNOWN = 5  # numbers of the law
_GRID = (0.1, 0.3, 0.5, 0.8, 1.2)  # exponents to start from


class NoFitError(ValueError):
  """Points that the law does not describe."""


Method = Callable[[points_lib.Points], scaling_laws.Fit]


@dataclasses.dataclass(frozen=True, kw_only=True)
class Interval:
  """A bootstrap interval at `LEVEL`, and the standard error."""

  low: float
  high: float
  error: float

  def __contains__(self, value: float) -> bool:
    """Returns whether a value is inside."""
    return self.low <= value <= self.high


@dataclasses.dataclass(frozen=True, kw_only=True)
class Estimate:
  """A fit, and the interval of each of its `quantities`."""

  fit: scaling_laws.Fit
  intervals: dict[str, Interval]
  num_resamples: int
  num_failed: int  # resamples that the law did not describe


def quantities(fit: scaling_laws.Fit) -> dict[str, float]:
  """Returns the numbers of a law, and a, b and G of its optimum.

  N = G (C/6)^a and D = (C/6)^b / G, equation 4 of arXiv:2203.15556.
  """
  alpha, beta = fit.params_exponent, fit.tokens_exponent
  return {
    'E': fit.floor,
    'A': fit.params_scale,
    'B': fit.tokens_scale,
    'alpha': alpha,
    'beta': beta,
    'a': beta / (alpha + beta),
    'b': alpha / (alpha + beta),
    'G': fit.optimum(6.0)[0],
  }


def predict(fit: scaling_laws.Fit, points: points_lib.Points) -> np.ndarray:
  """Returns the expected loss of every point, nats per token."""
  pairs = zip(points.params.tolist(), points.tokens.tolist(), strict=True)
  return np.array([fit.loss(*pair) for pair in pairs])


def misfit(fit: scaling_laws.Fit, points: points_lib.Points) -> float:
  """Returns the summed Huber loss of the log residuals of a law."""
  x = np.array([
    *np.log([fit.floor, fit.params_scale, fit.tokens_scale]),
    fit.params_exponent,
    fit.tokens_exponent,
  ])  # fmt: skip
  logs = np.log([points.params, points.tokens, points.losses])
  return huber_objective(x, *logs)[0]


def project(points: points_lib.Points) -> scaling_laws.Fit:
  """Fits by variable projection: least squares of relative residuals.

  Raises:
    NoFitError: too few points, or no law with positive numbers fits.
  """
  _check(points)
  scales = _scales(points)
  log_n, log_d = _logs(points, scales)

  def solved(exponents):
    columns = np.stack(
      [
        np.ones_like(log_n),
        np.exp(-exponents[0] * log_n),
        np.exp(-exponents[1] * log_d),
      ],
      axis=1,
    )
    weighted = columns / points.losses[:, None]
    factors, _ = optimize.nnls(weighted, np.ones(len(points)))
    return factors, weighted @ factors - 1

  start = min(
    itertools.product(_GRID, _GRID), key=lambda e: np.sum(solved(e)[1] ** 2)
  )
  found = optimize.least_squares(
    lambda exponents: solved(exponents)[1],
    start,
    jac='3-point',
    bounds=(_LEAST, _MOST),
    xtol=1e-15,
    ftol=1e-15,
    gtol=1e-15,
    max_nfev=500,
  )
  floor, params_factor, tokens_factor = solved(found.x)[0]
  return _unscaled(
    'variable projection',
    (floor, params_factor, tokens_factor, *found.x),
    scales,
  )


def huber(
  points: points_lib.Points, starts: np.ndarray | None = None
) -> scaling_laws.Fit:
  """Fits by the Huber loss of log residuals, L-BFGS from many starts.

  Args:
    starts: rows of (log E, log A, log B, alpha, beta), of N and D divided by
      their geometric means; None: a grid.

  Raises:
    NoFitError: too few points, or no start ends at a law.
  """
  _check(points)
  scales = _scales(points)
  logs = *_logs(points, scales), np.log(points.losses)
  starts = _starts(points) if starts is None else starts
  best = None
  for start in starts:
    found = optimize.minimize(
      huber_objective,
      start,
      args=logs,
      jac=True,
      method='L-BFGS-B',
      options={'maxiter': 1000, 'maxfun': 2000, 'ftol': 1e-13, 'gtol': 1e-9},
    )
    if np.isfinite(found.fun) and (best is None or found.fun < best.fun):
      best = found
  if best is None:
    raise NoFitError('huber: got no start that ends, expected one; give points')
  # Polished from where L-BFGS stopped: near the optimum the Huber loss is
  # quadratic, and L-BFGS stops at a relative change of about 1e-9.
  polished = optimize.minimize(
    huber_objective, best.x, args=logs, jac=True, method='BFGS',
    options={'gtol': 1e-12, 'maxiter': 500},
  )  # fmt: skip
  x = polished.x if polished.fun <= best.fun else best.x
  return _unscaled('Huber loss of log residuals', (*np.exp(x[:3]), *x[3:]),
                   scales)  # fmt: skip


def huber_objective(
  x: np.ndarray, log_n: np.ndarray, log_d: np.ndarray, log_loss: np.ndarray
) -> tuple[float, np.ndarray]:
  """Returns the summed Huber loss of log residuals and its gradient.

  Args:
    x: log E, log A, log B, alpha, beta.
    log_n: log of the parameters, per point.
    log_d: log of the tokens, per point.
    log_loss: log of the measured losses, per point.

  Reference: equation 3 of arXiv:2203.15556.
  """
  floor, params, tokens, alpha, beta = x
  terms = np.stack(
    [
      np.full_like(log_n, floor),
      params - alpha * log_n,
      tokens - beta * log_d,
    ]
  )
  log_sum = special.logsumexp(terms, axis=0)
  residuals = log_sum - log_loss
  size = np.abs(residuals)
  value = np.where(
    size <= _DELTA, 0.5 * residuals**2, _DELTA * (size - 0.5 * _DELTA)
  ).sum()
  slope = np.clip(residuals, -_DELTA, _DELTA)  # derivative by the residual
  shares = np.exp(terms - log_sum) * slope
  gradient = np.array(
    [
      shares[0].sum(),
      shares[1].sum(),
      shares[2].sum(),
      -(shares[1] * log_n).sum(),
      -(shares[2] * log_d).sum(),
    ]
  )
  return float(value), gradient


def bootstrap(
  points: points_lib.Points,
  method: Method,
  *,
  num_resamples: int = 200,
  seed: int = 0,
) -> Estimate:
  """Fits, and fits again to points drawn with replacement.

  Raises:
    NoFitError: the points have no fit, or most resamples have none.
  """
  fit = method(points)
  again = _started_at(fit, points) if method is huber else method
  rng = np.random.default_rng(seed)
  drawn, num_failed = [], 0
  for _ in range(num_resamples):
    resample = points.at(rng.integers(0, len(points), len(points)))
    try:
      drawn.append(quantities(again(resample)))
    except NoFitError:
      num_failed += 1
  if num_failed * 2 > num_resamples:
    raise NoFitError(
      f'bootstrap: got {num_failed} of {num_resamples} resamples without a fit,'
      ' expected few; the points do not determine the law: add sizes and'
      ' budgets'
    )
  return Estimate(
    fit=fit,
    intervals={
      name: interval([values[name] for values in drawn])
      for name in quantities(fit)
    }
    if drawn
    else {},
    num_resamples=num_resamples,
    num_failed=num_failed,
  )


def interval(values) -> Interval:
  """Returns the percentile interval of bootstrap values."""
  low, high = np.quantile(values, [(1 - LEVEL) / 2, (1 + LEVEL) / 2])
  return Interval(
    low=float(low), high=float(high), error=float(np.std(values, ddof=1))
  )


def _started_at(fit: scaling_laws.Fit, points: points_lib.Points) -> Method:
  """Returns `huber`, started at the fit of all points, and at another."""
  few = _starts(points)[31:32]

  def again(resample):
    mean_n, mean_d = _scales(resample)
    start = [
      np.log(fit.floor),
      np.log(fit.params_scale) - fit.params_exponent * np.log(mean_n),
      np.log(fit.tokens_scale) - fit.tokens_exponent * np.log(mean_d),
      fit.params_exponent,
      fit.tokens_exponent,
    ]
    return huber(resample, np.vstack([[start], few]))

  return again


def _starts(points: points_lib.Points) -> np.ndarray:
  """Returns a grid of starts: exponents x shares of the mean loss."""
  mean = float(np.mean(np.log(points.losses)))
  shares = (0.8, 0.1, 0.1), (0.4, 0.4, 0.2), (0.4, 0.2, 0.4)
  exponents = (0.1, 0.3, 0.6, 1.0, 1.5)
  return np.array(
    [
      [*(mean + np.log(share)), alpha, beta]
      for share in shares
      for alpha in exponents
      for beta in exponents
    ]
  )


def _scales(points: points_lib.Points) -> tuple[float, float]:
  """Returns the geometric means of parameters and tokens."""
  return (
    float(np.exp(np.mean(np.log(points.params)))),
    float(np.exp(np.mean(np.log(points.tokens)))),
  )


def _logs(points, scales) -> tuple[np.ndarray, np.ndarray]:
  return np.log(points.params / scales[0]), np.log(points.tokens / scales[1])


def _unscaled(source: str, found, scales) -> scaling_laws.Fit:
  """Returns the law in the units of the points; refuses an invalid law."""
  floor, params_factor, tokens_factor, alpha, beta = map(float, found)
  named = {
    'A': params_factor,
    'B': tokens_factor,
    'alpha': alpha,
    'beta': beta,
  }
  for name, value in named.items():
    is_exponent = name in ('alpha', 'beta')
    least, most = (1.01 * _LEAST, 0.99 * _MOST) if is_exponent else (0, np.inf)
    if not (least < value < most):
      raise NoFitError(
        f'{source}: got {name} = {value:.3g} at the edge of the search,'
        f' expected a law with {name} between {least:.2g} and {most:.3g}; the'
        ' points do not determine it: add sizes, budgets, or leave out outliers'
      )
  return scaling_laws.Fit(
    source=source,
    floor=floor,
    params_scale=params_factor * scales[0] ** alpha,
    tokens_scale=tokens_factor * scales[1] ** beta,
    params_exponent=alpha,
    tokens_exponent=beta,
  )


def _check(points: points_lib.Points) -> None:
  """Refuses points that cannot determine five numbers."""
  for name, values in (
    ('models', points.losses),
    ('sizes', np.unique(points.params)),
    ('numbers of tokens', np.unique(points.tokens)),
  ):
    least = _NUM_UNKNOWN if name == 'models' else 3
    if len(values) < least:
      raise NoFitError(
        f'points: got {len(values)} different {name}, expected at least'
        f' {least} to fit the law; add runs'
      )
