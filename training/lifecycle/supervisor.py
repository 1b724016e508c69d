"""Starts a run again when it dies: `train.py --max_restarts=N`.

The process becomes a parent that waits for one child, the same command without
the flag. Signals are passed on to the child; when it ends by itself, its exit
code says what to do (`training/lifecycle/exit_codes.py`): leave with it, or
start it again after a moment that doubles from one restart to the next. A
checkpoint newer than the last is progress: the number of restarts, and the
moment, start from the beginning.

A crash that repeats itself would burn the rest of the budget, so two attempts
that die after the same step, as the run's metrics tell it, end the run with a
diagnosis. It takes three where the cause may lie outside, because the attempt
was killed, lost its peer, or had not taken a step.

Of several processes each has a supervisor of its own, which need not know of
the others: survivors of a dead one end by themselves within the heartbeat's
timeout, all are started again, and meet at the coordinator's port as before.

Nothing here imports jax, which would hold devices that the child needs.
"""

from collections.abc import Callable, Sequence
import contextlib
import ctypes
import dataclasses
import json
import os
import pathlib
import re
import signal
import subprocess
import sys
import threading
from typing import IO

from storage import layout
from training.lifecycle import exit_codes

# Tells a child who its supervisor is.
PARENT = 'TWO_LIVES_SUPERVISOR'
_FIRST_PAUSE_S = 1.0
_LONGEST_PAUSE_S = 60.0
_MOST_ALIKE = 2  # attempts that die after the same step
_MOST_ALIKE_OUTSIDE = 3  # if the cause may lie outside
_TAIL_BYTES = 16_384  # of stderr, kept for a diagnosis
_TAIL_LINES = 15
_METRICS_BYTES = 65_536  # at their end; many times a record
_LINE_WIDTH = 160
_PR_SET_PDEATHSIG = 1  # linux/prctl.h
# What jax and gloo say when another process of the run is gone.
_PEER_IS_GONE = re.compile(
  r'coordination service|distributed service|heartbeat|by peer', re.IGNORECASE
)
_EXCEPTION = re.compile(r'[\w.]*(Error|Exception|Interrupt|Exit)\b')


@dataclasses.dataclass(frozen=True, kw_only=True)
class Seen:
  """What a workdir tells of the run."""

  checkpoint: int | None  # step of the newest, complete by its name
  step: int  # the last in the metrics, 0 if there is none
  metrics: tuple[int, ...]  # changes whenever the metrics do

  @classmethod
  def look(cls, workdir: pathlib.Path) -> 'Seen':
    """Reads a workdir, which may not be there yet."""
    names = [path.name for path in (workdir / layout.CHECKPOINTS).glob('*')]
    checkpoint = max(map(int, filter(str.isdigit, names)), default=None)
    path = workdir / layout.METRICS
    if not path.exists():
      return cls(checkpoint=checkpoint, step=0, metrics=())
    stat = path.stat()
    return cls(
      checkpoint=checkpoint,
      step=_last_step(path),
      metrics=(stat.st_ino, stat.st_size, stat.st_mtime_ns),
    )


@dataclasses.dataclass(frozen=True, kw_only=True)
class Death:
  """How an attempt ended that was not meant to end."""

  code: int  # exit code, as a shell gives it
  first_step: int  # the checkpoint it began from
  step: int  # the last that is in the metrics; first_step if it took none
  tail: str  # of what it wrote to stderr

  @classmethod
  def between(
    cls, before: Seen, after: Seen, *, code: int, tail: str
  ) -> 'Death':
    """Returns the death of an attempt, from its workdir before and after."""
    first_step = before.checkpoint or 0
    # Metrics of the attempt before are still there if this one died early.
    is_moved = after.metrics != before.metrics
    step = max(after.step, first_step) if is_moved else first_step
    return cls(code=code, first_step=first_step, step=step, tail=tail)

  @property
  def cause(self) -> str:
    """Returns the signal, or the exception, in a line."""
    name = exit_codes.name(self.code)
    lines = [line for line in self.tail.splitlines() if line.strip()]
    told = [line for line in lines if _EXCEPTION.match(line)]
    return f'{name}, {told[-1][:_LINE_WIDTH]}' if told else name

  @property
  def may_come_from_outside(self) -> bool:
    """Returns whether another start, by itself, might well succeed."""
    return (
      self.code in (128 + signal.SIGKILL, exit_codes.TRY_AGAIN)
      or self.step <= self.first_step
      or _PEER_IS_GONE.search(self.tail) is not None
    )


