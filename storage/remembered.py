"""SHA-256 of large files, remembered from one start to the next.

A file counts as unchanged while its path, size, inode, and both of its times
are the same, in nanoseconds. A program can set the time of modification, but
not the time of change (ctime). So a file that was replaced by another one of
equal size and time stamp is hashed again.

Two changes within one tick of the clock leave one time. So the digest of a file
that changed a moment ago is not remembered. A power loss may leave zeros in a
file and its times as they were. `per_boot` remembers until the machine starts
again, for files that this code has written.
"""

from collections.abc import Sequence
import concurrent.futures
import contextlib
import json
import os
import pathlib
import time

from storage import atomic, digests

# Longer than a tick of any clock of a file system that has nanoseconds.
_SETTLED_NS = 1_000_000_000
_NUM_THREADS = 4
# Entries of files as they were before, and of other machines, that are kept.
_NUM_OTHERS = 1000
_BOOT_ID = pathlib.Path('/proc/sys/kernel/random/boot_id')


def sha256_of(
  files: Sequence[pathlib.Path],
  memory: pathlib.Path | None,
  *,
  per_boot: bool = False,
) -> list[str]:
  """Returns the SHA-256 of each file; reads the files that may have changed.

  Args:
    files: paths.
    memory: the file that remembers, created if it can be. None: remembers
      nothing.
    per_boot: forgets when the machine starts again.

  Raises:
    OSError: a file cannot be read.
  """
  known = _read(memory)
  boot = _boot_id() if per_boot else ''
  keys = [f'{boot} {identity(file)}' for file in files]
  unknown = [i for i, key in enumerate(keys) if key not in known]

  def digest(i: int) -> str:
    sha256 = digests.of_file(files[i])
    has_settled = started - files[i].stat().st_ctime_ns >= _SETTLED_NS
    if has_settled and f'{boot} {identity(files[i])}' == keys[i]:
      settled[keys[i]] = sha256
    return sha256

  started, settled = time.time_ns(), {}
  with concurrent.futures.ThreadPoolExecutor(_NUM_THREADS) as pool:
    found = dict(zip(unknown, pool.map(digest, unknown), strict=True))
  if settled and memory is not None:
    _write(memory, known | settled, len(files))
  return [found[i] if i in found else known[key] for i, key in enumerate(keys)]


def identity(file: pathlib.Path) -> str:
  """Returns path, size, inode and times: text that changes with the file."""
  path, stat = file.resolve(), file.stat()
  # Without the device: its number differs from one mount to the next.
  times = f'{stat.st_mtime_ns} {stat.st_ctime_ns}'
  return f'{stat.st_size} {stat.st_ino} {times} {path}'


def _read(memory: pathlib.Path | None) -> dict[str, str]:
  """Returns the remembered digests; none if the file is damaged."""
  with contextlib.suppress(OSError, ValueError):
    if memory is not None:
      known = json.loads(memory.read_text(encoding='utf-8'))
      return known if isinstance(known, dict) else {}
  return {}


def _write(memory: pathlib.Path, known: dict[str, str], num_files: int) -> None:
  entries = list(known.items())[-(_NUM_OTHERS + num_files) :]
  # In a read-only place, the next start reads the files again.
  with contextlib.suppress(OSError):
    memory.parent.mkdir(parents=True, exist_ok=True)
    # Surrogates: a path need not be UTF-8. ASCII escapes keep them.
    atomic.write_text(memory, json.dumps(dict(entries)), durable=False)


def _boot_id() -> str:
  """Returns a text that differs between machines, and after each boot."""
  try:
    return _BOOT_ID.read_text().strip()
  except OSError:
    return f'{os.uname().nodename}'
