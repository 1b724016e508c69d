"""The supervisor: restarts a run that dies, for `train.py --max_restarts=N`.

The process becomes the parent of one child, which runs the same command without
the flag. The parent passes signals on to the child. When the child ends, its
exit code decides (`training/lifecycle/exit_codes.py`): the parent exits with
the same code, or starts the child again after a pause. The pause doubles from
one restart to the next. A new checkpoint is progress: it resets the pause and
the number of restarts.

A crash that repeats itself would waste the rest of the budget. So two attempts
in a row that die after the same step, by the metrics of the run, end the run
with a diagnosis. It takes three attempts if the cause may lie outside: the
attempt was killed, lost another process of the run, or took no step.

In a run of several processes each process has its own supervisor, and the
supervisors do not communicate. When one process dies, the others end within the
timeout of the heartbeat. All of them are started again, and meet at the port of
the coordinator as before.

This module does not import jax: jax would hold devices that the child needs.
"""

from collections.abc import Callable, Sequence
import contextlib
import ctypes
import dataclasses
import os
import pathlib
import re
import signal
import subprocess
import sys
import threading
import time
from typing import IO

from storage import file_names, json_lines
from training.lifecycle import exit_codes

# Environment variable with the process id of the supervisor.
PARENT = 'TWO_LIVES_SUPERVISOR'
_FIRST_PAUSE_S = 1.0
_LONGEST_PAUSE_S = 60.0
_LOOK_S = 0.1  # between two looks for a signal, in a pause
_MOST_ALIKE = 2  # attempts that die after the same step
_MOST_ALIKE_OUTSIDE = 3  # if the cause may lie outside
_TAIL_BYTES = 16_384  # of stderr, kept for the diagnosis
_TAIL_LINES = 15
_METRICS_BYTES = 65_536  # read from the end of the file; many records
_LINE_WIDTH = 160
_PR_SET_PDEATHSIG = 1  # linux/prctl.h
# In the errors of jax and gloo when another process of the run has died.
_PEER_IS_GONE = re.compile(
  r'coordination service|distributed service|heartbeat|by peer', re.IGNORECASE
)
_EXCEPTION = re.compile(r'[\w.]*(Error|Exception|Interrupt|Exit)\b')


@dataclasses.dataclass(frozen=True, kw_only=True)
class Seen:
  """The progress of a run, as its workdir shows it."""

  checkpoint: int | None  # step of the newest checkpoint, not verified
  step: int  # last step in the metrics; 0: there is none
  metrics: tuple[int, ...]  # changes whenever the metrics file changes

  @classmethod
  def look(
    cls,
    workdir: pathlib.Path,
    tell: Callable[[str], None] = lambda text: None,
  ) -> 'Seen':
    """Returns the progress in a workdir, which need not exist yet.

    Args:
      workdir: directory of the run.
      tell: receives a line if lines of the metrics are damaged.
    """
    names = [path.name for path in (workdir / file_names.CHECKPOINTS).glob('*')]
    checkpoint = max(map(int, filter(str.isdigit, names)), default=None)
    path = workdir / file_names.METRICS
    if not path.exists():
      return cls(checkpoint=checkpoint, step=0, metrics=())
    stat = path.stat()
    return cls(
      checkpoint=checkpoint,
      step=_last_step(path, tell),
      metrics=(stat.st_ino, stat.st_size, stat.st_mtime_ns),
    )


@dataclasses.dataclass(frozen=True, kw_only=True)
class Death:
  """The unwanted end of an attempt."""

  code: int  # exit code, as a shell gives it
  first_step: int  # step of the checkpoint that it resumed from
  step: int  # last step in the metrics; `first_step` if it took none
  tail: str  # end of its stderr

  @classmethod
  def between(
    cls, before: Seen, after: Seen, *, code: int, tail: str
  ) -> 'Death':
    """Returns the death of an attempt."""
    first_step = before.checkpoint or 0
    # If the metrics file is unchanged, its last step belongs to an earlier
    # attempt.
    is_moved = after.metrics != before.metrics
    step = max(after.step, first_step) if is_moved else first_step
    return cls(code=code, first_step=first_step, step=step, tail=tail)

  @property
  def cause(self) -> str:
    """Returns the signal or exit code and the exception, in one line."""
    name = exit_codes.name(self.code)
    lines = [line for line in self.tail.splitlines() if line.strip()]
    told = [line for line in lines if _EXCEPTION.match(line)]
    return f'{name}, {told[-1][:_LINE_WIDTH]}' if told else name

  @property
  def may_come_from_outside(self) -> bool:
    """Returns whether another start may succeed without a change."""
    return (
      self.code in (128 + signal.SIGKILL, exit_codes.TRY_AGAIN)
      or self.step <= self.first_step
      or _PEER_IS_GONE.search(self.tail) is not None
    )


