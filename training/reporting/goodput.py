"""Goodput: the wall time of a run by its use, over all restarts.

    python -m training.reporting.goodput --workdir=runs/quickstart

Goodput is the time in steps that were kept, as a share of the time that the run
was running: the Runtime Goodput of Wongpanich et al. 2025 (arXiv:2502.06982).
The rest of the running time is reported by its part of `PARTS`, or as lost.
Lost steps came after the checkpoint that a later attempt resumed from, and had
to be taken again. The time between attempts, when nothing ran, is reported
beside the goodput (their Scheduling Goodput).

At every moment the time of an attempt goes to exactly one part, so the parts
add up to the wall time. Limits of the figures:

- Steps are dispatched, and waited for at reports. Their time is the part of the
  loop's time that no other part took. So a device that waits for another
  device, or for a slow dispatch, counts as taking steps.
- An attempt counts from the start of its process to its last report. If it was
  killed, the time after that report counts as time between attempts. The same
  holds for an attempt that was killed before it had its data and its state.
- Start-up is measured in the first process only.

`goodput.jsonl` has a line for each attempt. The file is replaced at most once a
second. Its figures depend on the machine, so no test compares them.
"""

from collections.abc import Callable, Iterator, Sequence
import contextlib
import dataclasses
import json
import os
import pathlib
import sys
import time

from absl import app, flags

from checks import path_flags
from storage import atomic, file_names, json_lines

STEPS = 'steps'
# Part of the time of an attempt -> its name in the table for the user.
PARTS = {
  STEPS: 'steps that were kept',
  'start-up': 'process start to the first batch',
  'restore': 'reading a checkpoint',
  'compile': 'the first step of each batch shape',
  'input': 'devices idle, no batch yet',
  'rollout': 'sampling the rows to train on',
  'report': 'devices idle while metrics are written',
  'evaluate': 'validation, with its compilation',
  'save': 'held up by checkpoints',
  'freeze': 'handing over to life two',
  'end': 'closing down',
}
# An attempt remembers the times of this many checkpoints. The time of an older
# one is interpolated.
_MAX_MARKS = 64
_SECONDS_BETWEEN_WRITES = 1.0


@dataclasses.dataclass(kw_only=True)
class Attempt:
  """One start of a run, from the start of its process to its last report."""

  start: float  # seconds since 1970
  first_step: int  # steps taken by the attempts before
  step: int  # last step known to be taken
  seconds: dict[str, float]  # by part
  # (step, seconds in steps up to that step) of each checkpoint.
  marks: list[tuple[int, float]]

  @property
  def wall(self) -> float:
    """Returns the seconds of all parts."""
    return sum(self.seconds.values())

  def seconds_until(self, step: int) -> float:
    """Returns the seconds in steps up to `step`, with `step` included."""
    total = self.seconds.get(STEPS, 0.0)
    points = [(self.first_step, 0.0), *self.marks, (self.step, total)]
    for (a, seconds_a), (b, seconds_b) in zip(points, points[1:], strict=False):
      if a <= step < b:
        return seconds_a + (seconds_b - seconds_a) * (step - a) / (b - a)
    return 0.0 if step < self.first_step else total


@dataclasses.dataclass(frozen=True, kw_only=True)
class Life:
  """A run over all of its attempts, in seconds."""

  parts: dict[str, float]  # by PARTS; the steps exclude lost steps
  lost: float  # seconds in steps that were taken again
  between: float  # seconds from the last report of an attempt to the next start
  num_attempts: int

  @property
  def running(self) -> float:
    """Returns the seconds during which a process ran."""
    return sum(self.parts.values()) + self.lost

  @property
  def goodput(self) -> float:
    """Returns the share of the running time in kept steps, from 0 to 1."""
    return self.parts[STEPS] / self.running if self.running else 0.0


def life(attempts: Sequence[Attempt]) -> Life:
  """Returns the sum of attempts, which are in the order of their starts."""
  parts = dict.fromkeys(PARTS, 0.0)
  lost = between = 0.0
  # Backwards: the steps of an attempt after the first step of any later attempt
  # are lost.
  kept_step: float = float('inf')
  later_start = None
  for attempt in reversed(attempts):
    for name, seconds in attempt.seconds.items():
      parts[name] += seconds
    if kept_step < attempt.step:
      kept = attempt.seconds_until(int(kept_step))
      lost += attempt.seconds.get(STEPS, 0.0) - kept
    kept_step = min(kept_step, attempt.first_step)
    if later_start is not None:
      # At least 0: the clocks of two hosts may differ by more than a restart
      # takes.
      between += max(later_start - (attempt.start + attempt.wall), 0.0)
    later_start = attempt.start
  parts[STEPS] -= lost
  return Life(
    parts=parts, lost=lost, between=between, num_attempts=len(attempts)
  )


def report(told: Life) -> str:
  """Returns the table of a run for the user."""
  attempts = (
    f'{told.num_attempts} attempts' if told.num_attempts > 1 else '1 attempt'
  )
  rows = [
    (PARTS[STEPS], told.parts[STEPS]),
    ('lost: steps taken again', told.lost),
    *((PARTS[name], told.parts[name]) for name in PARTS if name != STEPS),
  ]
  width = max(len(name) for name, _ in rows)
  lines = [
    f'goodput    {told.goodput:.1%} of {told.running:,.1f} s, {attempts}'
  ]
  lines += [
    f'  {name:<{width}} {seconds:10,.1f} s {seconds / told.running:6.1%}'
    for name, seconds in rows
    if seconds >= 0.05
  ]
  if told.between:
    share = told.running / (told.running + told.between)
    lines.append(
      f'  besides, {told.between:,.1f} s between attempts: it ran'
      f' {share:.1%} of the time'
    )
  return '\n'.join(lines)


