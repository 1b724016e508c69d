"""Results of a sweep: the table, CSV and JSON, the best point, importance.

The interval of a trial is Student's, at 95 %, over its seeds. The optimum over
one numeric parameter is the vertex of a parabola through the best point and its
two neighbours (over the logarithm for a LogUniform). Its interval is a
bootstrap over seeds, which are paired across trials: a seed gives all trials
the same order of data.
"""

from collections.abc import Sequence
import csv
import dataclasses
import io
import json
import math
import pathlib
import statistics
from typing import Any

import numpy as np
from scipy import stats

from storage import atomic, code_commit
from studies.sweeps import store as store_lib
from training import experiment as experiment_lib, sweep as sweep_lib

LEVEL = 0.95
BEST, JSON = 'best.flags', 'results.json'
_RESAMPLES = 2000
# Below this share of usable resamples, the interval would be biased by the
# resamples that have a vertex.
_LEAST_USABLE = 0.9


@dataclasses.dataclass(frozen=True, kw_only=True)
class Optimum:
  """The best value of one numeric parameter, between the points tried."""

  parameter: str
  best: float
  # Bounds of the 95 % interval; None: one seed, or resamples without a vertex.
  low: float | None
  high: float | None
  value: float  # of the metric, at the vertex


@dataclasses.dataclass(frozen=True, kw_only=True)
class Results:
  """All results of a sweep."""

  sweep: sweep_lib.Sweep
  rows: tuple[store_lib.Row, ...]  # by point
  best: store_lib.Row | None  # None: no trial is complete and finite
  optimum: Optimum | None
  why_no_optimum: str
  importance: dict[str, float]


def half_width(values: Sequence[float]) -> float | None:
  """Returns half of the 95 % interval of a mean; None for a single value."""
  if len(values) < 2:
    return None
  quantile = float(stats.t.ppf((1 + LEVEL) / 2, len(values) - 1))
  return quantile * statistics.stdev(values) / math.sqrt(len(values))


def gather(store: store_lib.Store) -> Results:
  """Returns the results so far."""
  sweep, rows = store.sweep, tuple(store.rows())
  usable = complete(rows)
  sign = 1 if sweep.direction == 'minimize' else -1
  found, why_not = optimum(sweep, rows)
  return Results(
    sweep=sweep,
    rows=rows,
    best=min(usable, key=lambda row: sign * _value(row), default=None),
    optimum=found,
    why_no_optimum=why_not,
    importance=importance(store, usable),
  )


def complete(rows: Sequence[store_lib.Row]) -> list[store_lib.Row]:
  """Returns the trials with a finite value."""
  return [
    row
    for row in rows
    if row.state == 'complete' and math.isfinite(row.value or 0.0)
  ]


def _value(row: store_lib.Row) -> float:
  assert row.value is not None
  return row.value


def optimum(
  sweep: sweep_lib.Sweep, rows: Sequence[store_lib.Row]
) -> tuple[Optimum | None, str]:
  """Returns the optimum of the only parameter, or the reason for none."""
  if len(sweep.parameters) != 1:
    return None, 'more than one parameter'
  ((name, space),) = sweep.parameters.items()
  if isinstance(space, sweep_lib.Choice):
    return None, 'no range: the parameter is a Choice'
  usable = sorted(complete(rows), key=lambda row: row.params[name])
  if len({row.params[name] for row in usable}) < max(3, len(usable)):
    return None, 'fewer than three different points'
  is_log = isinstance(space, sweep_lib.LogUniform)
  x_P = np.array([float(row.params[name]) for row in usable])
  x_P = np.log(x_P) if is_log else x_P
  seeds = sorted(usable[0].seeds)
  losses_PS = np.array([[row.seeds[seed] for seed in seeds] for row in usable])
  if sweep.direction == 'maximize':
    losses_PS = -losses_PS
  found = vertex(x_P, losses_PS.mean(axis=1))
  if found is None:
    return None, 'the best point is at an edge of the range: widen it'
  at, value = found
  low, high = _bootstrap(x_P, losses_PS)
  if sweep.direction == 'maximize':
    value = -value
  back = math.exp if is_log else float
  return (
    Optimum(
      parameter=name,
      best=back(at),
      low=None if low is None else back(low),
      high=None if high is None else back(high),
      value=value,
    ),
    '',
  )


