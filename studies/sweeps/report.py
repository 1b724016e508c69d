"""report.html of a sweep: one file that needs no other, for screen and print.

It has the best point, figures, the table of all trials, the config and where it
all came from. Figures are SVG inside the page; no script, no other host.
"""

import datetime
import html
import io
import json
import math
import pathlib
from typing import Any

import numpy as np

from storage import atomic, code_commit
from studies.sweeps import results as results_lib, store as store_lib
from training import experiment as experiment_lib, sweep as sweep_lib

_STYLE = """
body { font: 15px/1.5 system-ui, sans-serif; color: #1a1a1a; background: #fff;
  max-width: 62rem; margin: 2rem auto; padding: 0 1rem; }
h1 { font-size: 1.5rem; } h2 { font-size: 1.15rem; margin-top: 2rem; }
table { border-collapse: collapse; font-variant-numeric: tabular-nums; }
th, td { text-align: left; padding: .2rem .8rem .2rem 0;
  border-bottom: 1px solid #ddd; vertical-align: top; }
tr.best td { font-weight: 600; }
.wide { overflow-x: auto; } svg { max-width: 100%; height: auto; }
pre { font-size: 12px; background: #f6f6f6; padding: .8rem; overflow-x: auto; }
@media print { body { margin: 0; max-width: none; } details { display: none; } }
"""
_FONT = {'svg.fonttype': 'none', 'svg.hashsalt': 'two-lives', 'font.size': 9}
_LEVELS = ('complete', 'pruned')
_MOST_COLUMNS = 3  # of panels beside each other


def save(
  results: results_lib.Results,
  experiment: experiment_lib.Experiment,
  workdir: pathlib.Path,
  place: str,
) -> None:
  """Writes report.html.

  Args:
    place: of the storage, without a password.

  Raises:
    ValueError: matplotlib is not installed.
  """
  sweep = results.sweep
  parts = [f'<h1>Sweep {html.escape(sweep.name)}</h1>', _summary(results)]
  if results_lib.complete(results.rows):
    parts += [
      '<h2>By parameter</h2>',
      f'<p>Mean over {sweep.num_seeds} seeds; bars are 95 % intervals'
      " (Student's), where there are several seeds. Hollow: pruned, at its"
      ' last evaluation.</p>',
      _svg(_by_parameter, results),
    ]
    if len(sweep.parameters) > 1:
      parts += [
        '<h2>Parallel coordinates</h2>',
        '<p>One line for each complete trial; darker is better.</p>',
        _svg(_parallel, results),
      ]
    if results.importance:
      parts += [
        '<h2>Importance</h2>',
        '<p>Share of each parameter in what makes trials good, by PED-ANOVA'
        ' (arXiv:2304.10255).</p>',
        _svg(_importance, results),
      ]
  parts += ['<h2>Trials</h2>', _table(results), _lineage(results, place)]
  for title, value in (
    ('Sweep', sweep.to_dict()),
    ('Experiment', experiment.to_dict()),
  ):
    text = html.escape(json.dumps(value, indent=2))
    parts.append(
      f'<details><summary>{title}, all fields</summary><pre>{text}</pre>'
      '</details>'
    )
  page = (
    '<!doctype html><html lang="en"><head><meta charset="utf-8">'
    '<meta name="viewport" content="width=device-width, initial-scale=1">'
    f'<title>Sweep {html.escape(sweep.name)}</title><style>{_STYLE}</style>'
    f'</head><body>{"".join(parts)}</body></html>\n'
  )
  atomic.write_text(workdir / 'report.html', page)


def _summary(results: results_lib.Results) -> str:
  lines = results_lib.summary(results)
  return '<ul>' + ''.join(f'<li>{html.escape(x)}</li>' for x in lines) + '</ul>'


def _table(results: results_lib.Results) -> str:
  names = list(results.sweep.parameters)
  head = ['trial', 'state', *names, f'{results.sweep.metric}, 95 %', 'note']
  lines = [_cells('th', head)]
  for row in results_lib.ranked(results):
    is_best = results.best is not None and row.point == results.best.point
    values = [
      row.point,
      row.state,
      *(results_lib.short(row.params.get(name, '')) for name in names),
      results_lib.value_text(row).replace('+-', '±'),
      row.note,
    ]
    lines.append(_cells('td', values, 'best' if is_best else ''))
  return f'<div class="wide"><table>{"".join(lines)}</table></div>'


def _cells(tag: str, values: list[Any], kind: str = '') -> str:
  cells = ''.join(f'<{tag}>{html.escape(str(v))}</{tag}>' for v in values)
  return f'<tr class="{kind}">{cells}</tr>'


def _lineage(results: results_lib.Results, place: str) -> str:
  rows = [
    ('made', datetime.datetime.now().astimezone().isoformat('T', 'minutes')),
    ('commit of the code', code_commit.find()),
    ('storage', place),
    ('study', results.sweep.name),
    ('metric', f'{results.sweep.metric} ({results.sweep.direction})'),
  ]
  cells = ''.join(_cells('td', list(row)) for row in rows)
  return f'<h2>Lineage</h2><table>{cells}</table>'


# ------------------------------------------------------------------------------
# Figures.