def read(
  workdir: pathlib.Path, tell: Callable[[str], None] = lambda text: None
) -> list[Attempt]:
  """Returns the attempts of a run in order; none if there is no file.

  Args:
    workdir: workdir of the run.
    tell: receives a line about damaged lines, which are skipped.
  """
  path = workdir / file_names.GOODPUT
  lines = path.read_bytes().splitlines() if path.exists() else []
  names = [field.name for field in dataclasses.fields(Attempt)]
  records, damaged = json_lines.parse(lines, names)
  if damaged:
    tell(json_lines.skipped(str(path), damaged))
  return [
    Attempt(**{name: fields[name] for name in names}) for fields in records
  ]


class Goodput:
  """Measures one attempt; its parts follow each other without a gap."""

  def __init__(
    self,
    workdir: pathlib.Path | None,
    *,
    first_step: int = 0,
    seconds_before: float = 0.0,
    clock: Callable[[], float] = time.perf_counter,
    wall: Callable[[], float] = time.time,
    tell: Callable[[str], None] = lambda text: None,
  ):
    """Starts to measure, with the part 'start-up'.

    Args:
      workdir: workdir of the run, with its earlier attempts. None: nothing is
        read or written. In a run of several processes the first one writes.
      first_step: number of steps that earlier attempts have taken.
      seconds_before: age of this process.
      clock: returns seconds since any moment.
      wall: returns seconds since 1970.
      tell: receives a line if earlier attempts are damaged.
    """
    self._workdir = workdir
    self._clock = clock
    self._part = 'start-up'
    self._since = clock()
    self._written_at: float | None = None
    self._earlier = [] if workdir is None else read(workdir, tell)
    self._now = Attempt(
      start=wall() - seconds_before,
      first_step=first_step,
      step=first_step,
      seconds={**dict.fromkeys(PARTS, 0.0), 'start-up': seconds_before},
      marks=[],
    )

  def enter(self, part: str) -> None:
    """Counts the time from now on as `part`, a key of PARTS."""
    now = self._clock()
    self._now.seconds[self._part] += now - self._since
    self._part, self._since = part, now

  @contextlib.contextmanager
  def during(self, part: str) -> Iterator[None]:
    """Counts the time of the block as `part`."""
    before = self._part
    self.enter(part)
    try:
      yield
    finally:
      self.enter(before)

  def seconds(self, *parts: str) -> float:
    """Returns the seconds of these parts so far."""
    self.enter(self._part)
    return sum(self._now.seconds[part] for part in parts)

  def move(self, seconds: float, source: str, target: str) -> None:
    """Moves seconds from the part `source` to the part `target`."""
    seconds = min(seconds, self._now.seconds[source])
    self._now.seconds[source] -= seconds
    self._now.seconds[target] += seconds

  def begin(self, first_step: int) -> None:
    """Sets the step that the attempt really starts from.

    It is below the `first_step` of `__init__` if a checkpoint was damaged.
    """
    self._now.first_step = self._now.step = first_step

  def reached(self, step: int) -> None:
    """Records that the steps up to `step` are done; writes once a second."""
    self._now.step = step
    now = self._clock()
    last = self._written_at
    if last is None or now - last >= _SECONDS_BETWEEN_WRITES:
      self.write()

  def mark(self, step: int) -> None:
    """Remembers the time of a step that a later attempt may resume from."""
    self._now.marks.append((step, self.seconds(STEPS)))
    del self._now.marks[:-_MAX_MARKS]

  def life(self) -> Life:
    """Returns the figures of the run so far, with all earlier attempts."""
    self.enter(self._part)
    return life([*self._earlier, self._now])

  def write(self) -> None:
    """Brings the file up to date, atomically.

    If the file cannot be written, the run continues.
    """
    self.enter(self._part)
    self._written_at = self._since
    if self._workdir is None:
      return
    lines = [
      json.dumps(dataclasses.asdict(attempt)) + '\n'
      for attempt in (*self._earlier, self._now)
    ]
    path = self._workdir / file_names.GOODPUT
    with contextlib.suppress(OSError):
      # Not durable: the loop would wait for the disk once a second.
      atomic.write_text(path, ''.join(lines), durable=False)

  @contextlib.contextmanager
  def written(self) -> Iterator[None]:
    """Brings the file up to date before and after the block.

    The block may fail: the time of a failed attempt counts too.
    """
    self.write()
    try:
      yield
    finally:
      self.write()


def process_age() -> float:
  """Returns the age of this process in seconds; 0 if it is unknown.

  Importing jax takes seconds, before any clock of this code starts. Linux knows
  when a process was started: proc(5), field 22 of stat.
  """
  if sys.platform != 'linux':
    return 0.0
  try:
    stat = pathlib.Path('/proc/self/stat').read_text()
    ticks = int(stat.rpartition(')')[2].split()[19])
  except (OSError, ValueError, IndexError):
    return 0.0
  started = ticks / os.sysconf('SC_CLK_TCK')
  return max(time.clock_gettime(time.CLOCK_BOOTTIME) - started, 0.0)


def main(argv: Sequence[str]) -> None:
  """Prints the table of a workdir."""
  del argv
  workdir = pathlib.Path(flags.FLAGS.workdir)
  attempts = read(workdir, lambda text: print(text, file=sys.stderr))
  if not attempts:
    sys.exit(
      f'error: --workdir={workdir}: got no {file_names.GOODPUT}, expected the'
      ' workdir of a run that has taken a step'
    )
  print(report(life(attempts)))


if __name__ == '__main__':
  path_flags.DEFINE_path(
    'workdir', None, 'Directory of the run.', required=True
  )
  app.run(main)
