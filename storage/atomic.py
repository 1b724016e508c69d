"""Atomic writes: a file or a directory that is whole, or not there at all.

The promise, for a process that is killed and for a machine that loses power at
any moment: a reader finds the old contents, the new contents, or no file. It
never finds a part. When a function returns, the new contents are on the disk.

Every write follows the same five steps:

    1. write under a hidden name beside the target: .NAME.partial-1a2b3c4d
    2. fsync each file, or a rename could reach the disk before the contents
    3. fsync each directory that was written, so that the disk has its names
    4. rename to the target, which the file system does in one step
    5. fsync the parent directory, so that the disk has the new name

A write that fails removes its hidden file. A process that is killed leaves it;
`remove_leftovers` deletes it later.

Reference: Pillai et al. 2014, "All File Systems Are Not Created Equal".
"""

from collections.abc import Iterator
import contextlib
import os
import pathlib
import re
import secrets
import shutil

_LEFTOVER = re.compile(
  r'\.(?P<name>.+)\.(?P<role>partial|previous)-[0-9a-f]{8}'
)


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
  partial.mkdir(parents=True)
  try:
    yield partial
    publish(partial, target)
  finally:
    shutil.rmtree(partial, ignore_errors=True)


def publish(partial: pathlib.Path, target: pathlib.Path) -> None:
  """Renames a finished directory to `target`, when the disk has all of it.

  A directory cannot replace a full one in one step. The old one is set aside
  first and deleted last; `remove_leftovers` puts it back if a kill comes in
  between.
  """
  for directory, _, names in os.walk(partial, topdown=False):
    for name in names:
      sync(pathlib.Path(directory, name))
    sync(pathlib.Path(directory))
  previous = None
  if target.exists():
    previous = _beside(target, 'previous')
    os.replace(target, previous)
  try:
    os.replace(partial, target)
  except OSError:
    if previous is not None:
      os.replace(previous, target)
    raise
  sync(target.parent)
  if previous is not None:
    shutil.rmtree(previous)


def remove_leftovers(directory: pathlib.Path, name: str = '') -> None:
  """Deletes what killed processes left of their writes.

  The caller must know that no other process is writing there.

  Args:
    directory: in which the files and directories were written.
    name: of the one that was written; all of them if empty.
  """
  for path in directory.iterdir():
    found = _LEFTOVER.fullmatch(path.name)
    if not found or name not in ('', found['name']):
      continue
    target = directory / found['name']
    if found['role'] == 'previous' and not target.exists():
      os.replace(path, target)
    elif path.is_dir():
      shutil.rmtree(path, ignore_errors=True)
    else:
      path.unlink(missing_ok=True)


def is_leftover(path: pathlib.Path) -> bool:
  """Returns whether the name is that of an unfinished write."""
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
