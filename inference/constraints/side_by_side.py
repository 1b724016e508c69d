"""Runs the masks of a batch on several processor cores.

A sampling program waits for the masks of all of its rows. The library lets
other threads run while it computes a mask, so that a batch of many constrained
rows takes the time of its largest share.
"""

from collections.abc import Callable, Sequence
from concurrent import futures
import functools
import os

# More threads would take cores from tokenizers and from the server.
_MOST_THREADS = 8
_LEAST_TASKS = 4  # handing over a share takes as long as a mask or two


def run(
  tasks: Sequence[Callable[[], None]], num_threads: int | None = None
) -> None:
  """Runs independent tasks, in shares of equal size.

  The calling thread takes a share, too. Few tasks run one after another.

  Args:
    tasks: functions without arguments.
    num_threads: threads that work at once; None: the cores of this process, at
      most 8.

  Raises:
    Exception: of a task, after all shares have ended.
  """
  num = min(num_threads or _num_cores(), len(tasks))
  if num < 2 or len(tasks) < _LEAST_TASKS:
    _run_share(tasks)
    return
  pool = _pool(num_threads or _num_cores())
  others = [pool.submit(_run_share, tasks[i::num]) for i in range(1, num)]
  try:
    _run_share(tasks[::num])
  finally:
    futures.wait(others)
  for other in others:
    other.result()


def _run_share(tasks: Sequence[Callable[[], None]]) -> None:
  for task in tasks:
    task()


def _num_cores() -> int:
  return min(_MOST_THREADS, len(os.sched_getaffinity(0)))


@functools.cache
def _pool(num_threads: int) -> futures.ThreadPoolExecutor:
  return futures.ThreadPoolExecutor(num_threads - 1, 'masks')
