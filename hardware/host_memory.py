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


def reuse_freed_memory(*, one_heap: bool = True) -> bool:
  """Makes malloc keep freed memory; returns whether it could be set.

  Call it before jax allocates anything. Only glibc on Linux has the setting;
  another allocator is left as it is.

  Args:
    one_heap: all threads share one heap, else each has its own. One is best for
      training: hundreds of MB of temporaries do not fit into the heap of a
      thread (64 MB), whose pages go back to the system once it is empty.
      Decode steps allocate little, but often: in one heap, which compilation
      has fragmented, malloc takes up to a quarter of a step.
  """
  if sys.platform != 'linux':
    return False
  libc = ctypes.CDLL(None)
  if not hasattr(libc, 'mallopt'):
    return False
  # Heaps never shrink, and large allocations get no mappings of their own.
  chosen = {_MMAP_MAX: 0, _TRIM_THRESHOLD: 2**31 - 1}
  if one_heap:
    chosen[_ARENA_MAX] = 1
  return all(libc.mallopt(*each) for each in chosen.items())


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
