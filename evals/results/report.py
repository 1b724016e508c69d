"""Results as text: every score with its error, and the examples it would take.

If two results have the same examples, their difference is tested example by
example. That needs far fewer examples: a hard question is hard for both models,
and its difficulty cancels in the difference.
"""

from collections.abc import Mapping
import math
from typing import Any

from evals.results import scores, statistics

# The difference to resolve by default: 0.01 for a share, and this fraction of
# the value for any other score.
DIFFERENCE = 0.01


def text(result: scores.Result, difference: float = 0.0) -> str:
  """Returns the scores of a result as a table.

  Args:
    difference: the table says how many examples resolve it; 0: DIFFERENCE.
  """
  lines = [f'{result.task}{_of(result.model)}', '']
  lines += _table(
    [
      (
        'group',
        'score',
        'value',
        'standard error',
        'examples',
        'smallest difference seen',
        'examples to resolve',
      )
    ]
    + [
      _row(group, score, difference)
      for group in result.groups
      for score in group.scores
    ]
  )
  lines += [
    '',
    'Smallest difference seen, examples to resolve: a two-sided test at'
    f' {statistics.LEVEL:.0%} finds the difference with'
    f' {statistics.POWER:.0%} probability, for two results with different'
    ' examples, each with this number of them. If both have the same examples,'
    ' fewer are needed: compare two results to see how many.',
  ]
  lines += [
    f'note: {group.name}: {note}'
    for group in result.groups
    for note in group.notes
  ]
  return '\n'.join(lines)


def _row(group, score, difference) -> tuple[str, ...]:
  error = score.standard_error
  delta = _delta(score, difference)
  # The error of a difference between two scores that each have this error.
  of_two = error * math.sqrt(2)
  needed = statistics.num_to_resolve(delta, of_two, group.num_examples)
  return (
    group.name,
    score.name,
    _number(score.value),
    _number(error),
    f'{group.num_examples:,}',
    _number(statistics.smallest_seen(of_two)),
    f'{_count(needed)} for {_number(delta)}',
  )


def compare(a: scores.Result, b: scores.Result, difference: float = 0.0) -> str:
  """Returns b - a for every score that both have, tested.

  Args:
    a: the baseline.
    b: the result to compare with the baseline.
    difference: the text says how many examples resolve it; 0: DIFFERENCE.

  Raises:
    ValueError: the results are of different tasks, or share no score.
  """
  groups = {group.name: group for group in a.groups}
  shared = [
    (groups[other.name], other) for other in b.groups if other.name in groups
  ]
  if a.task.partition(':')[0] != b.task.partition(':')[0] or not shared:
    raise ValueError(
      f'results: got {a.task} and {b.task}, expected two results of one task'
    )
  lines = [f'A  {a.task}{_of(a.model)}', f'B  {b.task}{_of(b.model)}']
  lines += _differences(a, b)
  for group_a, group_b in shared:
    in_a = {score.name for score in group_a.scores}
    for score_b in group_b.scores:
      if score_b.name in in_a:
        lines.append('')
        lines += _compared(group_a, group_b, score_b.name, difference)
  return '\n'.join(lines)


def _compared(group_a, group_b, name, difference) -> list[str]:
  """Returns the lines about one score of two groups."""
  a, b = group_a.score(name), group_b.score(name)
  lines = [f'{group_a.name} / {name}: A {_with_error(a)}, B {_with_error(b)}']
  if a.per == 'token' and _tokens(group_a) != _tokens(group_b):
    return [
      *lines,
      f'  not comparable: {_tokens(group_a)} tokens against'
      f' {_tokens(group_b)}, the tokenizers differ; compare bits_per_byte',
    ]
  is_paired = _is_paired(group_a, group_b, a, b)
  if is_paired:
    found = statistics.compare(a.values, b.values, group_b.clusters)
    resampled = statistics.paired_bootstrap(
      a.values, b.values, group_b.clusters
    )
  else:
    found = statistics.unpaired(
      a.value,
      a.standard_error,
      b.value,
      b.standard_error,
      (group_a.num_examples, group_b.num_examples),
    )
    resampled = None
  is_log = is_paired and a.is_exponential
  what = f'log B - log A = {found.value:+.4g}' if is_log else ''
  what = what or f'B - A = {found.value:+.4g}'
  lines.append(
    f'  {what}, {_interval(found)},'
    f' p = {_probability(found.p_value)} ({found.test}): {_verdict(found, b)}'
  )
  if resampled is not None:
    lines.append(
      f'  by {resampled.test}: {_interval(resampled)},'
      f' p = {_probability(resampled.p_value)}'
    )
  lines += _needed(group_a, group_b, a, b, found, is_paired, difference)
  return lines


