"""Charts as SVG text, with no library: for report.html, and as files.

A chart is plain values (`Chart`, of `Series`); `svg` draws it. Colours are
classes of `STYLE`, so that a page can be light, dark or printed. Each series
also has its own dash, because some readers cannot tell colours apart. A chart
with few points shows the numbers of each point as a tooltip (`title`).
"""

from collections.abc import Sequence
import dataclasses
import html
import math

from training.reporting.page import ticks

# One colour per series, of 4.5 : 1 or more against the paper.
STYLE = """
svg.chart { font: 12px system-ui, sans-serif; }
svg.chart text { fill: #20262a; } svg.chart .soft { fill: #5a6165; }
svg.chart .grid { stroke: #e4dfd3; } svg.chart .axis { stroke: #8a8473; }
svg.chart .line { fill: none; stroke-width: 1.6; stroke-linejoin: round; }
svg.chart .band { stroke: none; opacity: .16; }
svg.chart .paper { fill: #fffdf8; }
svg.chart .s0 { stroke: #17636a; fill: #17636a; }
svg.chart .s1 { stroke: #9a4220; fill: #9a4220; }
svg.chart .s2 { stroke: #6a3f9c; fill: #6a3f9c; }
svg.chart .s3 { stroke: #4f6410; fill: #4f6410; }
svg.chart .line { fill: none; } svg.chart .hollow { fill: #fffdf8; }
"""
DARK = """
svg.chart text { fill: #e9e4d8; } svg.chart .soft { fill: #a5a89f; }
svg.chart .grid { stroke: #343b3c; } svg.chart .axis { stroke: #767d7c; }
svg.chart .paper { fill: #1d2223; }
svg.chart .s0 { stroke: #7cc7c4; fill: #7cc7c4; }
svg.chart .s1 { stroke: #e89a72; fill: #e89a72; }
svg.chart .s2 { stroke: #bda2ec; fill: #bda2ec; }
svg.chart .s3 { stroke: #b5c667; fill: #b5c667; }
svg.chart .line { fill: none; } svg.chart .hollow { fill: #1d2223; }
"""
_DASHES = '', '7 3', '2 3', '9 3 2 3'
WIDTH, HEIGHT = 470, 270
_LEFT, _RIGHT, _TOP, _BOTTOM = 58, 14, 44, 40
_MOST_TOOLTIPS = 60  # most points of a line that get tooltips
_ROOM = 0.04  # empty share of an axis, beyond the values


@dataclasses.dataclass(frozen=True, kw_only=True)
class Series:
  """Points, joined or not, and the range around each."""

  label: str
  x: Sequence[float]
  y: Sequence[float]
  low: Sequence[float] | None = None  # a band, or error bars of points
  high: Sequence[float] | None = None
  is_joined: bool = True
  is_hollow: bool = False  # points as rings
  colour: int = 0  # index into the colours of STYLE
  notes: Sequence[str] = ()  # tooltips; empty: the numbers


@dataclasses.dataclass(frozen=True, kw_only=True)
class Axis:
  """One axis: its label with the unit, its scale and its ends."""

  label: str
  is_log: bool = False
  low: float | None = None  # None: taken from the values
  high: float | None = None
  names: Sequence[str] = ()  # for the places 0, 1, ..., in place of numbers
  is_whole: bool = False  # numbers without fractions


@dataclasses.dataclass(frozen=True, kw_only=True)
class Mark:
  """A vertical line, with an interval around it."""

  at: float
  low: float | None = None
  high: float | None = None
  colour: int = 1


@dataclasses.dataclass(frozen=True, kw_only=True)
class Chart:
  """One pair of axes."""

  title: str  # a screen reader reads it in place of the picture
  x: Axis
  y: Axis
  series: Sequence[Series]
  marks: Sequence[Mark] = ()


@dataclasses.dataclass(frozen=True, kw_only=True)
class _Scale:
  """The map from a value to its place in the picture, in pixels."""

  low: float
  high: float
  start: float
  end: float
  is_log: bool

  def __call__(self, value: float) -> float:
    low, high = self.low, self.high
    if self.is_log:
      value, low, high = (math.log(max(v, 1e-300)) for v in (value, low, high))
    share = (value - low) / (high - low)
    return round(self.start + share * (self.end - self.start), 1)

  def ticks(self, most: int) -> list[float]:
    """Returns round values on the axis."""
    place = ticks.logarithmic if self.is_log else ticks.linear
    return place(self.low, self.high, most)


