"""A replica: engines in a process of their own, driven over one socket.

    python -m inference.server.replicas.child FD

The server starts it and holds the other end of the socket. If the server ends
for any reason, so does the replica: no process stays behind. It ignores the
signals of a terminal or of a supervisor, since the server finishes open
requests first. An engine whose step fails ends the process: the server starts
another one, with a device in a known state.
"""

from collections.abc import Sequence
from concurrent import futures
import gc
import itertools
import logging
import os
import pathlib
import signal
import socket
import sys
import threading
from typing import Any

from frozen import manifest as manifest_lib
from hardware import compilation_cache, host_memory
from inference.engine import engine_config
from inference.engine.processes import leader as leader_lib, options
from inference.server import engine_thread
from inference.server.http import thread_priority
from inference.server.replicas import values, version as version_lib
from inference.server.versions import about, audit, memory
from parallel import frames, processes, pulse

_LOG = logging.getLogger(__name__)
# What work of the server's calls runs at once: metrics beside a long one.
_NUM_CALLS = 4
# Of grammars; as many as compile at once in the server.
_NUM_TEXTS = 2


class Child:
  """The replica's end of the socket."""

  def __init__(self, connection: socket.socket, setup: values.Setup):
    self.setup, self._connection = setup, connection
    self._lock = threading.Lock()
    self._versions: dict[int, version_lib.Version] = {}
    self._calls = futures.ThreadPoolExecutor(_NUM_CALLS, 'call')
    self.texts = futures.ThreadPoolExecutor(
      _NUM_TEXTS, 'text', initializer=thread_priority.lower
    )
    self._joining, self._leader = threading.Lock(), None
    self._is_ended = False  # by the server, in order

  def send(self, messages: Sequence[frames.Message]) -> None:
    """Sends messages; any thread may call this."""
    data = frames.packed(messages)
    try:
      with self._lock:
        self._connection.sendall(data)
    except OSError:
      os._exit(0)  # the server has ended

  def leader(self) -> leader_lib.Leader | None:
    """Returns the leader of several processes; waits for them to join."""
    setup = self.setup
    if setup.cluster is None:
      return None
    with self._joining:
      if self._leader is None:
        # jax ends a process without a word of what to do: it comes second.
        processes.start(
          setup.cluster, heartbeat_timeout_s=int(2 * setup.heartbeat_timeout_s)
        )
        self._leader = leader_lib.Leader(
          on_loss=_end, heartbeat_timeout_s=setup.heartbeat_timeout_s
        )
      return self._leader

  @property
  def seconds_in_step(self) -> float:
    """The seconds that an engine has been in one step."""
    return max((each.seconds_in_step for each in self.threads()), default=0.0)

  def end(self) -> None:
    """Ends the process, and the others that share its engine."""
    if self._leader:
      # Unless the server was killed, they are not started again.
      self._leader.end(is_failed=not self._is_ended)
    # XLA cannot be interrupted, and an ordinary exit would wait for it.
    os._exit(0)

  def threads(self) -> list[engine_thread.EngineThread]:
    """Returns the engines of all versions."""
    return [each.thread for each in list(self._versions.values())]

  def obey(self, message: frames.Message) -> None:
    """Does what a message of the server asks for."""
    kind, *args = message
    if kind == 'submit':
      version, number, requests, is_stream = args
      self._versions[version].submit(number, requests, is_stream=is_stream)
    elif kind == 'cancel':
      version, number = args
      self._versions[version].cancel(number)
    elif kind == 'end':
      self._is_ended = True
    elif kind == 'load':
      number, load = args
      try:
        self._check_alone()
        self._versions[number] = version_lib.Version(self, number, load)
      except (OSError, ValueError) as error:  # the directory has changed
        failure = values.error_as_values(error)
        self.send([('not_loaded', number, *failure)])
    elif kind == 'audit':
      version, name, directory, fields = args
      self._calls.submit(self._audit, version, name, directory, fields)
    else:
      assert kind == 'call', kind
      self._calls.submit(self._call, *args)

  def _check_alone(self) -> None:
    if self.setup.cluster and self._versions:
      raise ValueError(
        'processes: got a second version for an engine over several processes,'
        ' expected one; start another server for it'
      )

  def _audit(self, version: int, name: str, directory: str, fields) -> None:
    if found := self._versions.get(version):
      model = found.audited(name, directory)
      found.auditor.keep(audit.Item(model=model, **fields))

  def _call(self, number: int, name: str, args: Sequence[Any]) -> None:
    try:
      result = self._called(name, *args)
    except Exception as error:
      failure = values.error_as_values(error)
      self.send([('result', number, None, failure)])
    else:
      self.send([('result', number, result, None)])

  def _called(self, name: str, *args: Any) -> Any:
    if name == 'plan':
      directory, config = args
      self._check_alone()
      leader = self.leader()
      return _planned(directory, config, leader.devices if leader else None)
    version, *rest = args
    found = self._versions[version]
    if name == 'unload':
      found.unload()
      del self._versions[version]
      return None
    return {
      'collect': found.collect,
      'close': found.close,
      'load_adapter': found.load_adapter,
      'unload_adapter': found.unload_adapter,
      'check_adapter': found.check_adapter,
    }[name](*rest)


def _planned(
  directory: str,
  config: engine_config.EngineConfig,
  devices: Sequence[Any] | None,
) -> tuple[memory.Plan, str]:
  manifest = manifest_lib.read(pathlib.Path(directory))
  return memory.plan(manifest, config, devices), about.device()['platform']


def _end(why: str) -> None:
  """Ends this process at once: its programs may wait for lost devices."""
  _LOG.error('%s', why)
  os._exit(options.LOST)


def main(argv: Sequence[str]) -> None:
  """Obeys the server until it ends."""
  for number in (signal.SIGINT, signal.SIGTERM, signal.SIGHUP):
    signal.signal(number, signal.SIG_IGN)
  connection = socket.socket(fileno=int(argv[1]))
  received = frames.read(connection.makefile('rb'))
  (_, setup), *others = next(received)
  logging.basicConfig(
    level=logging.INFO,
    stream=sys.stderr,
    format=f'%(levelname)s:     {setup.name}: %(message)s',
  )
  for quiet in ('absl', 'jax'):  # they log each of their steps
    logging.getLogger(quiet).setLevel(logging.WARNING)
  host_memory.reuse_freed_memory(one_heap=False)  # as serve.py does
  gc.disable()  # until the engine has made what stays
  if setup.compilation_cache:
    compilation_cache.use(pathlib.Path(setup.compilation_cache))
  child = Child(connection, setup)
  pulse.beat(
    lambda in_step: child.send([('beat', in_step)]),
    setup.heartbeat_timeout_s,
    lambda: child.seconds_in_step,
  )
  for messages in itertools.chain([others], received):
    for message in messages:
      child.obey(message)
  child.end()


if __name__ == '__main__':
  main(sys.argv)
