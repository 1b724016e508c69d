"""Process 0 of an engine over several processes: it tells the others each call.

    leader = Leader(on_loss=print)     # after `parallel.processes.start`
    engine = Engine(..., leader=leader)
    leader.end()

Every process has some devices of one mesh, and must call the same programs in
the same order. Process 0 alone has requests, the scheduler and the sampled
tokens. Before it calls a program it sends the call as a value: the name of the
program and the arrays of the host (`told`). The others repeat it (`follower`).

Values travel over a TCP socket to each process, not by a collective of the
devices: a collective would be one more program per step, between two steps that
should follow each other at once, and processes without work would wait inside
of it. `jax.distributed` has a store of texts, too, but asks for one at a time.
Measured on one machine, a call of 2 KB and a byte back take 0.03 ms.
jax's store carries the address of process 0, and a secret by which the ends
know each other. Nothing is encrypted, as between the devices themselves: the
network of the processes must be a private one.

A process that dies closes its socket; one that hangs, and a machine that
vanishes, send no heartbeat. Either ends process 0: programs in flight would
wait for the lost devices for ever.
"""

from collections.abc import Callable, Sequence
import dataclasses
import functools
import hmac
import itertools
import queue
import secrets
import socket
import struct
import threading
from typing import Any

import jax
import numpy as np

from inference.engine import engine_config
from models import axes
from parallel import frames, processes, rules

_NAME = 'engine'  # of the published address
_JOIN_SECONDS = 120.0  # that the other processes may take to connect
_GREET_SECONDS = 10.0  # that a connection may take to name itself
_GREETING = struct.Struct('>64sI')  # the secret, the index of the process
HEARTBEAT = -1  # in place of the number of an answer
# If the machine of process 0 does not answer the kernel for 10 + 3 * 5 s, the
# other processes end.
_PROBES = {'TCP_KEEPIDLE': 10, 'TCP_KEEPINTVL': 5, 'TCP_KEEPCNT': 3}
_END_SECONDS = 5.0  # that the other processes may take to end


class Lost(ConnectionError):
  """Another process of the engine has ended."""


