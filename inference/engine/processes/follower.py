"""The other processes of an engine: each repeats the calls of process 0.

    follower.follow(directory, given={'tensor': 8})

A follower has no requests and no scheduler, and reads no results. It loads its
parts of the weights from a frozen directory of its own machine, whose digest
must be that of process 0, compiles the same programs, and then does what it is
told (`told`) until process 0 ends.
"""

from collections.abc import Callable, Mapping, Sequence
import contextlib
import dataclasses
import importlib.metadata
import os
import socket
import threading
from typing import Any

import jax
import jax.numpy as jnp

from frozen import format as frozen_format
from inference.engine import (
  adapter_table,
  device_state,
  engine_config,
  loaded,
)
from inference.engine.processes import leader as leader_lib, told
from inference.engine.spread import placement as placement_lib, pool as pool_lib
from parallel import frames, processes, pulse
from text import tokenizer as tokenizer_lib

_MODEL = 'params'  # the collection that an engine computes with


@dataclasses.dataclass(frozen=True, kw_only=True)
class Load:
  """The engine that a follower takes part in, as process 0 describes it."""

  weights_digest: str
  config: engine_config.EngineConfig
  dtype: str
  num_pages: int  # P, that all devices have memory for
  jaxlib: str = importlib.metadata.version('jaxlib')


class LeaderEnded(ConnectionError):
  """Process 0 has failed, or ended without a word."""


def follow(
  directory: str | os.PathLike,
  given: Mapping[str, Any],
  *,
  heartbeat_timeout_s: float = processes.DEFAULT_HEARTBEAT_S,
) -> None:
  """Repeats the calls of process 0 until it ends the engine.

  Args:
    directory: the frozen directory that is served, on this machine.
    given: fields of the config that the flags of this process set.
    heartbeat_timeout_s: of process 0.

  Raises:
    ValueError: the directory, or a flag, differs from that of process 0, which
      has the same error.
    LeaderEnded: process 0 has ended in another way.
  """
  with leader_lib.connect() as connection:
    follower = _Follower(directory, given, connection)
    pulse.beat(
      lambda _: follower.send(leader_lib.HEARTBEAT), heartbeat_timeout_s
    )
    follower.run()


class _Follower:
  def __init__(
    self,
    directory: str | os.PathLike,
    given: Mapping[str, Any],
    connection: socket.socket,
  ):
    self._directory, self._given = directory, given
    self._connection, self._lock = connection, threading.Lock()
    self._engine: told.Repeated | None = None
    self._index = processes.index()
    self._failure: Exception | None = None  # to load

  def send(self, number: int, text: str = '') -> None:
    """Answers a call; any thread may do this."""
    with self._lock:
      self._connection.sendall(frames.packed([(number, text)]))

  def run(self) -> None:
    """Obeys process 0 until it ends; see `follow`."""
    is_failed = self._obey_all()
    if is_failed is None:
      raise LeaderEnded(
        f'process {self._index}: got the end of process 0, expected it to end'
        ' the engine first; see its messages, and start all processes again'
      )
    # Process 0 waits for the end of the connection, and then for this.
    self._connection.shutdown(socket.SHUT_RDWR)
    jax.distributed.shutdown()
    if self._failure:
      raise self._failure
    if is_failed:
      raise LeaderEnded(
        f'process {self._index}: got a failure of process 0, expected none; its'
        ' own message says what to change'
      )

  def _obey_all(self) -> bool | None:
    """Returns whether process 0 has failed; None: it ended without a word."""
    with contextlib.suppress(OSError):
      for messages in frames.read(self._connection.makefile('rb')):
        for verb, *values in messages:
          if verb == 'end':
            (is_failed,) = values
            return is_failed
          self._obey(verb, values)
    return None

  def _obey(self, verb: str, values: Sequence[Any]) -> None:
    if verb == 'load':
      number, load = values
      # Process 0 raises the error, and then ends this one.
      self._failure = self._answered(number, lambda: self._load(load))
      return
    engine = self._engine
    assert engine, verb
    if verb in told.VERBS:
      getattr(engine, verb)(*values)
    elif verb == 'masks':
      (number,) = values
      # In a thread: steps of other requests go on meanwhile.
      threading.Thread(
        target=self._answered, args=(number, engine.programs.masks.compile)
      ).start()
    elif verb == 'gather':
      (path,) = values
      jax.block_until_ready(engine.state)  # see `Leader.gather`
      weight = frozen_format.leaves_by_path(engine.params)[path]
      leader_lib.gathered(weight)
    else:
      assert verb == 'release', verb
      held = engine.params, engine.state, engine.adapters.table
      for leaf in jax.tree.leaves(held):
        leaf.delete()
      self._engine = None

  def _answered(
    self, number: int, function: Callable[[], None]
  ) -> Exception | None:
    """Calls a function, and tells process 0 its end or its error."""
    failure: Exception | None = None
    try:
      function()
    except Exception as error:
      failure = error
    text = str(failure) if failure else ''
    self.send(number, text)
    return failure

  def _load(self, load: Load) -> None:
    host = jax.local_devices(backend='cpu')[0]
    frozen = frozen_format.open_directory(
      self._directory, sharding=jax.sharding.SingleDeviceSharding(host)
    )
    self._check(load, frozen.manifest.weights_digest)
    self._engine = _made(load, frozen)

  def _check(self, load: Load, digest: str) -> None:
    if digest != load.weights_digest:
      raise ValueError(
        f'{self._directory}: got weights {digest[:16]}, expected those of'
        f' process 0, {load.weights_digest[:16]}; give all processes the same'
        ' frozen directory'
      )
    for name, value in self._given.items():
      if (expected := getattr(load.config, name)) != value:
        raise ValueError(
          f'engine.{name}: got {value}, expected {expected} as in process 0;'
          ' start every process with the same flags'
        )
    if (own := importlib.metadata.version('jaxlib')) != load.jaxlib:
      raise ValueError(
        f'jaxlib: got {own}, expected {load.jaxlib} as in process 0; install'
        ' the same requirements on every machine'
      )


def _made(load: Load, frozen: frozen_format.Opened) -> told.Repeated:
  """Returns the part of an engine that belongs to this process."""
  config, dtype = load.config, jnp.dtype(load.dtype)
  model_config = dataclasses.replace(frozen.config, scan_layers=False)
  tokenizer = tokenizer_lib.load(frozen.tokenizer_dir)
  params = device_state.Unread(
    {_MODEL: frozen.shapes[_MODEL]},
    lambda convert: {_MODEL: frozen.read_params(convert)[_MODEL]},
  )
  placement = placement_lib.make(
    config,
    model_config,
    params,
    vocab_size=tokenizer.vocab_size,
    devices=jax.devices(),
  )
  backend = placement_lib.backend_of(placement, config, params, dtype)
  adapters = adapter_table.made(config, params, dtype, placement)
  context = config.context(model_config.max_length)
  made = loaded.load(
    placement,
    backend,
    params,
    pool_lib.Pool(load.num_pages, config.page_tokens(context), 0.0),
    config=config,
    dtype=dtype,
    vocab_size=tokenizer.vocab_size,
    beside=adapters.beside,
  )
  return told.Repeated(
    made.programs, made.params, made.state, placement.adapters, adapters
  )
