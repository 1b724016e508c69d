"""Directories that are derived from other data, and read at every start.

Token stores and row plans are such directories. A directory is written once,
whole or not at all (`storage.locks`), with the size and the SHA-256 of each of
its files in `files.json`. `open_or_write` compares the sizes at every open. It
compares the digests once per machine and boot: `verified.json` remembers the
files that were right (`storage.remembered`). Nothing can be remembered in a
read-only directory, so its files are digested at every start.
"""

from collections.abc import Callable
import json
import pathlib

from storage import digests, locks, remembered

_LIST, _VERIFIED = 'files.json', 'verified.json'


class DamagedError(ValueError):
  """A file that differs from the file that was written."""


def open_or_write(
  directory: pathlib.Path, write: Callable[[pathlib.Path], None]
) -> None:
  """Makes a directory, or verifies it if it exists.

  Args:
    directory: made whole or not at all.
    write: fills the empty directory that it is given.

  Raises:
    OSError: it cannot be written; nothing is left behind.
    DamagedError: a file is missing, truncated or altered.
  """

  def write_listed(partial: pathlib.Path) -> None:
    write(partial)
    add_list(partial)

  if directory.is_dir():
    check(directory)
  else:
    locks.write_once(directory, write_listed)


def add_list(directory: pathlib.Path) -> None:
  """Writes the list of the files that are in a new directory."""
  entries = digests.of_files(directory, digests.names(directory))
  (directory / _LIST).write_text(json.dumps(entries, indent=1) + '\n')


def check(directory: pathlib.Path) -> None:
  """Compares the files of a directory with its list.

  Files outside the list are ignored.

  Raises:
    DamagedError: a file is missing, truncated or altered.
  """
  listed = _listed(directory)
  paths = [directory / name for name in listed]
  for path, expected in zip(paths, listed.values(), strict=True):
    try:
      num_bytes = path.stat().st_size
    except OSError as error:
      raise _damaged(directory, path, str(error), f'{expected}') from None
    if num_bytes != expected.num_bytes:
      raise _damaged(
        directory,
        path,
        f'{num_bytes} bytes',
        f'{expected.num_bytes}: it was truncated or altered',
      )
  try:
    found = remembered.sha256_of(paths, directory / _VERIFIED, per_boot=True)
  except OSError as error:
    raise _damaged(directory, directory, str(error), 'to read it') from None
  for path, sha256, expected in zip(paths, found, listed.values(), strict=True):
    if sha256 != expected.sha256:
      raise _damaged(
        directory,
        path,
        f'SHA-256 {sha256}',
        f'{expected.sha256}: its bytes were altered',
      )


def _listed(directory: pathlib.Path) -> dict[str, digests.Entry]:
  path = directory / _LIST
  try:
    listed = json.loads(path.read_text())
    entries = {name: digests.Entry(*entry) for name, entry in listed.items()}
  except (OSError, ValueError, TypeError, AttributeError) as error:
    raise _damaged(directory, path, repr(error), 'a list of files') from None
  return entries


def _damaged(
  directory: pathlib.Path, path: pathlib.Path, got: str, expected: str
) -> DamagedError:
  return DamagedError(
    f'{path}: got {got}, expected {expected}; delete {directory}, and start'
    ' again: it is made again from its data'
  )