def svg(chart: Chart, *, is_file: bool = False) -> str:
  """Returns a chart as an svg element.

  Leaves out values that are not finite, and on a logarithmic axis values that
  are not positive.

  Args:
    is_file: with its own style and a light background, to stand alone.
  """
  series = [_usable(each, chart) for each in chart.series]
  marked = [
    value
    for mark in chart.marks
    for value in (mark.at, mark.low, mark.high)
    if value is not None
  ]
  x = _scale(
    chart.x, [v for s in series for v in s.x] + marked, _LEFT, WIDTH - _RIGHT
  )
  y = _scale(
    chart.y,
    [v for s in series for of in (s.y, s.low, s.high) for v in of or ()],
    HEIGHT - _BOTTOM,
    _TOP,
  )
  parts = [*_axes(chart, x, y), *(_mark(mark, x) for mark in chart.marks)]
  # Bands first, so that no line is under one.
  parts += [_band(each, x, y) for each in series if each.is_joined]
  parts += [_drawn(each, x, y) for each in series]
  parts.append(_legend(series))
  return element(''.join(parts), chart.title, WIDTH, HEIGHT, is_file=is_file)


def element(
  inside: str, title: str, width: float, height: float, *, is_file: bool = False
) -> str:
  """Returns an svg element with a title for screen readers.

  Args:
    inside: shapes of the element, as SVG text.
    is_file: with its own style and a light background, to stand alone.
  """
  own = (
    f'<style>{STYLE}</style><rect class="paper" width="100%" height="100%"/>'
    if is_file
    else ''
  )
  size = f'width="{width:g}" height="{height:g}"'
  return (
    f'<svg xmlns="http://www.w3.org/2000/svg" class="chart" role="img" {size}'
    f' viewBox="0 0 {width:g} {height:g}"><title>{html.escape(title)}</title>'
    f'{own}{inside}</svg>\n'
  )


def text(
  x: float, y: float, words: str, *, anchor: str = 'start', kind: str = ''
) -> str:
  """Returns a text element.

  Args:
    anchor: start, middle or end: the part of the text that is at x.
    kind: class of STYLE.
  """
  return (
    f'<text x="{x:g}" y="{y:g}" text-anchor="{anchor}" class="{kind}">'
    f'{html.escape(words)}</text>'
  )


def _usable(series: Series, chart: Chart) -> Series:
  """Returns a series without the points that cannot be drawn."""
  lows, highs = series.low or series.y, series.high or series.y
  notes = series.notes or [''] * len(series.x)
  kept = [
    point
    for point in zip(series.x, series.y, lows, highs, notes, strict=True)
    if all(math.isfinite(v) for v in point[:4])
    and (point[0] > 0 or not chart.x.is_log)
    and (min(point[1:4]) > 0 or not chart.y.is_log)
  ]
  x, y, low, high, kept_notes = zip(*kept, strict=True) if kept else ((),) * 5
  return dataclasses.replace(
    series,
    x=x,
    y=y,
    low=None if series.low is None else low,
    high=None if series.high is None else high,
    notes=kept_notes if series.notes else (),
  )


def _scale(
  axis: Axis, values: Sequence[float], start: float, end: float
) -> _Scale:
  """Returns the scale of an axis, with some room beyond its values."""
  if axis.names:
    return _Scale(
      low=-0.5, high=len(axis.names) - 0.5, start=start, end=end, is_log=False
    )
  low, high = min(values, default=1.0), max(values, default=1.0)
  if axis.is_log:
    room = (high / low) ** _ROOM if high > low else 2.0
    low, high = low / room, high * room
  else:
    # A single value, with its rounding, is a flat line in the middle.
    least = abs(high) * 1e-6
    room = (high - low) * _ROOM if high - low > least else abs(high) / 2 or 1.0
    low, high = low - room, high + room
  return _Scale(
    low=low if axis.low is None else axis.low,
    high=high if axis.high is None else axis.high,
    start=start,
    end=end,
    is_log=axis.is_log,
  )