class Supervisor:
  """Runs a command until it ends for good."""

  def __init__(
    self,
    command: Sequence[str],
    workdir: pathlib.Path,
    *,
    max_restarts: int,
    first_pause_s: float = _FIRST_PAUSE_S,
    say: Callable[[str], None] = lambda text: print(
      text, file=sys.stderr, flush=True
    ),
  ):
    """Prepares to run.

    Args:
      command: the child's, with its arguments.
      workdir: of the run; only read.
      max_restarts: in a row without a new checkpoint.
      first_pause_s: before the first restart.
      say: where the user is told.
    """
    self._command = command
    self._workdir = workdir
    self._max_restarts = max_restarts
    self._first_pause_s = first_pause_s
    self._say = say
    self._child: subprocess.Popen[bytes] | None = None
    self._asked: int | None = None  # the signal to stop, when there was one
    self._wake = threading.Event()

  def run(self) -> int:
    """Returns what to exit with. To be called in the main thread."""
    previous = {
      number: signal.signal(number, self._pass_on)
      for number in (signal.SIGTERM, signal.SIGINT)
    }
    try:
      return self._run()
    finally:
      for number, handler in previous.items():
        signal.signal(number, handler)

  def _run(self) -> int:
    deaths: list[Death] = []  # since the last progress
    while True:
      before = Seen.look(self._workdir)
      code, tail = self._attempt()
      if self._asked is not None:
        return code
      if code in exit_codes.FINAL:
        if code and code not in exit_codes.STOPPED:
          self._say(f'supervisor: exit code {code} is final, not restarted')
        return code
      after = Seen.look(self._workdir)
      if (after.checkpoint or 0) > (before.checkpoint or 0):
        deaths = []
      deaths.append(Death.between(before, after, code=code, tail=tail))
      if is_same_step(deaths):
        self._say(diagnosis(deaths, after.checkpoint))
        return exit_codes.SAME_STEP
      if len(deaths) > self._max_restarts:
        self._say(
          f'supervisor: died of {deaths[-1].cause} after step'
          f' {deaths[-1].step}, and the {self._max_restarts} restarts of'
          ' --max_restarts are used up without a new checkpoint'
        )
        return exit_codes.TRY_AGAIN
      if not self._pause(deaths):
        return 128 + (self._asked or 0)

  def _pause(self, deaths: list[Death]) -> bool:
    """Waits before the next attempt; returns whether there is to be one."""
    seconds = min(
      self._first_pause_s * 2 ** (len(deaths) - 1), _LONGEST_PAUSE_S
    )
    self._say(
      f'supervisor: died of {deaths[-1].cause} after step {deaths[-1].step};'
      f' restart {len(deaths)} of {self._max_restarts} in {seconds:.0f} s'
    )
    self._wake.wait(seconds)
    return self._asked is None

  def _attempt(self) -> tuple[int, str]:
    """Runs the child to its end; returns its exit code and the last it said."""
    child = subprocess.Popen(
      self._command,
      env={**os.environ, PARENT: str(os.getpid())},
      stderr=subprocess.PIPE,
      # Ctrl-C would reach both of us, and the child twice: the second time it
      # does not save.
      process_group=0,
    )
    self._child = child
    if self._asked is not None:  # while it was started
      child.send_signal(self._asked)
    assert child.stderr is not None
    tail = _Tail(child.stderr)
    code = exit_codes.of_returncode(child.wait())
    self._child = None
    # Workers of its own, which hold the pipe, and files, open.
    _kill_group(child.pid)
    return code, tail.text()

  def _pass_on(self, number, frame) -> None:
    del frame
    self._asked = number
    self._wake.set()
    if self._child is not None:
      self._child.send_signal(number)