def vertex(x_P: np.ndarray, losses_P: np.ndarray) -> tuple[float, float] | None:
  """Returns the lowest point of the parabola through the best three points.

  Args:
    x_P: ascending.
    losses_P: finite.

  Returns:
    Its place and its height; None if the best point is at an edge.
  """
  best = int(np.argmin(losses_P))
  if best in (0, len(x_P) - 1):
    return None
  x_3 = x_P[best - 1 : best + 2] - x_P[best]
  a, b, c = np.polyfit(x_3, losses_P[best - 1 : best + 2], 2)
  if not a > 0:  # three equal losses
    return float(x_P[best]), float(losses_P[best])
  return float(x_P[best] - b / (2 * a)), float(c - b * b / (4 * a))


def _bootstrap(
  x_P: np.ndarray, losses_PS: np.ndarray
) -> tuple[float | None, float | None]:
  num_seeds = losses_PS.shape[1]
  if num_seeds < 2:
    return None, None
  rng = np.random.default_rng(0)
  drawn_RS = rng.integers(0, num_seeds, (_RESAMPLES, num_seeds))
  found = [vertex(x_P, losses_PS[:, s_S].mean(axis=1)) for s_S in drawn_RS]
  usable = [at for at in found if at is not None]
  if len(usable) < _LEAST_USABLE * _RESAMPLES:
    return None, None
  tail = (1 - LEVEL) / 2
  low, high = np.quantile([at for at, _ in usable], (tail, 1 - tail))
  return float(low), float(high)


def importance(
  store: store_lib.Store, usable: Sequence[store_lib.Row]
) -> dict[str, float]:
  """Returns the importance of each parameter for good trials, as a share.

  PED-ANOVA (Watanabe et al., arXiv:2304.10255): empty with fewer than two
  parameters, or fewer than four trials.
  """
  if len(store.sweep.parameters) < 2 or len(usable) < 4:
    return {}
  found = store_lib.optuna().importance
  with store_lib.without_warnings():
    shares = found.get_param_importances(
      store.study, evaluator=found.PedAnovaImportanceEvaluator()
    )
  return {name: float(share) for name, share in shares.items()}


def ranked(results: Results) -> list[store_lib.Row]:
  """Returns the trials, best first; trials without a value come last."""
  sign = 1 if results.sweep.direction == 'minimize' else -1
  order = {'complete': 0, 'pruned': 1}

  def key(row):
    value = math.inf if row.value is None else sign * row.value
    return order.get(row.state, 2), value, row.point

  return sorted(results.rows, key=key)


def summary(results: Results) -> list[str]:
  """Returns the best point, its uncertainty and the importances as lines."""
  metric, best = results.sweep.metric, results.best
  if best is None:
    return [all_failed(results)]
  lines = [
    f'best       trial {best.point}: {written(best.params)}: {metric}'
    f' {value_text(best)}'
  ]
  found = results.optimum
  if found is not None:
    interval = (
      f'95 % interval {found.low:.4g} to {found.high:.4g}, a bootstrap over'
      f' {len(best.seeds)} seeds'
      if found.low is not None and found.high is not None
      else 'no interval: too few seeds, or an optimum at the edge for some'
    )
    lines.append(
      f'optimum    {found.parameter} = {found.best:.4g} ({interval}); {metric}'
      f' {figure(found.value)} there, by a parabola'
    )
  elif len(results.sweep.parameters) == 1:
    lines.append(f'optimum    not between the points: {results.why_no_optimum}')
  num_errored = sum(row.state == 'errored' for row in results.rows)
  if num_errored:
    lines.append(
      f'errored    {num_errored} trials; --resume=errored runs them again'
    )
  if results.importance:
    shares = ', '.join(f'{k} {v:.0%}' for k, v in results.importance.items())
    lines.append(f'importance {shares}')
  return lines


