"""Tables and figures of a scaling study, from its points."""

from collections.abc import Mapping, Sequence

import numpy as np

from studies.common import figure
from studies.scaling import (
  held_out,
  parabolas,
  parametric,
  points as points_lib,
)
from training.planning import scaling_laws

METHODS = {
  'variable projection': parametric.project,
  'Huber, L-BFGS': parametric.huber,
}


def estimates(
  points: points_lib.Points, num_resamples: int, seed: int = 0
) -> tuple[dict[str, parametric.Estimate], dict[str, str]]:
  """Returns the fit of each method with its intervals, and the failures."""
  found, failed = {}, {}
  for name, method in METHODS.items():
    try:
      found[name] = parametric.bootstrap(
        points, method, num_resamples=num_resamples, seed=seed
      )
    except parametric.NoFitError as error:
      failed[name] = str(error)
  return found, failed


def fits_table(found: Mapping[str, parametric.Estimate]) -> str:
  """Returns the numbers of each fit with intervals at 95 %."""
  lines = [
    f'| quantity | {" | ".join(found)} |',
    f'|---|{"---|" * len(found)}',
  ]
  for name in parametric.quantities(scaling_laws.HOFFMANN):
    cells = []
    for estimate in found.values():
      value = parametric.quantities(estimate.fit)[name]
      inside = estimate.intervals.get(name)
      cells.append(
        f'{value:.4g}'
        if inside is None
        else f'{value:.4g} [{inside.low:.4g}, {inside.high:.4g}]'
      )
    lines.append(f'| {name} | {" | ".join(cells)} |')
  for name, estimate in found.items():
    if estimate.num_failed:
      lines.append(
        f'{name}: {estimate.num_failed} of {estimate.num_resamples} resamples'
        ' had no fit; the intervals leave them out and are too narrow'
      )
  return '\n'.join(lines)


def misfit_table(
  points: points_lib.Points, laws: Mapping[str, scaling_laws.Fit]
) -> str:
  """Returns how well each law describes the points."""
  lines = [
    '| law | Huber loss of log L | mean error of L | mean of predicted -'
    ' measured |',
    '|---|---|---|---|',
  ]
  for name, law in laws.items():
    residuals = parametric.predict(law, points) - points.losses
    lines.append(
      f'| {name} | {parametric.misfit(law, points):.3e} |'
      f' {np.abs(residuals).mean():.4f} | {residuals.mean():+.4f} |'
    )
  return '\n'.join(lines)


def isoflop_table(
  points: points_lib.Points, law: scaling_laws.Fit, num_resamples: int
) -> str:
  """Returns the minima of the parabolas beside the optima of the law."""
  power = parabolas.fit(points)
  inside = parabolas.bootstrap(points, num_resamples=num_resamples)
  bias = parabolas.bias(law, points)
  lines = [
    '| budget, FLOPs | sizes | N_opt, parabola | N_opt, law | difference | of'
    ' it bias of the parabola | tokens/parameter, law |',
    '|---|---|---|---|---|---|---|',
  ]
  for each in power.parabolas:
    best, tokens = law.optimum(each.budget)
    outside = '' if each.is_inside else ' (outside the sizes)'
    lines.append(
      f'| {each.budget:.3g} | {len(each.residuals)} |'
      f' {each.best_params:.4g}{outside} | {best:.4g} |'
      f' {each.best_params / best - 1:+.1%} |'
      f' {bias.best_params[each.budget]:+.1%} | {tokens / best:.1f} |'
    )
  own = parametric.quantities(law)['a']
  lines.append(
    f'exponent a: parabolas {power.exponent:.3f} [{inside.low:.3f},'
    f' {inside.high:.3f}], of it bias {bias.exponent:+.3f}; law {own:.3f}'
  )
  return '\n'.join(lines)


def held_out_lines(points: points_lib.Points) -> str:
  """Returns the error of each method on the largest budget."""
  lines = []
  for name, method in METHODS.items():
    try:
      found = held_out.predict_largest(points, method)
    except parametric.NoFitError as error:
      lines.append(f'held out, {name}: {error}')
      continue
    lines.append(
      f'held out, {name}: {found.budget:.3g} FLOPs'
      f' ({found.times_larger:.1f} times the largest fitted budget) predicted'
      f' with a mean error of {found.error:.4f} nats'
      f' ({found.relative_error:.2%} of the loss), mean of predicted -'
      f' measured {found.bias:+.4f}; error on the fitted budgets'
      f' {found.fitted_error:.4f}'
    )
  return '\n'.join(lines)


def fit_panels(
  points: points_lib.Points, law: scaling_laws.Fit
) -> list[figure.Panel]:
  """Returns measured over predicted loss."""
  predicted = parametric.predict(law, points)
  ends = [float(points.losses.min()), float(points.losses.max())]
  return [
    figure.Panel(
      title=f'{len(points)} models',
      x_label='loss of the law, nats per token',
      y_label='measured loss, nats per token',
      lines={
        'models': figure.Line(
          x=predicted.tolist(), y=points.losses.tolist(), style='.'
        ),
        'equal': figure.Line(x=ends, y=ends),
      },
    )
  ]


def isoflop_panels(
  points: points_lib.Points, law: scaling_laws.Fit
) -> list[figure.Panel]:
  """Returns the losses of each budget with their parabolas, and the optima."""
  power = parabolas.fit(points)
  lines = {}
  for i, each in enumerate(power.parabolas):
    of = points.at(points.flops == each.budget)
    order = np.argsort(of.params)
    x = np.geomspace(of.params.min(), of.params.max(), 50)
    lines[f'{each.budget:.2g} FLOPs'] = figure.Line(
      x=of.params[order].tolist(),
      y=of.losses[order].tolist(),
      style='o',
      colour=f'C{i}',
    )
    lines[f'_parabola {each.budget:.2g}'] = figure.Line(
      x=x.tolist(), y=each.loss(x).tolist(), colour=f'C{i}'
    )
  return [
    figure.Panel(
      title='loss at equal training FLOPs',
      x_label='parameters N',
      y_label='validation loss, nats per token',
      lines=lines,
      log_x=True,
      log_base=10,
    ),
    optimum_panel(power, law),
  ]


def optimum_panel(
  power: parabolas.PowerLaw, law: scaling_laws.Fit
) -> figure.Panel:
  """Returns the best size over the budget, by both methods."""
  budgets: Sequence[float] = [each.budget for each in power.parabolas]
  return figure.Panel(
    title='compute-optimal size',
    x_label='training FLOPs',
    y_label='parameters N',
    lines={
      'minima of parabolas': figure.Line(
        x=budgets, y=[p.best_params for p in power.parabolas], style='o'
      ),
      f'power law, a = {power.exponent:.2f}': figure.Line(
        x=budgets, y=[power.best_params(c) for c in budgets]
      ),
      f'law, a = {parametric.quantities(law)["a"]:.2f}': figure.Line(
        x=budgets, y=[law.optimum(c)[0] for c in budgets], style='--'
      ),
    },
    log_x=True,
    log_y=True,
    log_base=10,
  )
