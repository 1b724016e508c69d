"""Line charts for the notebook, saved as small SVG files, or as PNG.

Text stays text and ids are fixed. The same numbers give the same file, so that
a change of numbers shows in a diff.
"""

from collections.abc import Mapping, Sequence
import dataclasses
import os
import pathlib
from typing import Any

import numpy as np

FORMATS = '.svg', '.png'


@dataclasses.dataclass(frozen=True, kw_only=True)
class Line:
  """One line: its points, and the range of values around each point."""

  x: Sequence[float]
  y: Sequence[float]
  low: Sequence[float] | None = None  # shaded between low and high
  high: Sequence[float] | None = None
  style: str = '-'  # matplotlib's; 'o' draws points without a line
  width: float = 1.0  # points
  colour: str | None = None  # matplotlib's; None: the next one of its cycle


@dataclasses.dataclass(frozen=True, kw_only=True)
class Panel:
  """One pair of axes, and its lines by label; '_' hides one from the legend."""

  title: str
  x_label: str
  y_label: str
  lines: Mapping[str, Line]
  log_x: bool = False
  log_y: bool = False
  log_base: int = 2  # of the ticks of logarithmic axes
  y_limits: tuple[float, float] | None = None


def save(
  path: str | os.PathLike, panels: Sequence[Panel], *, share_y: bool = True
) -> None:
  """Draws panels side by side into an SVG file, or a PNG if the path says so.

  Args:
    path: its suffix is the format: .svg or .png.
    panels: from left to right.
    share_y: whether all panels have one y axis.

  Raises:
    ValueError: matplotlib is not installed, a panel has no lines, or the path
      has another suffix.
  """
  suffix = pathlib.PurePath(path).suffix
  if suffix not in FORMATS:
    raise ValueError(
      f'figure: got {os.fspath(path)!r}, expected a name that ends in'
      f' {" or ".join(FORMATS)}'
    )
  if not panels or not all(panel.lines for panel in panels):
    raise ValueError(
      'figure: got a panel without lines, expected at least one in each'
    )
  try:
    import matplotlib
    from matplotlib import figure as matplotlib_figure
  except ModuleNotFoundError:
    raise ValueError(
      'figure: got no matplotlib, expected it to be installed; run pip install'
      ' -r requirements-plot.txt'
    ) from None
  settings: dict[Any, Any] = {
    'svg.fonttype': 'none',
    'svg.hashsalt': 'two-lives',
    'font.size': 9,
    'path.simplify_threshold': 0.5,
  }
  with matplotlib.rc_context(settings):
    # Without pyplot, which would look for a display and keep every figure.
    drawn = matplotlib_figure.Figure(
      figsize=(1 + 4 * len(panels), 3.4), layout='constrained'
    )
    all_axes = np.ravel(drawn.subplots(1, len(panels), sharey=share_y))
    for axes, panel in zip(all_axes, panels, strict=True):
      _draw(axes, panel)
    metadata = {'Date': None} if suffix == '.svg' else {'Software': None}
    drawn.savefig(path, format=suffix[1:], dpi=150, metadata=metadata)


def _draw(axes, panel: Panel) -> None:
  from matplotlib import ticker

  for label, line in panel.lines.items():
    (drawn,) = axes.plot(
      line.x,
      line.y,
      line.style,
      label=label,
      linewidth=line.width,
      color=line.colour,
    )
    if line.low is not None and line.high is not None:
      axes.fill_between(
        line.x, line.low, line.high, color=drawn.get_color(), alpha=0.2, lw=0
      )
  if panel.log_x:
    axes.set_xscale('log', base=panel.log_base)
  if panel.log_y:
    axes.set_yscale('log', base=panel.log_base)
  if panel.log_base == 10:
    # The labels of all nine minor ticks would overlap.
    for axis, is_log in ((axes.xaxis, panel.log_x), (axes.yaxis, panel.log_y)):
      if is_log:
        axis.set_major_locator(ticker.LogLocator(10, subs=(1, 2, 5)))
        axis.set_minor_formatter(ticker.NullFormatter())
  if panel.y_limits:
    axes.set_ylim(*panel.y_limits)
  axes.set_title(panel.title)
  axes.set_xlabel(panel.x_label)
  axes.set_ylabel(panel.y_label)
  axes.grid(alpha=0.3)
  axes.legend(fontsize=8)