class Leader:
  """The sockets of process 0 to all others."""

  def __init__(
    self,
    on_loss: Callable[[str], None] = lambda _: None,
    *,
    heartbeat_timeout_s: float = processes.DEFAULT_HEARTBEAT_S,
  ):
    """Waits for all other processes to connect.

    Args:
      on_loss: called once, in a thread of its own, with a text if another
        process ends before `end`. The engine cannot go on, and a thread may
        wait for its devices for ever: end the process.
      heartbeat_timeout_s: seconds without a word after which another process
        counts as lost.

    Raises:
      Lost: a process has not connected in time.
    """
    # A thread holds this while it sends a call and makes it: all processes must
    # call programs in one order, and several threads of this one call them.
    self.order = threading.RLock()
    self.latest: Any = None  # result of the latest call
    self.devices = jax.devices()
    self._on_loss, self._loss = on_loss, ''
    self._lock = threading.Lock()
    self._is_over = False
    self._numbers = itertools.count()
    self._answers: dict[int, queue.SimpleQueue[tuple[int, str]]] = {}
    self._others = _accepted(processes.count() - 1)
    for each in self._others.values():
      each.settimeout(heartbeat_timeout_s)
    self._watching = [
      threading.Thread(target=self._watch, args=item, name='watch', daemon=True)
      for item in self._others.items()
    ]
    for each in self._watching:
      each.start()

  def devices_of(
    self, config: engine_config.EngineConfig
  ) -> Sequence[jax.Device]:
    """Returns the devices of an engine, see `devices_of`."""
    return devices_of(config, self.devices)

  def beside(self, number: int, devices: Sequence[jax.Device]) -> 'Leader':
    """Returns the leader of one more engine over the same processes.

    Args:
      number: of the engine, at least 1.
      devices: of that engine.
    """
    return _Beside(self, number, devices)

  def tell(self, verb: str, *values: Any) -> None:
    """Sends a call to all other processes.

    Raises:
      Lost: one of them has ended.
    """
    data = frames.packed([(verb, *values)])
    with self.order:
      for index, connection in self._others.items():
        try:
          connection.sendall(data)
        except OSError as error:
          raise Lost(_lost(index, str(error))) from error

  def ask(self, verb: str, *values: Any) -> int:
    """Sends a call that the others answer; returns its number for `wait`."""
    number = self.awaited()
    self.tell(verb, number, *values)
    return number

  def awaited(self) -> int:
    """Returns a new number, of a call that the others will answer."""
    number = self.new_number()
    self._answers[number] = queue.SimpleQueue()
    return number

  def new_number(self) -> int:
    """Returns a number that no call has had."""
    return next(self._numbers)

  def wait(self, number: int) -> None:
    """Waits until all other processes have answered a call.

    Raises:
      ValueError: one of them refuses it.
      Lost: one of them has ended.
    """
    for _ in self._others:
      if self._loss:
        raise Lost(self._loss)
      index, error = self._answers[number].get()
      if self._loss:
        raise Lost(self._loss)
      if error:
        raise ValueError(f'process {index}: {error}')
    del self._answers[number]

  def release(self) -> None:
    """Tells the other processes to free the arrays of the engine."""
    self.tell('release')
    self.latest = None  # it is freed here, too

  def whole(self, params: Any) -> Any:
    """Returns params of all processes, each an array when NumPy asks for it."""
    return jax.tree.map_with_path(
      lambda path, leaf: _Whole(
        leaf, functools.partial(self._gather, '/'.join(axes.names(path)))
      ),
      params,
    )

  def _gather(self, path: str, weight: jax.Array) -> np.ndarray:
    """Returns a weight of the engine whole; every process computes it."""
    with self.order:
      self.tell('gather', path)
      # XLA:CPU may run programs that need nothing of each other at once, and
      # their messages would meet.
      jax.block_until_ready(self.latest)
      return np.asarray(gathered(weight))

  def end(self, *, is_failed: bool = False) -> None:
    """Ends the other processes, and waits for them.

    Args:
      is_failed: whether this process ends with an error.
    """
    with self._lock:
      if self._loss:
        return
      self._is_over = True
    try:
      self.tell('end', is_failed)
    except Lost:
      return  # it has ended
    for each in self._watching:
      each.join(_END_SECONDS)
    jax.distributed.shutdown()  # all processes are here

  def _watch(self, index: int, connection: socket.socket) -> None:
    how = 'its connection is closed'
    try:
      with connection, connection.makefile('rb') as stream:
        for messages in frames.read(stream):
          for number, error in messages:
            if number >= 0:  # else it is a heartbeat
              self._answers[number].put((index, error))
    except TimeoutError:
      how = 'it has sent no heartbeat in time'
    except OSError as error:
      how = str(error)
    with self._lock:
      if self._is_over or self._loss:
        return
      self._loss = _lost(index, how)
    for each in list(self._answers.values()):
      each.put((index, how))
    self._on_loss(self._loss)


class _Beside(Leader):
  """The leader of a further engine; the connections are those of the first."""

  def __init__(
    self, leader: Leader, number: int, devices: Sequence[jax.Device]
  ):
    # Not that of `Leader`, which connects.
    self.order, self.devices, self.latest = leader.order, devices, None
    self._leader, self._number = leader, number

  def devices_of(self, config):
    del config
    return self.devices

  def tell(self, verb, *values):
    self._leader.tell('beside', self._number, verb, *values)

  def awaited(self):
    return self._leader.awaited()

  def new_number(self):
    return self._leader.new_number()

  def wait(self, number):
    self._leader.wait(number)


@dataclasses.dataclass(frozen=True)
class _Whole:
  """A weight of which each process has a part."""

  weight: jax.Array
  gather: Callable[[jax.Array], np.ndarray]

  @property
  def shape(self) -> tuple[int, ...]:
    return self.weight.shape

  @property
  def ndim(self) -> int:
    return self.weight.ndim

  @property
  def dtype(self) -> Any:
    return self.weight.dtype

  def __array__(self, dtype=None, copy=None) -> np.ndarray:
    del dtype, copy
    return self.gather(self.weight)


