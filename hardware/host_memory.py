"""The host's free memory, and a malloc setting for XLA:CPU.

With the setting, freed memory stays with the process. A compiled program
allocates its temporaries anew in every call. By default glibc takes large
allocations from the kernel and returns them when they are freed. Every step
then pays for hundreds of megabytes of zeroed pages: a tenth of the step or more
for small models. Memory of accelerators is not affected.
"""

import ctypes
import pathlib
import sys

# Parameters of mallopt(3), from glibc's malloc.h.
_TRIM_THRESHOLD, _MMAP_MAX, _ARENA_MAX = -1, -4, -8


def reuse_freed_memory() -> bool:
  """Makes malloc keep freed memory; returns whether it could be set.

  Call it before jax allocates anything. Only glibc on Linux has the setting;
  another allocator is left as it is.
  """
  if sys.platform != 'linux':
    return False
  libc = ctypes.CDLL(None)
  if not hasattr(libc, 'mallopt'):
    return False
  # One heap for all threads that never shrinks, and no separate mappings for
  # large allocations. With an arena per thread, whose heap ends at 64 MB, glibc
  # would fall back to mappings.
  return all(
    libc.mallopt(parameter, value)
    for parameter, value in (
      (_ARENA_MAX, 1),
      (_MMAP_MAX, 0),
      (_TRIM_THRESHOLD, 2**31 - 1),
    )
  )


def return_freed_memory() -> None:
  """Gives freed memory back to the system, once, where malloc can."""
  if sys.platform == 'linux':
    libc = ctypes.CDLL(None)
    if hasattr(libc, 'malloc_trim'):  # of glibc
      libc.malloc_trim(0)


def available_bytes() -> int | None:
  """Returns the bytes that this process may still take; None if unknown."""
  found = []
  meminfo = _read('/proc/meminfo')
  for line in meminfo.splitlines():
    if line.startswith('MemAvailable:'):
      found.append(1024 * int(line.split()[1]))
  # The limit of a container.
  limit, used = (
    _read(f'/sys/fs/cgroup/memory.{name}').strip()
    for name in ('max', 'current')
  )
  if limit.isdecimal() and used.isdecimal():
    found.append(max(int(limit) - int(used), 0))
  return min(found, default=None)


def _read(path: str) -> str:
  try:
    return pathlib.Path(path).read_text()
  except OSError:
    return ''