def _needed(group_a, group_b, a, b, found, is_paired, difference) -> list[str]:
  """Returns lines: the examples that resolve the seen and stated difference."""
  count = min(group_a.num_examples, group_b.num_examples)
  is_log = is_paired and a.is_exponential
  errors = [
    score.standard_error / (score.value if is_log else 1) for score in (a, b)
  ]
  stated = _delta(a, difference) / (a.value if is_log else 1)
  lines = []
  for what, delta in (('seen', abs(found.value)), ('stated', stated)):
    if not delta:
      continue  # no number of examples resolves a difference of 0
    apart = statistics.num_to_resolve(delta, math.hypot(*errors), count)
    words = f'{_count(apart)} different examples each'
    if is_paired:
      same = statistics.num_to_resolve(delta, found.standard_error, count)
      words = f'{_count(same)} that both answer, or {words}'
    lines.append(
      f'  to resolve the difference {what}, {_number(delta)}: {words}'
      f' (here {count:,})'
    )
  return lines


def _is_paired(group_a, group_b, a, b) -> bool:
  """Whether both scores have values of the same examples."""
  return (
    bool(a.values)
    and len(a.values) == len(b.values)
    and a.is_exponential == b.is_exponential
    and group_a.example_ids == group_b.example_ids
    and group_a.clusters == group_b.clusters
  )


def _differences(a: scores.Result, b: scores.Result) -> list[str]:
  """Returns notes on options, files and examples that differ."""
  lines = []
  for name in sorted(a.options.keys() | b.options.keys()):
    got, other = a.options.get(name), b.options.get(name)
    if got != other:
      lines.append(f'note: {name} is {got!r} in A and {other!r} in B')
  files_a, files_b = (sorted(one.files.values()) for one in (a, b))
  if files_a != files_b:
    lines.append('note: the files differ; examples of the same id are paired')
  ids_a, ids_b = ([g.example_ids for g in one.groups] for one in (a, b))
  if ids_a != ids_b:
    lines.append('note: the examples differ, so the tests are not paired')
  return lines


def _tokens(group: scores.Group) -> Any:
  return group.details.get('num_tokens')


def _delta(score: scores.Score, difference: float) -> float:
  if difference:
    return difference
  return DIFFERENCE * (1.0 if score.is_share else abs(score.value))


def _interval(found: statistics.Difference) -> str:
  if math.isnan(found.low):
    return '95 % interval unknown'
  return f'95 % interval {found.low:+.4g} to {found.high:+.4g}'


def _verdict(found: statistics.Difference, b: scores.Score) -> str:
  if math.isnan(found.p_value) or found.p_value >= statistics.LEVEL:
    return 'not resolved'
  return (
    'B is better' if (found.value > 0) == b.higher_is_better else ('B is worse')
  )


def _of(model: Mapping[str, Any]) -> str:
  named = ', '.join(f'{name} {value}' for name, value in model.items())
  return f'  ({named})' if named else ''


def _with_error(score: scores.Score) -> str:
  return f'{_number(score.value)} +- {_number(score.standard_error)}'


def _number(value: float) -> str:
  return 'unknown' if math.isnan(value) else f'{value:.4g}'


def _probability(value: float) -> str:
  if math.isnan(value):
    return 'unknown'
  return '< 0.0001' if value < 1e-4 else f'{value:.4f}'


def _count(value: float) -> str:
  if math.isnan(value):
    return 'an unknown number'
  return f'{value:,.0f}' if math.isfinite(value) else 'infinitely many'


def _table(rows: list[tuple[str, ...]]) -> list[str]:
  """Returns the lines of a Markdown table, aligned for a terminal."""
  widths = [max(map(len, column)) for column in zip(*rows, strict=True)]
  lines = [
    '| '
    + ' | '.join(c.ljust(w) for c, w in zip(row, widths, strict=True))
    + ' |'
    for row in rows
  ]
  lines.insert(1, '|' + '|'.join('-' * (w + 2) for w in widths) + '|')
  return lines
