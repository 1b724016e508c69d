"""JSON Lines files that a run writes and reads back, damaged lines included.

A machine that loses power may leave a block of NUL bytes where the last lines
of a file were. A reader skips such lines and says so: a run does not die of a
lost record.
"""

from collections.abc import Sequence
import json
from typing import Any, NamedTuple

_WIDTH = 60  # of a damaged line in a message


class Damaged(NamedTuple):
  """A line that is no record."""

  number: int  # from 1
  line: bytes

  @property
  def is_lost(self) -> bool:
    """Whether a lost block took the line, or one of its ends."""
    return b'\0' in (self.line[:1], self.line[-1:])

  def __str__(self) -> str:
    return f'line {self.number}: got {self.line[:_WIDTH]!r}'


def parse(
  lines: Sequence[bytes], required: Sequence[str]
) -> tuple[list[dict[str, Any]], list[Damaged]]:
  """Returns the records of whole lines, and the lines that are none.

  Args:
    lines: without their ends.
    required: fields that every record has.
  """
  records, damaged = [], []
  for number, line in enumerate(lines, 1):
    try:
      # A record that was written after a lost block follows its NUL bytes.
      record = json.loads(line.lstrip(b'\0'))
    except ValueError:
      record = None
    if isinstance(record, dict) and all(name in record for name in required):
      records.append(record)
    else:
      damaged.append(Damaged(number, line))
  return records, damaged


def skipped(name: str, damaged: Sequence[Damaged]) -> str:
  """Returns the message about skipped lines of the file `name`."""
  return (
    f'{name}, {damaged[0]}, expected a record as JSON; {len(damaged)} such'
    ' lines are skipped'
  )
