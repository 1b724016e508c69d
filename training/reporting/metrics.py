"""The metrics of a run: metrics.jsonl (the source of truth) and TensorBoard.

metrics.jsonl has each step once as a `train` record and each evaluation once as
an `eval` record; both are reproducible to the bit. A `sample` record holds one
text that the evaluation of its step drew. The other records depend on the
machine: `speed`, and `save`, in which `saved` is 0 if the save failed.
"""

from collections.abc import Callable, Mapping
import json
import pathlib
import threading
from typing import Any

from storage import atomic, file_names, json_lines
from training.reporting import journal


class Log:
  """Appends records to metrics.jsonl and to TensorBoard. Thread-safe."""

  def __init__(
    self,
    workdir: pathlib.Path | None,
    *,
    first_step: int,
    evaluation_owed: bool = False,
    tell: Callable[[str], None] = lambda text: None,
  ):
    """Opens the log of a run that has taken `first_step` steps.

    Drops the records of later steps. A killed run wrote them after its last
    checkpoint, and the resumed run takes these steps again.

    Args:
      workdir: workdir of the run; None: nothing is written. In a run of several
        processes the first one writes.
      first_step: steps taken so far.
      evaluation_owed: drop the evaluation of `first_step` too: it is repeated.
      tell: receives a line if lines of the file are lost, and if it cannot be
        written later.

    Raises:
      ValueError: a line of the file is not a record.
    """
    self._journal = self._tensorboard = None
    self._lock = threading.Lock()
    if workdir is None:
      return
    path = workdir / file_names.METRICS
    path.touch()
    records = read(workdir, tell)
    kept = [
      record
      for record in records
      if record['step'] <= first_step
      # A run without a checkpoint draws its first rollout again.
      and not (record['kind'] == 'rollout' and not first_step)
      and not (
        evaluation_owed
        and record['kind'] in ('eval', 'sample')
        and record['step'] == first_step
      )
    ]
    if len(kept) != path.read_bytes().count(b'\n') or not _ends_in_newline(
      path
    ):
      atomic.write_text(path, ''.join(_line(record) for record in kept))
    self._journal = journal.Journal(path, tell)
    self._tensorboard = journal.TensorBoard(
      workdir / file_names.TENSORBOARD, purge_step=first_step + 1
    )

  def write(
    self, kind: str, step: int, values: Mapping[str, float | str]
  ) -> None:
    """Adds one record.

    The record is in the file when this returns. If the file cannot be written,
    the record is kept in memory, see `journal.Journal`.
    """
    if self._journal is None or self._tensorboard is None:
      return
    with self._lock:
      self._journal.write(_line({'kind': kind, 'step': step, **values}))
      self._tensorboard.write(
        step, {f'{kind}/{name}': value for name, value in values.items()}
      )

  def sync(self) -> None:
    """Returns when all records are on disk.

    Raises:
      OSError: some records cannot be written. They stay in memory for the next
        attempt.
    """
    if self._journal is not None:
      self._journal.sync()

  def close(self) -> None:
    """Flushes and closes both files."""
    if self._journal is not None and self._tensorboard is not None:
      self._journal.close()
      self._tensorboard.close()


def read(
  workdir: pathlib.Path, tell: Callable[[str], None] = lambda text: None
) -> list[dict[str, Any]]:
  """Returns the records of a run.

  An incomplete last line, left by a killed process, is ignored.

  Args:
    workdir: workdir of the run.
    tell: receives a line if a power loss took lines; they are skipped.

  Raises:
    ValueError: any other line is not a record.
  """
  path = workdir / file_names.METRICS
  lines = path.read_bytes().split(b'\n') if path.exists() else [b'']
  records, damaged = json_lines.parse(lines[:-1], ('kind', 'step'))
  for line in damaged:
    if not line.is_lost:
      raise ValueError(
        f'{path}, {line}, expected a record as JSON; the file was damaged: put'
        ' a copy there, or delete it to go on without the records so far'
      )
  if damaged:
    tell(json_lines.skipped(str(path), damaged))
  return records


def _line(record: dict[str, Any]) -> str:
  return json.dumps(record) + '\n'


def _ends_in_newline(path: pathlib.Path) -> bool:
  text = path.read_bytes()
  return not text or text.endswith(b'\n')