class Supervisor:
  """Runs a command, and restarts it, until it ends for good."""

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
    """Creates the supervisor; `run` starts the child.

    Args:
      max_restarts: number of restarts in a row without a new checkpoint.
    """
    self._command = command
    self._workdir = workdir
    self._max_restarts = max_restarts
    self._first_pause_s = first_pause_s
    self._say = say
    self._child: subprocess.Popen[bytes] | None = None
    self._asked: int | None = None  # signal that asked to stop

  def run(self) -> int:
    """Runs the child to its end; returns the exit code.

    Must be called in the main thread, because it catches signals.
    """
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
    deaths: list[Death] = []  # since the last new checkpoint
    while True:
      before = Seen.look(self._workdir)
      code, tail = self._attempt()
      if self._asked is not None:
        return code
      if code in exit_codes.FINAL:
        if code and code not in exit_codes.STOPPED:
          self._say(f'supervisor: exit code {code} is final, not restarted')
        return code
      after = Seen.look(
        self._workdir, lambda text: self._say(f'supervisor: {text}')
      )
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
    """Waits before the next attempt; returns False if asked to stop."""
    seconds = min(
      self._first_pause_s * 2 ** (len(deaths) - 1), _LONGEST_PAUSE_S
    )
    self._say(
      f'supervisor: died of {deaths[-1].cause} after step {deaths[-1].step};'
      f' restart {len(deaths)} of {self._max_restarts} in {seconds:.0f} s'
    )
    # No lock or event: a signal handler that sets an event waits forever if it
    # interrupts the thread while that thread holds the lock of the event.
    end = time.monotonic() + seconds
    while self._asked is None and (left := end - time.monotonic()) > 0:
      time.sleep(min(left, _LOOK_S))
    return self._asked is None

  def _attempt(self) -> tuple[int, str]:
    """Runs the child once; returns its exit code and the end of its stderr."""
    child = subprocess.Popen(
      self._command,
      env={**os.environ, PARENT: str(os.getpid())},
      stderr=subprocess.PIPE,
      # In its own group: Ctrl-C would reach the child directly and through this
      # process, and the second Ctrl-C ends the child before it saves.
      process_group=0,
    )
    self._child = child
    if self._asked is not None:  # a signal came while the child was started
      child.send_signal(self._asked)
    assert child.stderr is not None
    tail = _Tail(child.stderr)
    code = exit_codes.of_returncode(child.wait())
    self._child = None
    # The workers of the child would keep the pipe and files open.
    _kill_group(child.pid)
    return code, tail.text()

  def _pass_on(self, number, frame) -> None:
    del frame
    self._asked = number
    if self._child is not None:
      self._child.send_signal(number)


class _Tail(threading.Thread):
  """Copies the stderr of a child to ours, and keeps the end of it."""

  def __init__(self, pipe: IO[bytes]):
    super().__init__(daemon=True)
    self._pipe = pipe
    self._kept = b''
    self.start()

  def run(self) -> None:
    """Copies until the last process with the pipe closes it."""
    with self._pipe:
      while chunk := os.read(self._pipe.fileno(), 65_536):
        self._kept = (self._kept + chunk)[-_TAIL_BYTES:]
        # If our stderr is closed, the pipe must be emptied all the same: a full
        # pipe would stop the child.
        with contextlib.suppress(OSError, ValueError):
          sys.stderr.buffer.write(chunk)
          sys.stderr.buffer.flush()

  def text(self) -> str:
    """Returns the end of stderr. Called when the child has ended."""
    self.join(timeout=5.0)
    return self._kept.decode(errors='replace')


def _kill_group(pid: int) -> None:
  with contextlib.suppress(ProcessLookupError):  # the group is empty
    os.killpg(pid, signal.SIGKILL)


def die_with_supervisor() -> None:
  """Makes this process die when its supervisor dies, if it has one.

  A supervisor that is killed by SIGKILL passes no signal on. Its child would
  continue, and write into the workdir beside the next attempt. Linux only; on
  other systems the child continues.
  """
  parent = os.environ.pop(PARENT, '')
  if not parent or sys.platform != 'linux':
    return
  ctypes.CDLL(None).prctl(_PR_SET_PDEATHSIG, signal.SIGKILL)
  try:
    os.kill(int(parent), 0)
  except ProcessLookupError:  # the supervisor died before prctl took effect
    os.kill(os.getpid(), signal.SIGKILL)


def _last_step(path: pathlib.Path, tell: Callable[[str], None]) -> int:
  """Returns the last step with a record, 0 if there is none."""
  with path.open('rb') as file:
    start = max(file.seek(0, os.SEEK_END) - _METRICS_BYTES, 0)
    file.seek(start)
    lines = file.read().split(b'\n')
  # The first line may be cut by `start`, and the last one by a kill.
  whole = lines[1 if start else 0 : -1]
  # Not the step of the last line: a save is recorded when it ends, after later
  # steps.
  records, damaged = json_lines.parse(whole, ('step',))
  if damaged:
    tell(json_lines.skipped(f'the end of {path}', damaged))
  steps = [record['step'] for record in records]
  return max((s for s in steps if isinstance(s, int)), default=0)


def is_same_step(deaths: Sequence[Death]) -> bool:
  """Returns whether the last deaths are one crash that repeats itself."""
  last = deaths[-1]
  alike = 0
  for death in reversed(deaths):
    if death.step != last.step:
      break
    alike += 1
  most = _MOST_ALIKE_OUTSIDE if last.may_come_from_outside else _MOST_ALIKE
  return alike >= most


def diagnosis(deaths: Sequence[Death], checkpoint: int | None) -> str:
  """Returns the report of a crash that repeats itself, for the user."""
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
  """Returns the first thing to try after a death."""
  again = 'then start the same command: it resumes from the checkpoint'
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