def devices_of(
  config: engine_config.EngineConfig, devices: Sequence[jax.Device]
) -> Sequence[jax.Device]:
  """Returns the devices of an engine, and then those of its prefill engines.

  Every engine has the same share of the devices of each process: so its
  programs run in all of them, and pages go from one engine to another without
  leaving a process (`apart.pages.moved`).

  Args:
    config: of the engine that answers.
    devices: of all processes.

  Raises:
    ValueError: the engines have another number of devices, or cannot share
      those of a process. A process without a device of an engine could not
      take part.
  """
  num_engines = 1 + config.prefill_engines
  if config.num_devices != len(devices):
    other = f' with prefill_engines = {config.prefill_engines}'
    raise ValueError(
      f'engine.tensor: got {config.tensor}{other * (num_engines > 1)}, which'
      f' takes {config.num_devices} devices, expected {len(devices)}, the'
      ' number of devices of all processes; change it, or the processes'
    )
  if num_engines == 1:
    return devices
  own: dict[int, list[jax.Device]] = {}
  for device in devices:
    own.setdefault(device.process_index, []).append(device)
  sizes = {len(each) for each in own.values()}
  if len(sizes) > 1 or min(sizes) % num_engines:
    raise ValueError(
      f'engine.prefill_engines: got {config.prefill_engines} over processes of'
      f' {", ".join(map(str, sorted(sizes)))} devices, expected as many devices'
      f' in each process, a multiple of {num_engines}: pages stay in their'
      ' process; change it, or the processes'
    )
  size = min(sizes) // num_engines
  return [
    device
    for number in range(num_engines)
    for _, each in sorted(own.items())
    for device in each[number * size : (number + 1) * size]
  ]


def gathered(weight: jax.Array) -> jax.Array:
  """Returns an array of all processes, whole on every device."""
  mesh: Any = weight.sharding.mesh  # pyright: ignore[reportAttributeAccessIssue]
  sharding = rules.replicated(mesh)
  return jax.block_until_ready(_gather(sharding)(weight))


@functools.cache
def _gather(sharding: Any) -> Any:
  return jax.jit(lambda x: x, out_shardings=sharding)


def _lost(index: int, how: str) -> str:
  return (
    f'process {index}: got its end ({how}), expected it to compute as long as'
    ' process 0; see its own messages, and start all processes again'
  )


def _accepted(num_others: int) -> dict[int, socket.socket]:
  """Returns the connections of all other processes, by index."""
  host = processes.coordinator_host()
  try:
    listener = socket.create_server((host, 0))
  except OSError:  # a name that stands for this machine, and is not its own
    listener = socket.create_server(('', 0))
  secret = secrets.token_hex(32)
  port = listener.getsockname()[1]
  processes.publish(_NAME, f'{host} {port} {secret}')
  found: dict[int, socket.socket] = {}
  with listener:
    listener.settimeout(_JOIN_SECONDS)
    while len(found) < num_others:
      try:
        connection, _ = listener.accept()
      except TimeoutError:
        late = sorted({*range(1, num_others + 1)} - found.keys())
        raise Lost(
          f'process {", ".join(map(str, late))}: got no connection to process 0'
          f' in {_JOIN_SECONDS:.0f} s, expected one to {host}:{port}; let the'
          ' machines of the engine connect to each other on all ports'
        ) from None
      if index := _greeted(connection, secret):
        found[index] = connection
      else:
        connection.close()
  return found


def _greeted(connection: socket.socket, secret: str) -> int:
  """Returns the index of a process that knows the secret, 0 for another one."""
  connection.settimeout(_GREET_SECONDS)
  try:
    data = connection.recv(_GREETING.size, socket.MSG_WAITALL)
  except OSError:
    return 0
  if len(data) < _GREETING.size:
    return 0
  known, index = _GREETING.unpack(data)
  if not hmac.compare_digest(known, secret.encode()):
    return 0
  _prepare(connection)
  return index


def connect() -> socket.socket:
  """Returns the connection of another process to process 0.

  Raises:
    OSError: process 0 cannot be reached.
  """
  host, port, secret = processes.published(
    _NAME, timeout_s=_JOIN_SECONDS
  ).split()
  connection = socket.create_connection((host, int(port)), _GREET_SECONDS)
  _prepare(connection)
  connection.sendall(_GREETING.pack(secret.encode(), processes.index()))
  return connection


def _prepare(connection: socket.socket) -> None:
  """Sends at once, waits without an end, and notices a lost machine."""
  connection.settimeout(None)
  connection.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
  connection.setsockopt(socket.SOL_SOCKET, socket.SO_KEEPALIVE, 1)
  for name, value in _PROBES.items():
    if hasattr(socket, name):  # not on every system
      connection.setsockopt(socket.IPPROTO_TCP, getattr(socket, name), value)