def _svg(draw, results: results_lib.Results) -> str:
  """Returns a figure as an svg element."""
  try:
    import matplotlib
    from matplotlib import figure as matplotlib_figure
  except ModuleNotFoundError:
    raise ValueError(
      'report.html: got no matplotlib, expected it to be installed; run pip'
      ' install -r requirements-plot.txt'
    ) from None
  settings: dict[Any, Any] = _FONT
  with matplotlib.rc_context(settings):
    # Without pyplot, which would look for a display and keep every figure.
    drawn = matplotlib_figure.Figure(layout='constrained')
    draw(drawn, results)
    text = io.StringIO()
    drawn.savefig(text, format='svg', metadata={'Date': None})
  return text.getvalue()[text.getvalue().index('<svg') :]


def _last(row: store_lib.Row) -> float | None:
  """Returns the value of a trial, or the last one before it was pruned."""
  if row.state == 'pruned' and row.intermediate:
    return row.intermediate[max(row.intermediate)]
  return row.value


def _by_parameter(drawn, results: results_lib.Results) -> None:
  sweep = results.sweep
  names = list(sweep.parameters)
  columns = min(len(names), _MOST_COLUMNS)
  lines = -(-len(names) // columns)
  drawn.set_size_inches(1 + 3.2 * columns, 2.9 * lines)
  grid = np.ravel(drawn.subplots(lines, columns, sharey=True, squeeze=False))
  for axes in grid[len(names) :]:
    axes.set_visible(False)
  for name, axes in zip(names, grid, strict=False):
    space = sweep.parameters[name]
    for row in results.rows:
      value = _last(row)
      if value is None or not math.isfinite(value) or row.state not in _LEVELS:
        continue
      half = results_lib.half_width(list(row.seeds.values()))
      is_whole = row.state == 'complete'
      axes.errorbar(
        _place(space, row.params[name]),
        value,
        yerr=half if is_whole and half else None,
        fmt='o',
        color='#1f4e8c',
        mfc='#1f4e8c' if is_whole else 'none',
        ms=4,
        lw=1,
        capsize=2,
      )
    _scale(axes, space)
    axes.set_xlabel(name)
    axes.grid(alpha=0.3)
  if (found := results.optimum) is not None:
    grid[0].axvline(found.best, color='#b3401f', lw=1)
    if found.low is not None and found.high is not None:
      grid[0].axvspan(found.low, found.high, color='#b3401f', alpha=0.15, lw=0)
  for axes in grid[::columns]:
    axes.set_ylabel(_unit(sweep.metric))


def _unit(metric: str) -> str:
  units = {
    'loss': 'validation loss, nats per token',
    'bits_per_byte': 'bits per byte',
  }
  return units.get(metric, metric)


def _place(space: sweep_lib.Space, value: Any) -> float:
  if isinstance(space, sweep_lib.Choice):
    return float(space.values.index(value))
  return float(value)


def _scale(axes, space: sweep_lib.Space) -> None:
  if isinstance(space, sweep_lib.LogUniform):
    axes.set_xscale('log')
  if isinstance(space, sweep_lib.Integer):
    axes.xaxis.get_major_locator().set_params(integer=True)
  if isinstance(space, sweep_lib.Choice):
    axes.set_xticks(range(len(space.values)), map(str, space.values))
    axes.set_xlim(-0.5, len(space.values) - 0.5)


def _parallel(drawn, results: results_lib.Results) -> None:
  """Draws one vertical axis for each parameter and one for the metric."""
  import matplotlib

  sweep, rows = results.sweep, results_lib.complete(results.rows)
  sign = 1 if sweep.direction == 'minimize' else -1
  rows = sorted(rows, key=lambda row: -sign * (row.value or 0.0))  # best on top
  names = list(sweep.parameters)
  drawn.set_size_inches(1.6 + 1.9 * len(names), 3.4)
  axes = drawn.subplots()
  values = [row.value or 0.0 for row in rows]
  colors = matplotlib.colormaps['viridis_r']
  spans = [_span(sweep.parameters[name]) for name in names]
  spans.append((min(values), max(values), [f'{v:.4g}' for v in _ends(values)]))
  for rank, row in enumerate(rows):
    heights = [
      _share(_log(sweep.parameters[name], row.params[name]), low, high)
      for name, (low, high, _) in zip(names, spans, strict=False)
    ]
    heights.append(_share(row.value or 0.0, *spans[-1][:2]))
    axes.plot(
      range(len(heights)),
      heights,
      color=colors(rank / max(len(rows) - 1, 1)),
      lw=1.2,
      alpha=0.8,
    )
  for x, (_, _, ends) in enumerate(spans):
    axes.axvline(x, color='#555', lw=0.8)
    for y, text, up in ((0, ends[0], 'top'), (1, ends[1], 'bottom')):
      axes.text(x, y + (y - 0.5) * 0.04, text, ha='center', va=up)
  axes.set_xticks(range(len(spans)), [*names, sweep.metric])
  axes.tick_params(axis='x', length=0, pad=16)
  axes.set_yticks([])
  axes.set_ylim(-0.02, 1.02)
  for side in axes.spines.values():
    side.set_visible(False)


def _ends(values: list[float]) -> tuple[float, float]:
  return min(values), max(values)


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


def _importance(drawn, results: results_lib.Results) -> None:
  shares = sorted(results.importance.items(), key=lambda item: item[1])
  drawn.set_size_inches(5.5, 0.7 + 0.35 * len(shares))
  axes = drawn.subplots()
  bars = axes.barh(
    [name for name, _ in shares],
    [share for _, share in shares],
    color='#1f4e8c',
  )
  axes.bar_label(bars, [f'{share:.0%}' for _, share in shares], padding=3)
  axes.set_xlim(0, 1.1)
  axes.set_xlabel('importance, share of 1')
