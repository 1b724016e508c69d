"""Batch sizes that grow during a run, in closed form.

A ramp is a list of (step, rows): from `step` on, counted from 0, each batch has
`rows` rows.

Reference: Smith et al. 2018 (arXiv:1711.00489); GPT-3 grew its batch over the
first billions of tokens (Brown et al. 2020, arXiv:2005.14165, table 2.1).
"""

from collections.abc import Sequence
from typing import Any

Ramp = Sequence[tuple[int, int]]


def rows_at(ramp: Ramp, step: int) -> int:
  """Returns the rows of the batch of `step`, counted from 0."""
  return [rows for start, rows in ramp if start <= step][-1]


def rows_before(ramp: Ramp, step: int) -> int:
  """Returns the number of rows in all batches before `step`."""
  ends = [start for start, _ in ramp[1:]] + [step]
  return sum(
    rows * max(0, min(end, step) - start)
    for (start, rows), end in zip(ramp, ends, strict=True)
  )


def check(batch_ramp: Ramp, batch_size: int) -> None:
  """Raises ValueError if `batch_ramp` does not grow from step 0 to batch_size.

  Args:
    batch_ramp: the ramp; an empty one is always valid.
  """
  if not batch_ramp:
    return
  name = 'data.batch_ramp'
  if not _are_pairs(batch_ramp):
    raise ValueError(
      f'{name}: got {batch_ramp!r}, expected pairs of whole numbers (from_step,'
      ' rows), as ((0, 8), (100, 16))'
    )
  steps = [start for start, _ in batch_ramp]
  if steps[0] != 0 or steps != sorted(set(steps)):
    raise ValueError(
      f'{name}: got steps {steps}, expected them to increase from 0'
    )
  rows = [size for _, size in batch_ramp]
  if min(rows) < 1 or max(rows) > batch_size:
    raise ValueError(
      f'{name}: got rows {rows}, expected 1 to data.batch_size = {batch_size}'
    )
  if rows[-1] != batch_size:
    raise ValueError(
      f'{name}: ends with {rows[-1]} rows, expected data.batch_size ='
      f' {batch_size}; set one to the other'
    )


def _are_pairs(value: Any) -> bool:
  return isinstance(value, tuple | list) and all(
    isinstance(entry, tuple | list)
    and len(entry) == 2
    and all(type(number) is int for number in entry)
    for entry in value
  )
