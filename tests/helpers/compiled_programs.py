"""Compiled programs, kept between test sessions and shared by their workers.

JAX writes an entry of its compilation cache in place, so processes that share
one directory can read half an entry. Each pytest process therefore has a
directory of its own, in which the entries are hard links into one store:

    adopt()    before a test: link entries of the store that are missing here
    publish()  after a test: link new whole entries into the store

A link appears at once and whole, and JAX never changes an entry that exists.
The key of an entry covers the program, the flags and the versions of XLA; the
store is further divided by CPU, since machine code for one may crash another.
"""

import hashlib
import importlib.metadata
import os
import pathlib
import platform
import shutil
import tempfile
import time

from hardware import compilation_cache

STORE_VARIABLE = 'TWO_LIVES_TEST_CACHE'
MAX_AGE_S = 14 * 24 * 3600  # an entry that no session has used for longer goes


def default_store() -> pathlib.Path:
  """Returns the store of this machine; the variable names another one."""
  root = os.environ.get(STORE_VARIABLE)
  parent = pathlib.Path(root or '~/.cache/two-lives/xla-tests').expanduser()
  return parent / f'{importlib.metadata.version("jaxlib")}-{_cpu()}'


def _cpu() -> str:
  """Returns a digest of the CPU: its model and the instructions it has."""
  description = [platform.machine(), platform.processor()]
  try:
    for line in pathlib.Path('/proc/cpuinfo').read_text().splitlines():
      if line.startswith(('model name', 'flags', 'Features')):
        description.append(line)
      elif not line:
        break  # the first core is described; the others are like it
  except OSError:
    pass  # another system than Linux
  return hashlib.sha256('\n'.join(description).encode()).hexdigest()[:12]


class CompiledPrograms:
  """The compilation cache of one process, linked to the store."""

  def __init__(self, store: pathlib.Path):
    self.directory = pathlib.Path(tempfile.mkdtemp(prefix='two_lives_xla_'))
    self._store = store
    self._store.mkdir(parents=True, exist_ok=True)
    # Hard links need one file system; without them entries are copied.
    self._linked: set[str] = set()
    self._seen_ns = (-1, -1)  # change times of the store and of the directory

  def adopt(self) -> None:
    """Links entries that other processes have published."""
    now = self._store.stat().st_mtime_ns
    if now == self._seen_ns[0]:
      return
    self._seen_ns = now, self._seen_ns[1]
    for name in _entries(self._store) - self._linked:
      _link(self._store / name, self.directory / name)
      self._linked.add(name)

  def publish(self) -> None:
    """Gives new entries to the store, if they are whole."""
    now = self.directory.stat().st_mtime_ns
    if now == self._seen_ns[1]:
      return
    self._seen_ns = self._seen_ns[0], now
    for name in _entries(self.directory) - self._linked:
      # A child process may be writing it now, or was killed while it did.
      if compilation_cache.is_whole((self.directory / name).read_bytes()):
        _link(self.directory / name, self._store / name)
        self._linked.add(name)

  def close(self) -> None:
    """Publishes the last entries and removes this process's directory."""
    self.publish()
    shutil.rmtree(self.directory, ignore_errors=True)


def prune(store: pathlib.Path, max_age_s: float = MAX_AGE_S) -> None:
  """Removes entries that have not been read for `max_age_s` seconds."""
  oldest = time.time() - max_age_s
  for name in _entries(store):
    path = store / name
    try:
      status = path.stat()
      if max(status.st_atime, status.st_mtime) < oldest:
        path.unlink()
    except FileNotFoundError:
      pass  # another session pruned it


def _entries(directory: pathlib.Path) -> set[str]:
  with os.scandir(directory) as found:
    return {entry.name for entry in found if entry.name.endswith('-cache')}


def _link(source: pathlib.Path, target: pathlib.Path) -> None:
  """Makes `target` the same entry as `source`; keeps one that exists."""
  try:
    os.link(source, target)
  except FileExistsError:
    pass
  except FileNotFoundError:
    pass  # another session pruned it
  except OSError:  # no hard links between these two
    aside = target.with_name(f'{target.name}.{os.getpid()}.tmp')
    shutil.copyfile(source, aside)
    aside.replace(target)
