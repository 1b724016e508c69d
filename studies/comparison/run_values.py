"""The value that judges a run, from its metrics.jsonl.

A metric is a value of the evaluations (`loss`, `bits_per_byte`, `accuracy`, a
score of a task as `perplexity_book/perplexity`), or a speed (`SPEEDS`): the
median of the reports up to an evaluation, so that a slow first report does not
count.
"""

from collections.abc import Sequence
import pathlib
import statistics
from typing import Any

from checks import expect
from training.reporting import metrics

SPEEDS = (
  'tokens_per_s',
  'positions_per_s',
  'seconds_per_step',
  'mfu',
  'positions_mfu',
)
_NO_METRIC = 'kind', 'step'


def by_step(
  records: Sequence[dict[str, Any]], metric: str, name: str = '--metric'
) -> dict[int, float]:
  """Returns a metric of a run at its evaluations, by step.

  A task that is measured at some evaluations has values at these only.

  Args:
    records: records of metrics.jsonl.
    name: name of the flag or field, for errors.

  Raises:
    ValueError: there are evaluations, and none of them has the metric.
  """
  evals = {r['step']: r for r in records if r['kind'] == 'eval'}
  if metric in SPEEDS:
    found = _speeds(records, metric, sorted(evals))
  else:
    found = {s: r[metric] for s, r in evals.items() if metric in r}
  if evals and not found:
    known = sorted({k for r in evals.values() for k in r} - {*_NO_METRIC})
    speeds = {k for r in records if r['kind'] == 'speed' for k in r}
    known += [speed for speed in SPEEDS if speed in speeds]
    meant = expect.meant(metric, known).removeprefix('; ')
    expect.one_of(name, metric, known, meant)
  return found


def _speeds(
  records: Sequence[dict[str, Any]], metric: str, steps: Sequence[int]
) -> dict[int, float]:
  speeds = [r for r in records if r['kind'] == 'speed' and metric in r]
  found = {}
  for step in steps:
    if values := [r[metric] for r in speeds if r['step'] <= step]:
      found[step] = statistics.median(values)
  return found


def last(workdir: pathlib.Path, metric: str) -> tuple[int, float]:
  """Returns the last evaluated step of a run, and the metric there.

  Raises:
    ValueError: the run has no evaluation, or no such metric.
  """
  found = by_step(metrics.read(workdir), metric)
  if not found:
    raise ValueError(
      f'{workdir}: got a run without an evaluation, expected one; train it to'
      ' its end'
    )
  step = max(found)
  return step, found[step]
