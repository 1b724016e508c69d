"""The figures of a sweep: by parameter, parallel coordinates, importance."""

from collections.abc import Callable
import dataclasses
import math
from typing import Any

from studies.sweeps import store as store_lib
from studies.sweeps.reporting import results as results_lib
from training import sweep as sweep_lib
from training.reporting import report_figures
from training.reporting.page import charts

_SHOWN = 'complete', 'pruned'


@dataclasses.dataclass(frozen=True, kw_only=True)
class Figure:
  """A figure with its words, as it stands in the page and as a file."""

  name: str  # of the file
  title: str
  caption: str
  svg: Callable[..., str]  # takes is_file
  is_whole: bool = False  # as wide as the page


def of_results(results: results_lib.Results) -> list[Figure]:
  """Returns the figures of a sweep; none before a trial is complete."""
  usable = results_lib.complete(results.rows)
  if not usable:
    return []
  seeds = results.sweep.num_seeds
  found = [
    Figure(
      name=f'by_{name.replace(".", "_")}',
      title=f'{results.sweep.metric} by {name}.',
      caption=f'Mean over {seeds} seeds'
      + (" with 95 % intervals (Student's)." if seeds > 1 else '.')
      + _words_of_optimum(results),
      svg=lambda is_file=False, name=name: charts.svg(
        _by_parameter(results, name), is_file=is_file
      ),
    )
    for name in results.sweep.parameters
  ]
  if len(results.sweep.parameters) > 1:
    found.append(
      Figure(
        name='parallel',
        title='Parallel coordinates.',
        caption='A line for each complete trial; stronger is better, and the'
        ' best one is dashed.',
        svg=lambda is_file=False: _parallel(results, is_file=is_file),
        is_whole=True,
      )
    )
  if results.importance:
    shares = sorted(results.importance.items(), key=lambda item: -item[1])
    rows = [(name, share, '') for name, share in shares]
    found.append(
      Figure(
        name='importance',
        title='Importance.',
        caption='Share of each parameter in what makes trials good, by'
        ' PED-ANOVA (arXiv:2304.10255).',
        svg=lambda is_file=False: report_figures.shares(
          'Importance of the parameters', rows, is_file=is_file
        ),
        is_whole=True,
      )
    )
  return found


def _words_of_optimum(results: results_lib.Results) -> str:
  found = results.optimum
  if found is None:
    return ''
  interval = '' if found.low is None else ' with its 95 % interval'
  return f' The line is the optimum{interval}.'


def _by_parameter(results: results_lib.Results, name: str) -> charts.Chart:
  """Returns the metric against one parameter, a point for each trial."""
  sweep = results.sweep
  space = sweep.parameters[name]
  is_named = any(row.state == 'pruned' for row in results.rows)
  series = [_points(results, name, state, is_named) for state in _SHOWN]
  found = results.optimum
  marks = (
    []
    if found is None or found.parameter != name
    else [charts.Mark(at=found.best, low=found.low, high=found.high)]
  )
  return charts.Chart(
    title=f'{sweep.metric} by {name}',
    x=charts.Axis(
      label=name,
      is_log=isinstance(space, sweep_lib.LogUniform),
      is_whole=isinstance(space, sweep_lib.Integer),
      names=list(map(str, space.values))
      if isinstance(space, sweep_lib.Choice)
      else (),
    ),
    y=charts.Axis(label=_unit(sweep.metric)),
    series=[each for each in series if each.x],
    marks=marks,
  )


def _points(
  results: results_lib.Results, name: str, state: str, is_named: bool
) -> charts.Series:
  """Returns the trials of a state: complete, or pruned as rings."""
  space = results.sweep.parameters[name]
  rows = [row for row in results.rows if row.state == state]
  kept = [
    (row, value)
    for row in rows
    if (value := _last(row)) is not None and math.isfinite(value)
  ]
  halves = [
    results_lib.half_width(list(row.seeds.values())) or 0.0
    if state == 'complete'
    else 0.0
    for row, _ in kept
  ]
  label = 'complete' if state == 'complete' else 'pruned, last evaluation'
  return charts.Series(
    label=label if is_named else '',
    x=[_place(space, row.params[name]) for row, _ in kept],
    y=[value for _, value in kept],
    low=[v - h for (_, v), h in zip(kept, halves, strict=True)],
    high=[v + h for (_, v), h in zip(kept, halves, strict=True)],
    is_joined=False,
    is_hollow=state == 'pruned',
    notes=[
      f'trial {row.point}: {results_lib.written(row.params)}:'
      f' {results_lib.value_text(row)}'
      for row, _ in kept
    ],
  )


