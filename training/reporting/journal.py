"""The growing files of a run, metrics.jsonl and TensorBoard, on a full disk.

A write that fails does not end the run. The lines of a `Journal` wait in memory
until they can be written. A checkpoint is sealed only after all lines are on
disk (`Journal.sync`). So a process that ends loses no line of a step that it
saved.
"""

from collections.abc import Callable, Mapping
import contextlib
import os
import pathlib
import sys
import threading
import time
from typing import Any


@contextlib.contextmanager
def _without_torch():
  """Hides torch from imports, unless it was imported before."""
  is_hidden = sys.modules.setdefault('torch', None) is None  # pyright: ignore[reportArgumentType]
  try:
    yield
  finally:
    if is_hidden:
      del sys.modules['torch']


# tensorboardX imports torch wherever it is installed, to know its tensors. That
# takes 1.2 s, a third of all imports of a run.
with _without_torch():
  from tensorboardX import event_file_writer, summary as tensorboard_summary
  from tensorboardX.proto import event_pb2, summary_pb2

_SECONDS_BETWEEN_FLUSHES = 60.0
# Any: type checkers see nothing of generated modules.
_events: Any = event_pb2
_summaries: Any = summary_pb2


class Journal:
  """Appends lines to a file, each once and in order. Thread-safe."""

  def __init__(self, path: pathlib.Path, tell: Callable[[str], None]):
    """Opens the file, and appends to its lines.

    Args:
      path: a file of whole lines. It is created if it does not exist.
      tell: receives a line when writing begins to fail, and when it works
        again.
    """
    self._path = path
    self._tell = tell
    self._lock = threading.Lock()
    self._pending: list[bytes] = []
    self._is_failing = False
    self._descriptor = os.open(path, os.O_WRONLY | os.O_CREAT, 0o644)
    self._size = os.fstat(self._descriptor).st_size

  def write(self, line: str) -> None:
    """Adds a line; a line that cannot be written is kept in memory."""
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
      OSError: some lines cannot be written. They stay in memory for the next
        attempt.
    """
    with self._lock:
      self._write_pending()
      os.fsync(self._descriptor)

  def close(self) -> None:
    """Tries a last time to write the lines in memory; closes the file."""
    with self._lock:
      try:
        self._write_pending()
      except OSError as error:
        self._tell(
          f'{self._path}: got {error}; {len(self._pending)} lines are lost'
        )
      os.close(self._descriptor)

  def _write_pending(self) -> None:
    # At the old size: a write that failed halfway is overwritten.
    data, done = b''.join(self._pending), 0
    while done < len(data):
      done += os.pwrite(self._descriptor, data[done:], self._size + done)
    self._size += len(data)
    self._pending = []
    if self._is_failing:
      self._is_failing = False
      self._tell(f'{self._path}: can be written again, no line is missing')


class TensorBoard:
  """Event files for TensorBoard; events are lost while the disk is full.

  tensorboardX's SummaryWriter is not used: its thread dies at the first failed
  write, and then its full queue blocks the run for ever.
  """

  def __init__(self, directory: pathlib.Path, *, purge_step: int):
    """Opens a new file.

    Args:
      directory: directory of all event files of the run.
      purge_step: TensorBoard hides events of older files from this step on.
    """
    self._directory = directory
    self._writer: event_file_writer.EventsWriter | None = None
    self._flushed_at = time.monotonic()
    start = _events.SessionLog(status=_events.SessionLog.START)
    self._add(_events.Event(step=purge_step, session_log=start))

  def write(self, step: int, values: Mapping[str, float | str]) -> None:
    """Adds values by tag; a string goes to TensorBoard's text plugin."""
    found = [
      tensorboard_summary.text(tag, value).value[0]
      if isinstance(value, str)
      else _summaries.Summary.Value(tag=tag, simple_value=value)
      for tag, value in values.items()
    ]
    self.add(step, _summaries.Summary(value=found))

  def add(self, step: int, summary: Any) -> None:
    """Adds a summary in tensorboardX's format."""
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
          # Process and microseconds: tensorboardX names a file by the second,
          # so two files of one second would be one.
          str(self._directory / 'events'),
          f'.{os.getpid()}.{int(now * 1e6)}',
        )
      self._writer.write_event(event)
      if time.monotonic() - self._flushed_at > _SECONDS_BETWEEN_FLUSHES:
        self._writer.flush()
        self._flushed_at = time.monotonic()
    except OSError:
      # An incomplete file cannot be appended to: the next event opens another.
      self._writer = None