class _Tail(threading.Thread):
  """Copies a child's stderr to ours, and remembers the end of it."""

  def __init__(self, pipe: IO[bytes]):
    super().__init__(daemon=True)
    self._pipe = pipe
    self._kept = b''
    self.start()

  def run(self) -> None:
    """Copies until the last holder of the pipe closes it."""
    with self._pipe:
      while chunk := os.read(self._pipe.fileno(), 65_536):
        self._kept = (self._kept + chunk)[-_TAIL_BYTES:]
        # Ours may be closed; the child's has to be emptied all the same.
        with contextlib.suppress(OSError, ValueError):
          sys.stderr.buffer.write(chunk)
          sys.stderr.buffer.flush()

  def text(self) -> str:
    """Returns the end of what was said; to be asked after the child's."""
    self.join(timeout=5.0)
    return self._kept.decode(errors='replace')


def _kill_group(pid: int) -> None:
  with contextlib.suppress(ProcessLookupError):  # nobody was left
    os.killpg(pid, signal.SIGKILL)


def die_with_supervisor() -> None:
  """Ends this process when its supervisor is gone, if it has one.

  Killed without a word, a supervisor could pass nothing on: its child would go
  on unseen, and write into the workdir beside the next attempt. On systems
  other than Linux it does.
  """
  parent = os.environ.pop(PARENT, '')
  if not parent or sys.platform != 'linux':
    return
  ctypes.CDLL(None).prctl(_PR_SET_PDEATHSIG, signal.SIGKILL)
  try:
    os.kill(int(parent), 0)
  except ProcessLookupError:  # it died before we asked
    os.kill(os.getpid(), signal.SIGKILL)


def _last_step(path: pathlib.Path) -> int:
  """Returns the last step with a record, 0 if there is none."""
  with path.open('rb') as file:
    start = max(file.seek(0, os.SEEK_END) - _METRICS_BYTES, 0)
    file.seek(start)
    lines = file.read().split(b'\n')
  # What is cut short, by a kill or by us, is no record. Saves are told of when
  # they are done, behind later steps.
  whole = lines[1 if start else 0 : -1]
  return max((json.loads(line)['step'] for line in whole), default=0)


def is_same_step(deaths: Sequence[Death]) -> bool:
  """Returns whether the last deaths are one and the same, repeated."""
  last = deaths[-1]
  alike = 0
  for death in reversed(deaths):
    if death.step != last.step:
      break
    alike += 1
  most = _MOST_ALIKE_OUTSIDE if last.may_come_from_outside else _MOST_ALIKE
  return alike >= most


def diagnosis(deaths: Sequence[Death], checkpoint: int | None) -> str:
  """Returns what a person needs to know of a crash that repeats itself."""
  last = deaths[-1]
  alike = [death for death in deaths if death.step == last.step]
  where = (
    f'after step {last.step}'
    if last.step > last.first_step
    else f'before a step was taken from step {last.first_step}'
  )
  saved = 'none' if checkpoint is None else f'step {checkpoint}'
  lines = [
    f'supervisor: error: got {len(alike)} attempts in a row that died {where},'
    ' expected a step more; not restarted',
    *(f'  attempt {i}: {death.cause}' for i, death in enumerate(alike, 1)),
    f'  last good checkpoint: {saved}',
    '  the end of stderr:',
    *(
      f'    | {line[:_LINE_WIDTH]}'
      for line in last.tail.splitlines()[-_TAIL_LINES:]
    ),
    f'  fix: {_advice(last)}',
  ]
  return '\n'.join(lines)


def _advice(death: Death) -> str:
  """Returns what to try first."""
  again = 'then start the same command: it goes on from the checkpoint'
  if _PEER_IS_GONE.search(death.tail):
    return f'look at the process that died first, on its host; {again}'
  if death.code == 128 + signal.SIGKILL:
    return (
      'SIGKILL is sent from outside, mostly for want of memory: ask the'
      f' kernel (dmesg) or the scheduler, give it more or lower'
      f' data.num_threads and data.batch_size; {again}'
    )
  if death.code == exit_codes.CRASHED:
    return f'the exception above names the place; {again}'
  return (
    f'{exit_codes.name(death.code)} comes from native code: start once without'
    f' --max_restarts and with PYTHONFAULTHANDLER=1 to see where; {again}'
  )
