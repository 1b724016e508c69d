"""Goodput: where the wall time of a run went, over all of its restarts.

    python -m training.reporting.goodput --workdir=runs/quickstart

Goodput is the share of the time a run was running that went into steps that
were kept: the Runtime Goodput of Wongpanich et al. 2025 (arXiv:2502.06982).
What is not goodput is told by its part of `PARTS`, or is lost: steps after the
checkpoint that a later attempt went on from, which had to be taken again. Time
between attempts, when nothing ran, is no part of it (their Scheduling Goodput)
and is told beside it.

At every moment the time of an attempt goes to exactly one part, so the parts
add up to the wall time. What the figures cannot see:

- Steps are dispatched, and waited for at reports. Their time is what is left of
  the loop's, so a device that waits for another one, or for a slow dispatch,
  counts as taking steps.
- An attempt counts from its process' start to its last report. What it did
  after that, if it was killed, is time between attempts; so is one that was
  killed before it had its data and its state.
- Start-up is of the first process; the others are taken to be alike.

`goodput.jsonl` has a line for each attempt, replaced as a whole at most once a
second; it depends on the machine and is never compared.
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

from storage import atomic, layout

STEPS = 'steps'
# What the time of an attempt is spent on, and what a user is told of it.
PARTS = {
  STEPS: 'steps that were kept',
  'start-up': 'process start to the first batch',
  'restore': 'reading a checkpoint',
  'compile': 'the first step of each batch shape',
  'input': 'devices idle, no batch yet',
  'report': 'devices idle while metrics are written',
  'evaluate': 'validation, with its compilation',
  'save': 'held up by checkpoints',
  'freeze': 'handing over to life two',
  'end': 'closing down',
}
# Checkpoints that an attempt remembers the time of; one that is older and is
# gone back to is placed by interpolation.
_MAX_MARKS = 64
_SECONDS_BETWEEN_WRITES = 1.0


@dataclasses.dataclass(kw_only=True)
class Attempt:
  """One process' life, from its start to its last sign of life."""

  start: float  # seconds since 1970
  first_step: int  # steps taken by the attempts before
  step: int  # the last one known to be taken
  seconds: dict[str, float]  # by part
  # (step, seconds in steps until then), where a checkpoint may have been.
  marks: list[tuple[int, float]]

  @property
  def wall(self) -> float:
    """Returns the seconds of all parts."""
    return sum(self.seconds.values())

  def seconds_until(self, step: int) -> float:
    """Returns the seconds spent in steps up to and with `step`."""
    total = self.seconds.get(STEPS, 0.0)
    points = [(self.first_step, 0.0), *self.marks, (self.step, total)]
    for (a, seconds_a), (b, seconds_b) in zip(points, points[1:], strict=False):
      if a <= step < b:
        return seconds_a + (seconds_b - seconds_a) * (step - a) / (b - a)
    return 0.0 if step < self.first_step else total


@dataclasses.dataclass(frozen=True, kw_only=True)
class Life:
  """A run over all of its attempts, in seconds."""

  parts: dict[str, float]  # of PARTS; steps without those that were lost
  lost: float  # in steps that were taken again
  between: float  # from the last sign of an attempt to the next one's start
  num_attempts: int

  @property
  def running(self) -> float:
    """Returns the seconds in which a process ran."""
    return sum(self.parts.values()) + self.lost

  @property
  def goodput(self) -> float:
    """Returns the share of the running time in steps that were kept."""
    return self.parts[STEPS] / self.running if self.running else 0.0


def life(attempts: Sequence[Attempt]) -> Life:
  """Adds up attempts, in the order they were made."""
  parts = dict.fromkeys(PARTS, 0.0)
  lost = between = 0.0
  # Going backwards: whatever an attempt did after the step that any later one
  # started from was for nothing.
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
      # Clocks of two hosts may disagree by more than a restart takes.
      between += max(later_start - (attempt.start + attempt.wall), 0.0)
    later_start = attempt.start
  parts[STEPS] -= lost
  return Life(
    parts=parts, lost=lost, between=between, num_attempts=len(attempts)
  )


def report(told: Life) -> str:
  """Returns a table of the parts, which add up to its total."""
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


