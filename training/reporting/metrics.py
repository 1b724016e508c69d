"""What a run reports: JSONL (the source of truth), TensorBoard, the terminal.

`metrics.jsonl` has every step once as a `train` record and every evaluation
once as `eval`, both reproducible to the bit. Others depend on the machine:
`speed`, and `save`, of which a failed one has `saved` 0.
"""

from collections.abc import Callable
import json
import pathlib
import threading
from typing import Any, Protocol

import rich.console
import rich.progress

from storage import atomic, layout
from training.reporting import journal

_BARS = '▁▂▃▄▅▆▇█'


class Log(Protocol):
  """Where records go."""

  def write(self, kind: str, step: int, values: dict[str, float]) -> None:
    """Adds one record."""
    ...

  def sync(self) -> None:
    """Returns when all records are on disk.

    Raises:
      OSError: they are not.
    """
    ...

  def close(self) -> None:
    """Adds no more."""
    ...


class NoLog:
  """What all processes but the first have: the first one writes."""

  def write(self, kind: str, step: int, values: dict[str, float]) -> None:
    """Does nothing."""

  def sync(self) -> None:
    """Does nothing."""

  def close(self) -> None:
    """Does nothing."""


class MetricsLog:
  """Appends records to `metrics.jsonl` and to TensorBoard. Thread-safe."""

  def __init__(
    self,
    workdir: pathlib.Path,
    *,
    first_step: int,
    evaluation_owed: bool = False,
    tell: Callable[[str], None] = lambda text: None,
  ):
    """Opens the log of a run that goes on after `first_step` steps.

    Records of later steps, which a killed run wrote after its last
    checkpoint, are dropped: those steps are about to be taken again.

    Args:
      workdir: of the run.
      first_step: steps that were taken.
      evaluation_owed: the one after the last of them is about to be done again.
      tell: is told what goes wrong with the file later on.

    Raises:
      ValueError: a line is no record.
    """
    path = workdir / layout.METRICS
    path.touch()
    records = read(workdir)
    kept = [
      record
      for record in records
      if record['step'] <= first_step
      and not (
        evaluation_owed
        and record['kind'] == 'eval'
        and record['step'] == first_step
      )
    ]
    if len(kept) != len(records) or not _ends_in_newline(path):
      atomic.write_text(path, ''.join(_line(record) for record in kept))
    self._journal = journal.Journal(path, tell)
    self._tensorboard = journal.TensorBoard(
      workdir / layout.TENSORBOARD, purge_step=first_step + 1
    )
    self._lock = threading.Lock()

  def write(self, kind: str, step: int, values: dict[str, float]) -> None:
    """Adds one record; it is in the file when this returns, if it can be."""
    with self._lock:
      self._journal.write(_line({'kind': kind, 'step': step, **values}))
      self._tensorboard.write(
        step, {f'{kind}/{name}': value for name, value in values.items()}
      )

  def sync(self) -> None:
    """Returns when all records are on disk.

    Raises:
      OSError: they are not; they are kept, and written when that works again.
    """
    self._journal.sync()

  def close(self) -> None:
    """Flushes and closes both."""
    self._journal.close()
    self._tensorboard.close()


def read(workdir: pathlib.Path) -> list[dict[str, Any]]:
  """Returns the records of a run; a last line cut short by a kill is no one.

  Raises:
    ValueError: another line is no record.
  """
  path = workdir / layout.METRICS
  lines = path.read_bytes().split(b'\n') if path.exists() else [b'']
  records = []
  for i, line in enumerate(lines[:-1], 1):
    try:
      record = json.loads(line)
      is_record = {'kind', 'step'} <= record.keys()
    except (ValueError, AttributeError):
      is_record = False
    if not is_record:
      raise ValueError(
        f'{path}, line {i}: got {line[:60]!r}, expected a record as JSON; the'
        ' file was damaged: put a copy there, or delete it to go on without'
        ' the records so far'
      )
    records.append(record)
  return records


def sparkline(values: list[float], width: int = 60) -> str:
  """Returns the values as one line of bars, averaged into `width` buckets."""
  if not values:
    return ''
  width = min(width, len(values))
  edges = [round(i * len(values) / width) for i in range(width + 1)]
  means = [
    sum(values[a:b]) / (b - a) for a, b in zip(edges, edges[1:], strict=False)
  ]
  low, high = min(means), max(means)
  span = (high - low) or 1.0
  return ''.join(
    _BARS[round((mean - low) / span * (len(_BARS) - 1))] for mean in means
  )


class Terminal:
  """A progress bar on a terminal, plain lines elsewhere."""

  def __init__(self, console: rich.console.Console, *, num_steps: int):
    self._console = console
    self._num_steps = num_steps
    self._bar = rich.progress.Progress(
      rich.progress.TextColumn('step {task.completed}/{task.total}'),
      rich.progress.BarColumn(bar_width=20),
      rich.progress.TextColumn('{task.fields[text]}'),
      console=console,
      transient=True,
      refresh_per_second=4,
      disable=not console.is_terminal,
    )
    self._task = self._bar.add_task('', total=num_steps, text='compiling')

  def __enter__(self) -> 'Terminal':
    self._bar.start()
    return self

  def __exit__(self, *exception) -> None:
    self._bar.stop()

  def update(self, step: int, loss: float, speed: dict[str, float]) -> None:
    """Shows where the run is; speed may be empty while it is unknown."""
    parts = [f'loss {loss:.4f}']
    if speed:
      left = (self._num_steps - step) * speed['seconds_per_step']
      parts += [
        f'{speed["tokens_per_s"]:,.0f} tokens/s',
        f'MFU {speed["mfu"]:.1%}',
        f'goodput {speed["goodput"]:.0%}',
        f'{_duration(left)} left',
      ]
    text = ' | '.join(parts)
    self._bar.update(self._task, completed=step, text=text)
    if not self._console.is_terminal:
      self.say(f'step {step}/{self._num_steps} | {text}')

  def say(self, text: str) -> None:
    """Prints a line that stays."""
    self._console.print(text, highlight=False, markup=False, soft_wrap=True)


def _duration(seconds: float) -> str:
  minutes, seconds = divmod(round(seconds), 60)
  hours, minutes = divmod(minutes, 60)
  if hours:
    return f'{hours}h{minutes:02d}m'
  return f'{minutes}m{seconds:02d}s'


def _line(record: dict[str, Any]) -> str:
  return json.dumps(record) + '\n'


def _ends_in_newline(path: pathlib.Path) -> bool:
  text = path.read_bytes()
  return not text or text.endswith(b'\n')
