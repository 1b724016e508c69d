"""SHA-256 digests of files, and the differences from a list of digests.

Both lists of the project are checked here: the seal of a checkpoint, which has
sizes, and the manifest of a frozen directory, which has none.
"""

from collections.abc import Mapping, Sequence
import concurrent.futures
import hashlib
import json
import os
import pathlib
from typing import Any, Literal, NamedTuple


class Entry(NamedTuple):
  """One file in a list of digests."""

  num_bytes: int | None  # None: the list does not say
  sha256: str  # hex

  def __str__(self) -> str:
    """Returns the entry as a part of an error text."""
    if self.num_bytes is None:
      return f'SHA-256 {self.sha256}'
    return f'{self.num_bytes} bytes and SHA-256 {self.sha256}'


class Difference(NamedTuple):
  """A file that is not as the list says."""

  text: str  # PATH: got X, expected Y
  kind: Literal['missing', 'unlisted', 'altered']


def of_file(path: str | os.PathLike) -> str:
  """Returns the SHA-256 of a file, read in chunks."""
  return entry_of(path).sha256


def entry_of(path: str | os.PathLike) -> Entry:
  """Returns size and SHA-256 of a file, read in chunks."""
  with pathlib.Path(path).open('rb') as file:
    sha256 = hashlib.file_digest(file, 'sha256').hexdigest()
    return Entry(file.tell(), sha256)


def of_json(fields: Mapping[str, Any]) -> str:
  """Returns the SHA-256 of JSON values; the order of keys does not matter."""
  text = json.dumps(fields, sort_keys=True)
  return hashlib.sha256(text.encode()).hexdigest()


def names(directory: pathlib.Path, *, leave_out: str = '') -> list[str]:
  """Returns the relative paths of all files, sorted.

  Args:
    directory: searched with everything below it.
    leave_out: the path of the list itself.
  """
  return sorted(
    name
    for path in directory.rglob('*')
    if path.is_file()
    and (name := path.relative_to(directory).as_posix()) != leave_out
  )


def of_files(
  directory: pathlib.Path, files: Sequence[str], *, num_threads: int = 1
) -> dict[str, Entry]:
  """Returns the entries of files, by the same names.

  Args:
    directory: the names are relative to it.
    files: names.
    num_threads: that read and hash. One leaves the other cores to training.
  """
  with concurrent.futures.ThreadPoolExecutor(num_threads) as pool:
    entries = pool.map(lambda name: entry_of(directory / name), files)
    return dict(zip(files, entries, strict=True))


def differences(
  directory: pathlib.Path,
  found: Sequence[str],
  listed: Mapping[str, Entry],
  *,
  listing: str,
  part: tuple[int, int] = (0, 1),
  num_threads: int = 1,
) -> list[Difference]:
  """Compares the files of a directory with a list; empty if all is well.

  Args:
    directory: the names are relative to it.
    found: the files that are there, see `names`.
    listed: the files that should be there.
    listing: name of the list, for the texts.
    part: (i, n): read every n-th file from the i-th on. The n processes of a
      run share the reading in this way.
    num_threads: that read and hash.
  """
  missing = [
    Difference(
      f'{directory / name}: got no such file, expected a file with {entry}',
      'missing',
    )
    for name, entry in sorted(listed.items())
    if name not in set(found)
  ]
  unlisted = [
    Difference(
      f'{directory / name}: got a file that {listing} does not list, expected'
      ' none',
      'unlisted',
    )
    for name in sorted(set(found) - listed.keys())
  ]

  def compare(name: str) -> Difference | None:
    path, expected = directory / name, listed[name]
    try:
      got = entry_of(path)
    except OSError as error:
      return Difference(f'{path}: got {error}, expected to read it', 'altered')
    if expected.num_bytes is None:
      got = got._replace(num_bytes=None)
    if got == expected:
      return None
    return Difference(
      f'{path}: got {got}, expected {expected}: it was truncated or altered',
      'altered',
    )

  i, n = part
  shared = sorted(listed.keys() & set(found))[i::n]
  with concurrent.futures.ThreadPoolExecutor(num_threads) as pool:
    altered = [each for each in pool.map(compare, shared) if each is not None]
  return missing + unlisted + altered
