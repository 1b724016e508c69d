"""metrics.jsonl and run.json of the runs of a group, as single runs have them.

A group takes the steps of all runs at once, so records are kept in memory up to
the next report, and then appended to the files of all runs.
"""

import json
import os
import pathlib
from typing import Any

from storage import atomic, file_names
from training.reporting import metrics


class Records:
  """The metrics.jsonl of one run."""

  def __init__(self, workdir: pathlib.Path, first_step: int):
    """Drops the records of later steps, which are taken again."""
    self._path = workdir / file_names.METRICS
    atomic.make_directory(workdir)
    kept = [r for r in metrics.read(workdir) if r['step'] <= first_step]
    atomic.write_text(self._path, ''.join(map(_line, kept)))
    self._pending: list[str] = []

  def add(self, kind: str, step: int, values: dict[str, Any]) -> None:
    """Adds one record."""
    self._pending.append(_line({'kind': kind, 'step': step, **values}))

  def write(self) -> None:
    """Appends the records so far to the file, and waits for the disk."""
    with self._path.open('a') as file:
      file.write(''.join(self._pending))
      file.flush()
      os.fsync(file.fileno())
    self._pending = []


def _line(record: dict[str, Any]) -> str:
  return json.dumps(record) + '\n'