def _axes(chart: Chart, x: _Scale, y: _Scale) -> list[str]:
  """Returns the grid, the ticks and the labels."""
  found = []
  bottom, right = HEIGHT - _BOTTOM, WIDTH - _RIGHT
  heights = y.ticks(5)
  for value, words in zip(heights, ticks.texts(heights), strict=True):
    at = y(value)
    found.append(f'<path class="grid" d="M{_LEFT} {at}H{right}"/>')
    found.append(text(_LEFT - 6, at + 4, words, anchor='end', kind='soft'))
  if chart.x.names:
    places = list(enumerate(chart.x.names))
  else:
    values = x.ticks(6)
    if chart.x.is_whole:
      values = [value for value in values if value == round(value)]
    places = list(zip(values, ticks.texts(values), strict=True))
  for value, words in places:
    at = x(value)
    found.append(f'<path class="axis" d="M{at} {bottom}v4"/>')
    found.append(text(at, bottom + 17, words, anchor='middle', kind='soft'))
  found.append(f'<path class="axis" d="M{_LEFT} {bottom}H{right}"/>')
  found.append(text(8, 16, chart.y.label))
  middle = (_LEFT + right) / 2
  found.append(text(middle, HEIGHT - 6, chart.x.label, anchor='middle'))
  return found


def _mark(mark: Mark, x: _Scale) -> str:
  bottom = HEIGHT - _BOTTOM
  kind, found = f's{mark.colour}', ''
  if mark.low is not None and mark.high is not None:
    left, width = x(mark.low), max(x(mark.high) - x(mark.low), 1)
    found = (
      f'<rect class="{kind} band" x="{left:g}" y="{_TOP}" width="{width:.1f}"'
      f' height="{bottom - _TOP}"/>'
    )
  note = f'<title>{ticks.number(mark.at)}</title>'
  at = x(mark.at)
  return (
    f'{found}<path class="{kind} line" d="M{at} {_TOP}V{bottom}">{note}</path>'
  )


def _band(series: Series, x: _Scale, y: _Scale) -> str:
  if series.low is None or series.high is None or len(series.x) < 2:
    return ''
  there = [f'{x(a)} {y(b)}' for a, b in zip(series.x, series.high, strict=True)]
  back = [f'{x(a)} {y(b)}' for a, b in zip(series.x, series.low, strict=True)]
  path = 'M' + 'L'.join([*there, *reversed(back)]) + 'Z'
  return f'<path class="s{series.colour % 4} band" d="{path}"/>'


def _drawn(series: Series, x: _Scale, y: _Scale) -> str:
  """Returns the line or the points of a series."""
  kind = f's{series.colour % 4}'
  found = []
  if series.is_joined and len(series.x) > 1:
    path = 'M' + 'L'.join(
      f'{x(a)} {y(b)}' for a, b in zip(series.x, series.y, strict=True)
    )
    found.append(
      f'<path class="{kind} line" stroke-dasharray="{_dash(series)}"'
      f' d="{path}"/>'
    )
    if len(series.x) > _MOST_TOOLTIPS:
      return ''.join(found)
  ranges = zip(series.low or series.y, series.high or series.y, strict=True)
  radius = 2 if series.is_joined else 3.5
  for i, (a, b, (low, high)) in enumerate(
    zip(series.x, series.y, ranges, strict=True)
  ):
    at = x(a)
    if not series.is_joined and high > low:
      ends = ''.join(f'M{at - 3:.1f} {y(v)}h6' for v in (low, high))
      found.append(
        f'<path class="{kind} line" d="M{at} {y(low)}V{y(high)}{ends}"/>'
      )
    note = series.notes[i] if series.notes else _note(series.label, a, b)
    hollow = ' hollow' if series.is_hollow else ''
    found.append(
      f'<circle class="{kind}{hollow}" cx="{at}" cy="{y(b)}" r="{radius}">'
      f'<title>{html.escape(note)}</title></circle>'
    )
  return ''.join(found)


def _note(label: str, x: float, y: float) -> str:
  return f'{label} {ticks.number(y)} at {ticks.number(x)}'.strip()


def _dash(series: Series) -> str:
  return _DASHES[series.colour % len(_DASHES)]


def _legend(series: Sequence[Series]) -> str:
  """Returns the labels beside a piece of each line, if there are several."""
  named = [each for each in series if each.label]
  if len(named) < 2:
    return ''
  found, at = [], float(_LEFT)
  for each in named:
    kind = f's{each.colour % 4}'
    if each.is_joined:
      dash = _dash(each)
      found.append(
        f'<path class="{kind} line" stroke-dasharray="{dash}" d="M{at} 32h22"/>'
      )
    else:
      hollow = ' hollow' if each.is_hollow else ''
      found.append(
        f'<circle class="{kind}{hollow}" cx="{at + 11}" cy="32" r="3.5"/>'
      )
    found.append(text(at + 27, 36, each.label, kind='soft'))
    at += 44 + 6.2 * len(each.label)
  return ''.join(found)