def all_failed(results: Results) -> str:
  """Returns the line about a sweep without any usable trial."""
  diverged = [row for row in results.rows if row.note.startswith('diverged')]
  errored = [row for row in results.rows if row.state == 'errored']
  if errored and not diverged:
    return (
      f'error: got {len(errored)} errored trials and none that is complete,'
      f' expected one; the first says: {errored[0].note}'
    )
  return (
    f'error: got {len(diverged)} diverged trials and none with a finite'
    f' {results.sweep.metric}, expected one; lower the learning rates of the'
    ' sweep, lengthen the warm-up, or clip harder'
  )


def written(params: dict[str, Any]) -> str:
  """Returns a point as text."""
  return ', '.join(f'{name}={short(v)}' for name, v in params.items())


def rerun_flags(results: Results, config_flags: Sequence[str]) -> list[str]:
  """Returns the flags of train.py for the best point; [] without a best point.

  Args:
    config_flags: --config and its overrides, as given to the sweep. An override
      of a field that the sweep varies is left out.
  """
  if results.best is None:
    return []
  params = results.best.params
  kept = [
    flag
    for flag in config_flags
    if flag.partition('=')[0].removeprefix('--config.') not in params
  ]
  return [*kept, *(f'--config.{name}={v!s}' for name, v in params.items())]


def short(value: Any) -> str:
  """Returns a value of a parameter as text."""
  return f'{value:.4g}' if isinstance(value, float) else str(value)


def value_text(row: store_lib.Row) -> str:
  """Returns the mean of a trial with its interval as text."""
  if row.value is None:
    return '-'
  if not math.isfinite(row.value):
    return 'diverged'
  half = half_width(list(row.seeds.values()))
  if row.state != 'complete' or half is None:
    return figure(row.value)
  return f'{figure(row.value)} +- {figure(half)}'


def figure(value: float) -> str:
  """Returns a value of the metric as text; speeds have no decimals."""
  return f'{value:.0f}' if abs(value) >= 1000 else f'{value:.4f}'


def save(
  results: Results,
  experiment: experiment_lib.Experiment,
  workdir: pathlib.Path,
  rerun: Sequence[str] = (),
) -> None:
  """Writes results.csv, results.json and best.flags into the workdir.

  Args:
    rerun: the result of `rerun_flags`.
  """
  names = list(results.sweep.parameters)
  seeds = sorted({seed for row in results.rows for seed in row.seeds}, key=int)
  metric = results.sweep.metric
  text = io.StringIO()
  table = csv.writer(text, lineterminator='\n')
  table.writerow(
    [
      *('trial', 'state', *names, metric, f'{metric}_half_width'),
      *(f'{metric}_seed{seed}' for seed in seeds),
      'note',
    ]
  )
  for row in results.rows:
    half = half_width(list(row.seeds.values()))
    table.writerow(
      [
        *(row.point, row.state, *(row.params.get(name) for name in names)),
        *(row.value, half if row.state == 'complete' else None),
        *(row.seeds.get(seed) for seed in seeds),
        row.note,
      ]
    )
  atomic.write_text(workdir / 'results.csv', text.getvalue())
  found = results.optimum
  described = {
    'sweep': results.sweep.to_dict(),
    'trials': [
      dataclasses.asdict(row) | {'value': _finite(row.value)}
      for row in results.rows
    ],
    'best': None if results.best is None else results.best.point,
    'optimum': None if found is None else dataclasses.asdict(found),
    'importance': results.importance,
    'config': experiment.to_dict(),
    'commit': code_commit.find(),
  }
  atomic.write_text(workdir / JSON, json.dumps(described, indent=2) + '\n')
  _save_flags(rerun, workdir / BEST)


def _save_flags(rerun: Sequence[str], path: pathlib.Path) -> None:
  """Writes the flags of the best point, one a line; none: no file."""
  if rerun:
    atomic.write_text(path, ''.join(f'{flag}\n' for flag in rerun))
  else:
    path.unlink(missing_ok=True)


def _finite(value: float | None) -> float | str | None:
  # JSON has no infinity.
  return value if value is None or math.isfinite(value) else 'diverged'
