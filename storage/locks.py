"""Lock files: one writer at a time, on one host or on several.

A lock is an `flock`: the kernel releases it when the process ends, even after a
crash. Hosts that share a file system share its locks if the file system knows
`flock`, as NFS does.
"""

from collections.abc import Callable, Iterator
import contextlib
import fcntl
import os
import pathlib
import socket

from storage import atomic


class InUseError(RuntimeError):
  """Another process holds a lock that is not waited for."""


def write_once(
  directory: pathlib.Path, write: Callable[[pathlib.Path], None]
) -> None:
  """Makes a directory, unless it is there; that case needs no write access.

  Processes that call this at the same time wait for the first one.

  Args:
    directory: made whole or not at all, see `storage.atomic`.
    write: fills the empty directory that it is given.

  Raises:
    OSError: it cannot be written; nothing is left behind.
  """
  if directory.is_dir():
    return
  atomic.make_directory(directory.parent)
  with locked(directory.parent / f'.{directory.name}.lock'):
    # Another process may have made it while this one waited.
    if directory.is_dir():
      return
    atomic.remove_leftovers(directory.parent, directory.name)
    with atomic.new_directory(directory) as partial:
      write(partial)


@contextlib.contextmanager
def locked(path: pathlib.Path) -> Iterator[None]:
  """Holds a lock file; waits until no other process does."""
  with path.open('w') as file:
    fcntl.flock(file, fcntl.LOCK_EX)
    yield


@contextlib.contextmanager
def held(
  path: pathlib.Path,
  place: str,
  tell: Callable[[str], None] = lambda text: None,
) -> Iterator[None]:
  """Holds a lock file, and refuses to wait for it.

  The file names the process that holds it. The block may delete it.

  Args:
    path: path of the lock file. Its directory is created.
    place: the locked directory as the user writes it, for the error text.
    tell: receives a warning if the file system has no locks.

  Raises:
    InUseError: another process holds it.
    OSError: it cannot be made.
  """
  descriptor = _take(path, place, tell)
  try:
    me = f'process {os.getpid()} of {socket.gethostname()}'
    # On a full disk: the lock holds without a name, and the error is raised by
    # the first write that matters.
    with contextlib.suppress(OSError):
      os.truncate(descriptor, 0)
      os.write(descriptor, me.encode())
    yield
  finally:
    os.close(descriptor)


def _take(path: pathlib.Path, place: str, tell: Callable[[str], None]) -> int:
  """Returns the descriptor of the locked file."""
  while True:
    path.parent.mkdir(parents=True, exist_ok=True)
    descriptor = os.open(path, os.O_RDWR | os.O_CREAT, 0o644)
    try:
      fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError:
      holder = _holder(path)
      os.close(descriptor)
      raise InUseError(
        f'{place}: got a directory that {holder} writes into, expected one that'
        ' no run is using; wait for it, stop it, or use another directory'
      ) from None
    except OSError as error:
      tell(
        f'warning: {path}: got {error}, expected a file system with locks: make'
        f' sure that no other process writes to {place}'
      )
      return descriptor
    # The process that held it may have deleted the file meanwhile. Then this
    # lock is on a file without a name, and keeps no process out.
    with contextlib.suppress(FileNotFoundError):
      if path.stat().st_ino == os.fstat(descriptor).st_ino:
        return descriptor
    os.close(descriptor)


def _holder(path: pathlib.Path) -> str:
  """Returns the words that a process has written into its lock file."""
  with contextlib.suppress(OSError):
    return path.read_text(errors='replace') or 'a process'
  return 'a process'
