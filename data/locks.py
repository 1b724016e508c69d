"""Directories that are made once, whoever asks and however often it is killed.

A directory is written beside its place and renamed, so that one that exists is
complete. A lock file puts those in line who would make it at the same time;
whoever holds it may remove what a killed one left behind. On a shared file
system this holds between hosts, too, wherever it knows `flock` (NFS does).
"""

from collections.abc import Callable, Iterator
import contextlib
import fcntl
import pathlib
import shutil


def write_once(
  directory: pathlib.Path, write: Callable[[pathlib.Path], None]
) -> None:
  """Makes `directory` unless it is there, which needs no write access.

  Args:
    directory: where it will be.
    write: fills an empty directory that it is given.

  Raises:
    OSError: it cannot be written; nothing is left behind.
  """
  if directory.is_dir():
    return
  directory.parent.mkdir(parents=True, exist_ok=True)
  with locked(directory.parent / f'.{directory.name}.lock'):
    if directory.is_dir():
      return
    partial = directory.parent / f'.{directory.name}.partial'
    # Nobody else is writing, so this is what a killed process left.
    shutil.rmtree(partial, ignore_errors=True)
    try:
      partial.mkdir()
      write(partial)
      partial.replace(directory)
    finally:
      shutil.rmtree(partial, ignore_errors=True)


@contextlib.contextmanager
def locked(path: pathlib.Path) -> Iterator[None]:
  """Holds `path` locked; the kernel unlocks it if the process dies."""
  with path.open('w') as file:
    fcntl.flock(file, fcntl.LOCK_EX)
    yield
