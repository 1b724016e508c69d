"""The other processes of a replica that spans several: kept running.

    code = followers.keep(setup, environment=os.environ, drain_seconds=30)

On each other machine the command of the server starts this loop in place of
HTTP. It starts a process that follows process 0 (`engine.processes.follower`),
and starts it again when it has ended with an error or hangs: process 0 ends at
the same time, its server starts it again, and both meet at the coordinator as
before. It returns when the server has ended the engine.
"""

from collections.abc import Mapping, Sequence
import dataclasses
import logging
import os
import pathlib
import select
import signal
import socket
import subprocess
import sys
import time
from typing import Any

from hardware import compilation_cache, host_memory
from inference.engine.processes import follower, options
from parallel import frames, processes, pulse

_LOG = logging.getLogger(__name__)
_ROOT = pathlib.Path(__file__).parents[3]
_MODULE = 'inference.server.replicas.followers'
_USER_ERROR = 2  # exit code of serve.py: it would fail in the same way again
_LONGEST_PAUSE = 60.0  # seconds
_LOOK_SECONDS = 0.1  # between two looks for a signal, in a pause
_STEADY_SECONDS = 60.0  # of life, after which an end is not a repeated one
_MARGIN_SECONDS = 15.0  # that the server may take after its drain


@dataclasses.dataclass(frozen=True, kw_only=True)
class Setup:
  """All that a follower is told when it starts."""

  directory: str  # frozen
  given: dict[str, Any]  # fields of the config of the engine, by flags
  cluster: processes.Cluster
  heartbeat_timeout_s: float
  compilation_cache: str | None


class _Stop:
  """Whether a signal has asked to stop, and until when that may take."""

  def __init__(self, drain_seconds: float):
    self._seconds = drain_seconds + _MARGIN_SECONDS
    self.deadline: float | None = None

  def __call__(self, *_: Any) -> None:
    # The server drains after a signal, and needs this process meanwhile.
    first, now = self.deadline is None, time.monotonic()
    self.deadline = now + self._seconds if first else now


def keep(
  setup: Setup, *, environment: Mapping[str, str], drain_seconds: float
) -> int:
  """Runs followers until the server ends the engine; returns an exit code.

  A first SIGTERM or Ctrl-C lets the server finish open requests; a second one
  ends the follower at once.

  Args:
    setup: is told to each follower.
    environment: of their processes.
    drain_seconds: that the server may take for open requests.
  """
  stop = _Stop(drain_seconds)
  for number in (signal.SIGINT, signal.SIGTERM):
    signal.signal(number, stop)
  pause = 0.0
  while True:
    started_at = time.monotonic()
    code = _follow_once(setup, environment, stop)
    if code in (0, _USER_ERROR) or stop.deadline is not None:
      return code
    is_steady = time.monotonic() - started_at > _STEADY_SECONDS
    pause = 0.0 if is_steady else min(2 * pause or 1.0, _LONGEST_PAUSE)
    _LOG.error(
      'process %s has ended with exit code %d; another one starts in %.0f s',
      setup.cluster.process_id,
      code,
      pause,
    )
    end = time.monotonic() + pause
    while (left := end - time.monotonic()) > 0:
      if stop.deadline is not None:
        return code
      time.sleep(min(left, _LOOK_SECONDS))


def _follow_once(
  setup: Setup, environment: Mapping[str, str], stop: _Stop
) -> int:
  """Runs one follower to its end; returns its exit code."""
  own, other = socket.socketpair()
  paths = [str(_ROOT), environment.get('PYTHONPATH', '')]
  with own:
    process = subprocess.Popen(
      [sys.executable, '-m', _MODULE, str(other.fileno())],
      pass_fds=[other.fileno()],
      stdin=subprocess.DEVNULL,
      env={**environment, 'PYTHONPATH': os.pathsep.join(filter(None, paths))},
      start_new_session=True,  # signals of a terminal are for this process
    )
    other.close()
    own.sendall(frames.packed([('setup', setup)]))
    watched = pulse.Pulse(setup.heartbeat_timeout_s, time.monotonic())
    reader = frames.Reader()
    while process.poll() is None:
      ready, _, _ = select.select([own], [], [], 1.0)
      now = time.monotonic()
      if ready and not (data := own.recv(2**16)):
        break
      for messages in reader.fed(data) if ready else ():
        for _, in_step in messages:
          watched.heard(now, in_step)
      if why := watched.check(now):
        _LOG.error('process %s: %s', setup.cluster.process_id, why)
        process.kill()
      if stop.deadline is not None and now >= stop.deadline:
        process.kill()
  return process.wait()


def main(argv: Sequence[str]) -> None:
  """Follows process 0, as a process that `keep` has started."""
  for number in (signal.SIGINT, signal.SIGTERM, signal.SIGHUP):
    signal.signal(number, signal.SIG_IGN)
  connection = socket.socket(fileno=int(argv[1]))
  (_, setup), *_ = next(frames.read(connection.makefile('rb')))
  pulse.beat(
    lambda in_step: _send(connection, in_step), setup.heartbeat_timeout_s
  )
  host_memory.reuse_freed_memory(one_heap=False)
  if setup.compilation_cache:
    compilation_cache.use(pathlib.Path(setup.compilation_cache))
  code = 0
  try:
    processes.start(
      setup.cluster, heartbeat_timeout_s=int(2 * setup.heartbeat_timeout_s)
    )
    follower.follow(
      setup.directory,
      setup.given,
      heartbeat_timeout_s=setup.heartbeat_timeout_s,
    )
  except (ValueError, FileNotFoundError) as error:
    code = _USER_ERROR
    print(f'error: {error}', file=sys.stderr, flush=True)
  except Exception as error:
    code = options.LOST
    print(f'error: {error}', file=sys.stderr, flush=True)
  # Programs in flight may wait for devices that are lost.
  os._exit(code)


def _send(connection: socket.socket, in_step: float) -> None:
  try:
    connection.sendall(frames.packed([('beat', in_step)]))
  except OSError:
    os._exit(options.LOST)  # the process that keeps this one has ended


if __name__ == '__main__':
  main(sys.argv)
