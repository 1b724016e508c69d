"""Atomic writes: a file or a directory that is whole, or not there at all.

The promise, for a process that is killed and for a machine that loses power at
any moment: a reader finds the old contents, the new contents, or no file. It
never finds a part. When a function returns, the new contents are on the disk.

Every write follows the same five steps:

    1. write under a hidden name beside the target: .NAME.partial-1a2b3c4d
    2. fsync each file, or a rename could reach the disk before the contents
    3. fsync each directory that was written, so that the disk has its names
    4. rename to the target, which the file system does in one step. A full
       directory cannot be replaced so: the two exchange their names, and the
       old one is deleted. A file system without that step renames twice; see
       `restore`
    5. fsync the parent directory, so that the disk has the new name

A write that fails removes its hidden file. A process that is killed leaves it;
`remove_leftovers` deletes it later.

References: renameat2(2) for the exchange; Pillai et al. 2014, "All File Systems
Are Not Created Equal".
"""

from collections.abc import Iterator
import contextlib
import ctypes
import os
import pathlib
import re
import secrets
import shutil

_LEFTOVER = re.compile(
  r'\.(?P<name>.+)\.(?P<role>partial|previous)-[0-9a-f]{8}'
)

# Python has no function for it. None where the C library has none.
_renameat2 = getattr(ctypes.CDLL(None), 'renameat2', None)
_AT_FDCWD, _RENAME_EXCHANGE = -100, 2


def write_text(path: pathlib.Path, text: str, *, durable: bool = True) -> None:
  """Writes a text file as UTF-8, see `write_bytes`."""
  write_bytes(path, text.encode('utf-8'), durable=durable)


def write_bytes(
  path: pathlib.Path, data: bytes, *, durable: bool = True
) -> None:
  """Writes a file; replaces an existing file in one step.

  Several processes may write the same file at once: the last one wins.

  Args:
    path: the file. Its directory exists.
    data: the contents.
    durable: False leaves out both fsyncs, for a file that is written too often
      to wait for the disk. Such a file survives a kill, not a power loss.

  Raises:
    OSError: it cannot be written; the old file is unchanged.
  """
  partial = _beside(path, 'partial')
  try:
    with partial.open('wb') as file:
      file.write(data)
      file.flush()
      if durable:
        os.fsync(file.fileno())
    os.replace(partial, path)
  except BaseException:
    partial.unlink(missing_ok=True)
    raise
  if durable:
    sync(path.parent)


@contextlib.contextmanager
def new_directory(target: pathlib.Path) -> Iterator[pathlib.Path]:
  """Yields an empty directory that becomes `target` when the block ends.

  A block that raises leaves nothing behind and `target` unchanged.

  Args:
    target: a directory that exists is replaced. Its parents are created.

  Raises:
    OSError: it cannot be written; `target` is unchanged.
  """
  partial = _beside(target, 'partial')
  make_directory(partial)
  try:
    yield partial
    publish(partial, target)
  finally:
    shutil.rmtree(partial, ignore_errors=True)


def make_directory(path: pathlib.Path) -> None:
  """Makes a directory and its parents; the disk has all of their names."""
  missing = [parent for parent in (path, *path.parents) if not parent.exists()]
  path.mkdir(parents=True, exist_ok=True)
  for directory in reversed(missing[1:]):
    sync(directory.parent)


def publish(partial: pathlib.Path, target: pathlib.Path) -> None:
  """Renames a finished directory to `target`, when the disk has all of it.

  A directory that is there is replaced and deleted.
  """
  for directory, _, names in os.walk(partial, topdown=False):
    for name in names:
      sync(pathlib.Path(directory, name))
    sync(pathlib.Path(directory))
  if not target.exists():
    os.replace(partial, target)
    sync(target.parent)
    return
  old = partial if _exchange(partial, target) else _set_aside(partial, target)
  sync(target.parent)
  shutil.rmtree(old)


def _exchange(path: pathlib.Path, other: pathlib.Path) -> bool:
  """Exchanges two names in one step; returns whether it could."""
  if _renameat2 is None:
    return False
  names = os.fsencode(path), os.fsencode(other)
  # 0 is success. Some file systems, such as NFS, have no exchange. Any other
  # error occurs again in the two steps, which raise it.
  return not _renameat2(
    _AT_FDCWD, names[0], _AT_FDCWD, names[1], ctypes.c_uint(_RENAME_EXCHANGE)
  )


def _set_aside(partial: pathlib.Path, target: pathlib.Path) -> pathlib.Path:
  """Replaces `target` in two steps; returns the old directory's new name."""
  previous = _beside(target, 'previous')
  try:
    os.replace(target, previous)
    os.replace(partial, target)
  except BaseException:  # Ctrl-C, too, may come between the two
    restore(target)
    raise
  return previous


def restore(target: pathlib.Path) -> None:
  """Puts back a directory that a killed process had set aside.

  Does nothing if `target` is there.

  Raises:
    OSError: it cannot be renamed.
  """
  if os.path.lexists(target) or not target.parent.is_dir():
    return
  aside = [
    path
    for path in target.parent.iterdir()
    if (found := _LEFTOVER.fullmatch(path.name))
    and (found['name'], found['role']) == (target.name, 'previous')
  ]
  if aside:
    # A rename sets the time of change: the newest was set aside last.
    os.replace(max(aside, key=lambda path: path.stat().st_ctime_ns), target)


def remove_leftovers(directory: pathlib.Path, name: str = '') -> None:
  """Restores or deletes the leftovers of writes by killed processes.

  The caller must know that no other process is writing there.

  Args:
    directory: in which the files and directories were written.
    name: name of the file or directory that was written; '' for all.
  """
  for path in list(directory.iterdir()):
    found = _LEFTOVER.fullmatch(path.name)
    if not found or name not in ('', found['name']):
      continue
    restore(directory / found['name'])
    if path.is_dir():
      shutil.rmtree(path, ignore_errors=True)
    else:
      path.unlink(missing_ok=True)


def is_leftover(path: pathlib.Path) -> bool:
  """Returns whether the name belongs to an unfinished write."""
  return _LEFTOVER.fullmatch(path.name) is not None


def sync(path: pathlib.Path) -> None:
  """Returns when the disk has a file's contents, or a directory's names."""
  descriptor = os.open(path, os.O_RDONLY)
  try:
    os.fsync(descriptor)
  finally:
    os.close(descriptor)


def _beside(target: pathlib.Path, role: str) -> pathlib.Path:
  """Returns a new hidden name in the directory of `target`."""
  # In the same directory: a rename across file systems would be a copy.
  return target.with_name(f'.{target.name}.{role}-{secrets.token_hex(4)}')
