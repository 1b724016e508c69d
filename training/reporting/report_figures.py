"""The figures of a run's report, from its records in metrics.jsonl."""

from collections.abc import Mapping, Sequence
import math
from typing import Any

from training.reporting.page import charts, document

_MOST_POINTS = 300  # most points of a curve; more steps are averaged
_UNITS = {
  'grad_norm': 'gradient norm, before clipping',
  'learning_rate': 'learning rate',
  'tokens_per_s': 'tokens per second',
  'seconds_per_step': 'seconds per step',
  'mfu': 'MFU, share of the peak',
  'goodput': 'goodput, share of the time so far',
  'bits_per_byte': 'bits per byte',
}
# Names that have figures of their own, or no curve.
_SHOWN = {
  'kind', 'step', 'loss', 'learning_rate', 'grad_norm', 'tokens',
}  # fmt: skip
_ERRORS = '_error', '_stderr'
_AVERAGE = 'average_'

# Axes that begin at 0, so that figures with different first steps compare.
_STEPS = charts.Axis(label='step', low=0.0)

Records = Sequence[Mapping[str, Any]]


def of_records(records: Records, is_text: bool) -> list[str]:
  """Returns the figures of a run as HTML.

  Args:
    is_text: whether losses are in nats per token.
  """
  kinds = {
    kind: [r for r in records if r['kind'] == kind]
    for kind in ('train', 'eval', 'speed')
  }
  found = [_loss(kinds['train'], kinds['eval'], is_text)]
  for name in ('learning_rate', 'grad_norm'):
    found.append(_curve(name, kinds['train']))
  for name in ('tokens_per_s', 'mfu', 'goodput'):
    found.append(_curve(name, kinds['speed']))
  others = _names(kinds['eval']) - {'loss'}
  for name in sorted(n for n in others if not n.startswith(_AVERAGE)):
    found.append(_evaluated(name, kinds['eval']))
  for name in sorted(_names(kinds['train']) - _SHOWN):
    found.append(_curve(name, kinds['train']))
  return [each for each in found if each]


def _names(records: Records) -> set[str]:
  """Returns the names of values that are not the error of another value."""
  names = {name for each in records for name in each} - {'kind', 'step'}
  return {n for n in names if not n.endswith(_ERRORS)}


def _loss(train: Records, evals: Records, is_text: bool) -> str:
  """Returns training and validation loss in one figure."""
  series = []
  if train:
    series.append(averaged('training', train, 'loss'))
  for i, (label, name) in enumerate(
    (('validation', 'loss'), ('validation, averaged weights', 'average_loss'))
  ):
    own = [r for r in evals if name in r]
    if own:
      series.append(_points(label, own, name, colour=1 + i))
  if not series:
    return ''
  unit = 'nats per token' if is_text else 'per example'
  chart = charts.Chart(
    title='Loss of training and validation by step',
    x=_STEPS,
    y=charts.Axis(label=f'loss, {unit}'),
    series=series,
  )
  many = len(train) > _MOST_POINTS
  caption = 'Band: least and largest of the steps in a point.' if many else ''
  return document.figure('Loss.', caption, charts.svg(chart))


def _curve(name: str, records: Records) -> str:
  own = [r for r in records if name in r]
  if not own:
    return ''
  words = _UNITS.get(name, name.replace('_', ' '))
  chart = charts.Chart(
    title=f'{words} by step',
    x=_STEPS,
    y=charts.Axis(label=words),
    series=[averaged('', own, name)],
  )
  return document.figure(f'{_title(name)}.', '', charts.svg(chart))


def _evaluated(name: str, evals: Records) -> str:
  """Returns a value of the evaluations, with its error if it has one."""
  own = [r for r in evals if name in r]
  series = [_points('', own, name)]
  averages = [r for r in evals if _AVERAGE + name in r]
  if averages:
    series = [
      _points('weights', own, name),
      _points('averaged weights', averages, _AVERAGE + name, colour=1),
    ]
  words = _UNITS.get(name, name.replace('_', ' '))
  has_error = any(name + suffix in r for r in own for suffix in _ERRORS)
  chart = charts.Chart(
    title=f'{words} of the validation split by step',
    x=_STEPS,
    y=charts.Axis(label=words),
    series=series,
  )
  caption = 'Validation.' + (' Band: one standard error.' if has_error else '')
  return document.figure(f'{_title(name)}.', caption, charts.svg(chart))


def _title(name: str) -> str:
  titles = {
    'mfu': 'MFU',
    'tokens_per_s': 'Throughput',
    'grad_norm': 'Gradient norm',
  }
  return titles.get(name, name.replace('_', ' ').capitalize())


def _points(
  label: str, records: Records, name: str, *, colour: int = 0
) -> charts.Series:
  """Returns a value of evaluations."""
  errors = [
    next((r[name + s] for s in _ERRORS if name + s in r), 0.0) for r in records
  ]
  y = [r[name] for r in records]
  has_error = any(errors)
  return charts.Series(
    label=label,
    x=[r['step'] for r in records],
    y=y,
    low=[a - e for a, e in zip(y, errors, strict=True)] if has_error else None,
    high=[a + e for a, e in zip(y, errors, strict=True)] if has_error else None,
    colour=colour,
  )


def averaged(
  label: str, records: Records, name: str, *, colour: int = 0
) -> charts.Series:
  """Returns a value by step: means of neighbours if there are many steps.

  The band reaches from the least to the largest of the neighbours.
  """
  kept = [r for r in records if name in r and math.isfinite(r[name])]
  width = max(-(-len(kept) // _MOST_POINTS), 1)
  groups = [kept[i : i + width] for i in range(0, len(kept), width)]
  values = [[r[name] for r in group] for group in groups]
  return charts.Series(
    label=label,
    x=[sum(r['step'] for r in group) / len(group) for group in groups],
    y=[sum(each) / len(each) for each in values],
    low=[min(each) for each in values] if width > 1 else None,
    high=[max(each) for each in values] if width > 1 else None,
    colour=colour,
  )


def shares(
  title: str, rows: Sequence[tuple[str, float, str]], *, is_file: bool = False
) -> str:
  """Returns horizontal bars.

  Args:
    title: a screen reader reads it in place of the picture.
    rows: (name, share from 0 to 1, words after the bar).
    is_file: see `charts.svg`.
  """
  height, left, right, whole = 24, 270, 130, 860
  span = whole - left - right
  parts = []
  for i, (name, share, words) in enumerate(rows):
    y = 6 + i * height
    width = max(share * span, 0.5)
    parts.append(charts.text(left - 8, y + 14, name, anchor='end'))
    parts.append(
      f'<rect class="s0" x="{left}" y="{y + 3}" width="{width:.1f}"'
      f' height="{height - 9}"/>'
    )
    parts.append(
      charts.text(
        left + width + 6, y + 14, f'{share:.1%}  {words}'.strip(), kind='soft'
      )
    )
  return charts.element(
    ''.join(parts),
    title,
    whole,
    12 + height * len(rows),
    is_file=is_file,
  )
