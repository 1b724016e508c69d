"""The start of an engine over several processes, where process 0 answers.

    joined.run(cluster, lambda leader: ..., follow=lambda: ...)

For --prompt, --chat and --eval of serve.py. With --port, the engine is in a
process that the server starts: `server.replicas`.
"""

from collections.abc import Callable
import contextlib
import os
import sys
from typing import NoReturn

from inference.engine.processes import leader as leader_lib, options
from parallel import processes


def run(
  cluster: processes.Cluster | None,
  answer: Callable[[leader_lib.Leader | None], None],
  *,
  follow: Callable[[], None],
  heartbeat_timeout_s: int = processes.DEFAULT_HEARTBEAT_S,
) -> None:
  """Joins the other processes; answers in process 0, follows in the others.

  Args:
    cluster: of this process; None: it is the only one.
    answer: makes the engine and uses it; receives the leader, None for one
      process.
    follow: repeats the calls of process 0.
    heartbeat_timeout_s: see `processes.start`.
  """
  # jax ends a process without a word of what to do: it comes second.
  processes.start(cluster, heartbeat_timeout_s=2 * heartbeat_timeout_s)
  if processes.count() == 1:
    answer(None)
    return
  try:
    if processes.is_first():
      leader = leader_lib.Leader(
        on_loss=_end, heartbeat_timeout_s=heartbeat_timeout_s
      )
    else:
      follow()
      return
  except (ValueError, FileNotFoundError):
    raise  # the user can change something
  except Exception as error:  # also those of devices that wait for lost ones
    _end(str(error))
  with _ended(leader):
    answer(leader)


@contextlib.contextmanager
def _ended(leader: leader_lib.Leader):
  try:
    yield
  except BaseException:
    leader.end(is_failed=True)
    raise
  leader.end()


def _end(why: str) -> NoReturn:
  """Ends this process at once: its programs may wait for lost devices."""
  sys.stdout.flush()
  print(f'error: {why}', file=sys.stderr, flush=True)
  os._exit(options.LOST)