def read(workdir: pathlib.Path) -> list[Attempt]:
  """Returns the attempts of a run, in their order; none if there is no file."""
  path = workdir / layout.GOODPUT
  lines = path.read_text().splitlines() if path.exists() else []
  return [Attempt(**json.loads(line)) for line in lines]


class Goodput:
  """Measures one attempt. Its parts follow each other without a gap."""

  def __init__(
    self,
    workdir: pathlib.Path | None,
    *,
    first_step: int = 0,
    seconds_before: float = 0.0,
    clock: Callable[[], float] = time.perf_counter,
    wall: Callable[[], float] = time.time,
  ):
    """Starts to measure the start-up.

    Args:
      workdir: where earlier attempts are read and this one is written; None
        for all processes but the first.
      first_step: how many steps the attempts before have taken.
      seconds_before: how long this process had been running.
      clock: seconds since anything.
      wall: seconds since 1970.
    """
    self._workdir = workdir
    self._clock = clock
    self._part = 'start-up'
    self._since = clock()
    self._written_at: float | None = None
    self._earlier = [] if workdir is None else read(workdir)
    self._now = Attempt(
      start=wall() - seconds_before,
      first_step=first_step,
      step=first_step,
      seconds={**dict.fromkeys(PARTS, 0.0), 'start-up': seconds_before},
      marks=[],
    )

  def enter(self, part: str) -> None:
    """Counts what comes as `part`, a key of PARTS."""
    now = self._clock()
    self._now.seconds[self._part] += now - self._since
    self._part, self._since = part, now

  @contextlib.contextmanager
  def during(self, part: str) -> Iterator[None]:
    """Counts what is inside as `part`, and then goes on as before."""
    before = self._part
    self.enter(part)
    try:
      yield
    finally:
      self.enter(before)

  def seconds(self, *parts: str) -> float:
    """Returns what went to these parts so far."""
    self.enter(self._part)
    return sum(self._now.seconds[part] for part in parts)

  def move(self, seconds: float, source: str, target: str) -> None:
    """Counts some of what went to `source` as `target` instead."""
    seconds = min(seconds, self._now.seconds[source])
    self._now.seconds[source] -= seconds
    self._now.seconds[target] += seconds

  def begin(self, first_step: int) -> None:
    """Says how many steps were taken before: a checkpoint may be damaged."""
    self._now.first_step = self._now.step = first_step

  def reached(self, step: int) -> None:
    """Says that the steps up to `step` are done, and writes now and then."""
    self._now.step = step
    now = self._clock()
    last = self._written_at
    if last is None or now - last >= _SECONDS_BETWEEN_WRITES:
      self.write()

  def mark(self, step: int) -> None:
    """Remembers the time of a step that may be gone back to."""
    self._now.marks.append((step, self.seconds(STEPS)))
    del self._now.marks[:-_MAX_MARKS]

  def life(self) -> Life:
    """Returns the run so far, with all attempts before this one."""
    self.enter(self._part)
    return life([*self._earlier, self._now])

  def write(self) -> None:
    """Brings the file up to date; a kill leaves it as it was before or after.

    A file that cannot be written is no reason to end a run.
    """
    self.enter(self._part)
    self._written_at = self._since
    if self._workdir is None:
      return
    lines = [
      json.dumps(dataclasses.asdict(attempt)) + '\n'
      for attempt in (*self._earlier, self._now)
    ]
    path = self._workdir / layout.GOODPUT
    with contextlib.suppress(OSError):
      # Not durable: the loop would wait for the disk once a second.
      atomic.write_text(path, ''.join(lines), durable=False)

  @contextlib.contextmanager
  def written(self) -> Iterator[None]:
    """Brings the file up to date before and after the block.

    After it even if the block fails: the time of a failed attempt counts.
    """
    self.write()
    try:
      yield
    finally:
      self.write()


def process_age() -> float:
  """Returns how long ago this process was started; 0 where nobody tells.

  Importing jax takes seconds, and comes before any clock of ours. Linux tells
  when a process was started; see proc(5), field 22 of stat.
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
  attempts = read(workdir)
  if not attempts:
    sys.exit(
      f'error: --workdir={workdir}: got no {layout.GOODPUT}, expected the'
      ' workdir of a run that has taken a step'
    )
  print(report(life(attempts)))


if __name__ == '__main__':
  flags.DEFINE_string('workdir', None, 'Of the run.', required=True)
  app.run(main)