def _last(row: store_lib.Row) -> float | None:
  """Returns the value of a trial, or the last one before it was pruned."""
  if row.state == 'pruned' and row.intermediate:
    return row.intermediate[max(row.intermediate)]
  return row.value


def _unit(metric: str) -> str:
  units = {
    'loss': 'validation loss, nats per token',
    'bits_per_byte': 'bits per byte',
    'tokens_per_s': 'tokens per second',
    'seconds_per_step': 'seconds per step',
  }
  return units.get(metric, metric)


def _place(space: sweep_lib.Space, value: Any) -> float:
  if isinstance(space, sweep_lib.Choice):
    return float(space.values.index(value))
  return float(value)


def _parallel(results: results_lib.Results, *, is_file: bool) -> str:
  """Draws one vertical axis for each parameter and one for the metric."""
  sweep = results.sweep
  sign = 1 if sweep.direction == 'minimize' else -1
  rows = results_lib.complete(results.rows)
  rows = sorted(rows, key=lambda row: -sign * (row.value or 0.0))  # best last
  values = [row.value or 0.0 for row in rows]
  names = list(sweep.parameters)
  spans = [_span(sweep.parameters[name]) for name in names]
  ends = min(values), max(values)
  spans.append((*ends, [f'{value:.4g}' for value in ends]))
  width, top, bottom = 860, 30, 250
  gap = (width - 160) / max(len(spans) - 1, 1)
  parts = []
  for i, (name, (_, _, words)) in enumerate(
    zip([*names, sweep.metric], spans, strict=True)
  ):
    x = 80 + gap * i
    parts.append(f'<path class="axis" d="M{x:.1f} {top}V{bottom}"/>')
    for y, text in ((top - 8, words[1]), (bottom + 16, words[0])):
      parts.append(charts.text(x, y, text, anchor='middle', kind='soft'))
    parts.append(charts.text(x, bottom + 36, name, anchor='middle'))
  for rank, row in enumerate(rows):
    shares = [
      _share(_log(sweep.parameters[name], row.params[name]), low, high)
      for name, (low, high, _) in zip(names, spans, strict=False)
    ]
    shares.append(_share(row.value or 0.0, *ends))
    path = 'M' + 'L'.join(
      f'{80 + gap * i:.1f} {bottom - share * (bottom - top):.1f}'
      for i, share in enumerate(shares)
    )
    is_best = rank == len(rows) - 1
    strength = 0.15 + 0.7 * rank / max(len(rows) - 1, 1)
    kind = 's1 line' if is_best else 's0 line'
    style = 'stroke-dasharray="7 3"' if is_best else f'opacity="{strength:.2f}"'
    note = f'trial {row.point}: {results_lib.value_text(row)}'
    parts.append(
      f'<path class="{kind}" {style} d="{path}"><title>{note}</title></path>'
    )
  return charts.element(
    ''.join(parts), 'Parallel coordinates', width, 296, is_file=is_file
  )


def _log(space: sweep_lib.Space, value: Any) -> float:
  place = _place(space, value)
  is_log = isinstance(space, sweep_lib.LogUniform)
  return math.log(place) if is_log else place


def _span(space: sweep_lib.Space) -> tuple[float, float, list[str]]:
  if isinstance(space, sweep_lib.Choice):
    ends = space.values[0], space.values[-1]
  else:
    ends = space.low, space.high
  low, high = (_log(space, end) for end in ends)
  return low, high, [results_lib.short(end) for end in ends]


def _share(value: float, low: float, high: float) -> float:
  return (value - low) / (high - low) if high > low else 0.5
