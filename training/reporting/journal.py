"""Files that grow with a run, and a full disk: metrics.jsonl, TensorBoard.

A write that fails is no reason to end a run that computes well. Lines of a
`Journal` wait in memory until they can be written; a checkpoint is sealed only
when all of them were (`Journal.sync`), so that none is lost with the process.
"""

from collections.abc import Callable, Mapping
import os
import pathlib
import threading
import time
from typing import Any

from tensorboardX import event_file_writer
from tensorboardX.proto import event_pb2, summary_pb2

_SECONDS_BETWEEN_FLUSHES = 60.0
# Generated modules, of which type checkers see nothing.
_events: Any = event_pb2
_summaries: Any = summary_pb2


class Journal:
  """Appends lines to a file, each of them once and in order. Thread-safe."""

  def __init__(self, path: pathlib.Path, tell: Callable[[str], None]):
    """Opens the file, and goes on after what is in it.

    Args:
      path: whole lines, or nothing.
      tell: is told when writing begins to fail, and when it works again.
    """
    self._path = path
    self._tell = tell
    self._lock = threading.Lock()
    self._pending: list[bytes] = []
    self._is_failing = False
    self._descriptor = os.open(path, os.O_WRONLY | os.O_CREAT, 0o644)
    self._size = os.fstat(self._descriptor).st_size

  def write(self, line: str) -> None:
    """Adds a line, which is in the file when this returns unless that fails."""
    with self._lock:
      self._pending.append(line.encode())
      try:
        self._write_pending()
      except OSError as error:
        if not self._is_failing:
          self._tell(
            f'{self._path}: got {error}; its lines are kept in memory, and'
            ' written when that works again'
          )
        self._is_failing = True

  def sync(self) -> None:
    """Returns when all lines are on disk.

    Raises:
      OSError: they are not; they are kept.
    """
    with self._lock:
      self._write_pending()
      os.fsync(self._descriptor)

  def close(self) -> None:
    """Tries a last time to write what is left, and closes the file."""
    with self._lock:
      try:
        self._write_pending()
      except OSError as error:
        self._tell(
          f'{self._path}: got {error}; {len(self._pending)} lines are lost'
        )
      os.close(self._descriptor)

  def _write_pending(self) -> None:
    # Where a write stopped halfway, the next one begins anew in its place.
    data, done = b''.join(self._pending), 0
    while done < len(data):
      done += os.pwrite(self._descriptor, data[done:], self._size + done)
    self._size += len(data)
    self._pending = []
    if self._is_failing:
      self._is_failing = False
      self._tell(f'{self._path}: can be written again, no line is missing')


class TensorBoard:
  """Event files for TensorBoard: a view, of which a part may be missing.

  Written here and not by tensorboardX's SummaryWriter: its thread dies of the
  first failed write, and its full queue then blocks the run for ever.
  """

  def __init__(self, directory: pathlib.Path, *, purge_step: int):
    """Opens a new file; what others have from `purge_step` on is not shown."""
    self._directory = directory
    self._writer: event_file_writer.EventsWriter | None = None
    self._flushed_at = time.monotonic()
    start = _events.SessionLog(status=_events.SessionLog.START)
    self._add(_events.Event(step=purge_step, session_log=start))

  def write(self, step: int, values: Mapping[str, float]) -> None:
    """Adds values by tag."""
    summary = _summaries.Summary(
      value=[
        _summaries.Summary.Value(tag=tag, simple_value=value)
        for tag, value in values.items()
      ]
    )
    self._add(_events.Event(step=step, summary=summary))

  def close(self) -> None:
    """Closes the file."""
    if self._writer is not None:
      try:
        self._writer.close()
      except OSError:
        self._writer = None

  def _add(self, event: Any) -> None:
    event.wall_time = now = time.time()
    try:
      if self._writer is None:
        self._directory.mkdir(parents=True, exist_ok=True)
        self._writer = event_file_writer.EventsWriter(
          # Two files of one second would be one.
          str(self._directory / 'events'),
          f'.{os.getpid()}.{int(now * 1e6)}',
        )
      self._writer.write_event(event)
      if time.monotonic() - self._flushed_at > _SECONDS_BETWEEN_FLUSHES:
        self._writer.flush()
        self._flushed_at = time.monotonic()
    except OSError:
      # A file cut short cannot be appended to: the next event opens another.
      self._writer = None
