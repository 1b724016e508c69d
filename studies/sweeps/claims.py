"""Claims: which process runs which trial, and the trials of killed processes.

A process that runs a trial holds the lock of the trial's directory
(`storage/locks.py`). The kernel releases the lock when the process ends for any
reason. So a trial that Optuna calls running, and whose lock is free, was left
behind: the next process takes it and resumes from its checkpoint. No timeout is
needed. Hosts that share a sweep share the directory, on a file system with
`flock`.
"""

import contextlib
import dataclasses
import pathlib
import secrets
import shutil
from typing import Any

from storage import atomic, locks
from studies.sweeps import store as store_lib
from training import sweep as sweep_lib

RESUMES = ('unfinished', 'errored', 'restart_errored')
TRIALS, _TOKEN, _LOCK, _CLAIM = 'trials', 'sweep.id', '.claims.lock', '.claim'


@dataclasses.dataclass(frozen=True, kw_only=True)
class Claim:
  """A trial that this process runs."""

  trial: Any  # optuna.trial.Trial
  point: int
  params: dict[str, sweep_lib.Scalar]
  directory: pathlib.Path  # with a workdir for each seed
  lock: contextlib.ExitStack

  def release(self) -> None:
    """Lets other processes take the trial, if it is not finished."""
    self.lock.close()


def token(workdir: pathlib.Path) -> str:
  """Returns the identity of a workdir, which its first process draws."""
  atomic.make_directory(workdir)
  path = workdir / _TOKEN
  with locks.locked(workdir / _LOCK):
    if not path.exists():
      atomic.write_text(path, secrets.token_hex(8))
    return path.read_text()


def alone(workdir: pathlib.Path) -> contextlib.AbstractContextManager:
  """Keeps the other processes of a sweep out of its storage meanwhile."""
  return locks.locked(workdir / _LOCK)


class Claims:
  """Hands out the trials of a sweep to this process."""

  def __init__(self, store: store_lib.Store, workdir: pathlib.Path):
    self._store = store
    self._workdir = workdir

  def begin(self, resume: str) -> None:
    """Enqueues the points of the sweep, and errored trials to run again.

    Args:
      resume: one of `RESUMES`.
    """
    with locks.locked(self._workdir / _LOCK):
      self._store.enqueue()
      if resume == 'unfinished':
        return
      for row in self._store.rows():
        if row.state == 'errored':
          self._store.retry(row, restart=resume == 'restart_errored')

  def take(self, most: int) -> list[Claim]:
    """Returns up to `most` trials; trials left behind come first."""
    claims: list[Claim] = []
    with locks.locked(self._workdir / _LOCK):
      for row in self._store.rows():
        if len(claims) == most:
          return claims
        if row.state == 'running' and (lock := self._lock(row.point)):
          claims.append(self._claim(self._store.again(row), row, lock))
      while len(claims) < most and (trial := self._store.ask()) is not None:
        (row,) = (r for r in self._store.rows() if r.number == trial.number)
        lock = self._lock(row.point)
        if lock is None:
          raise locks.InUseError(
            f'{self.directory(row.point)}: got a new trial that another process'
            ' holds, expected none; end the other processes of this sweep'
          )
        claims.append(self._claim(trial, row, lock))
    return claims

  def directory(self, point: int) -> pathlib.Path:
    """Returns the directory of a point."""
    return self._workdir / TRIALS / f'{point:04d}'

  def _claim(self, trial, row, lock) -> Claim:
    directory = self.directory(row.point)
    # Only once: a restart that is killed resumes from its own checkpoint.
    done = directory / f'.restarted-{row.number}'
    if row.is_restart and not done.exists():
      for path in directory.glob('seed*'):
        shutil.rmtree(path)
      done.touch()
    return Claim(
      trial=trial,
      point=row.point,
      params=dict(trial.params),
      directory=directory,
      lock=lock,
    )

  def _lock(self, point: int) -> contextlib.ExitStack | None:
    """Takes the lock of a point; None if another process holds it."""
    directory, stack = self.directory(point), contextlib.ExitStack()

    def refuse(text: str) -> None:
      raise ValueError(
        f'--workdir={self._workdir}: got a file system without locks, expected'
        ' one with flock, which the processes of a sweep need to share trials;'
        f' use another --workdir ({text})'
      )

    try:
      stack.enter_context(
        locks.held(directory / _CLAIM, str(directory), refuse)
      )
    except locks.InUseError:
      return None
    return stack
