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
from inference import drafts
from inference.engine import (
  adapter_table,
  device_state,
  engine_config,
  loaded,
)
from inference.engine.drafting import making
from inference.engine.processes import leader as leader_lib, ported, told
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
  draft_digest: str = ''  # of the model or the head that drafts
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
    # By number: engine 0 answers, those after it compute its prompts.
    self._engines: dict[int, told.Repeated] = {}
    self._ports = ported.Repeated()
    self._devices: Sequence[jax.Device] = ()  # of all of them, in that order
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

  def _obey(self, verb: str, values: Sequence[Any], which: int = 0) -> None:
    """Does what process 0 does with engine `which`."""
    if verb == 'beside':
      which, verb, *values = values
      self._obey(verb, values, which)
      return
    if verb == 'load':
      number, load = values
      # Process 0 raises the error, and then ends this one.
      self._failure = self._answered(number, lambda: self._load(which, load))
      return
    engine = self._engines[which]
    if verb in told.VERBS:
      getattr(engine, verb)(*values)
    elif verb == 'masks':
      (number,) = values
      # In a thread: steps of other requests go on meanwhile.
      threading.Thread(
        target=self._answered, args=(number, engine.programs.masks.compile)
      ).start()
    elif verb == 'send':
      self._ports.send(which, engine.state.kv_cache, *values)
    elif verb == 'write':
      kv_cache = self._ports.write(engine.state.kv_cache, *values)
      engine.state = engine.state._replace(kv_cache=kv_cache)
    elif verb == 'drop':
      self._ports.drop(*values)
    elif verb == 'gather':
      (path,) = values
      jax.block_until_ready(engine.state)  # see `Leader.gather`
      weight = frozen_format.leaves_by_path(engine.params)[path]
      leader_lib.gathered(weight)
    else:
      assert verb == 'release', verb
      for leaf in jax.tree.leaves(engine.arrays):
        leaf.delete()
      del self._engines[which]

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

  def _load(self, which: int, load: Load) -> None:
    host = jax.local_devices(backend='cpu')[0]
    frozen = frozen_format.open_directory(
      self._directory, sharding=jax.sharding.SingleDeviceSharding(host)
    )
    _check_alike(load, self._directory, frozen.manifest.weights_digest)
    if not which:
      self._check_given(load.config)
      self._devices = leader_lib.devices_of(load.config, jax.devices())
    first = which * load.config.tensor
    devices = self._devices[first : first + load.config.tensor]
    given = {name: self._given.get(name) for name in drafts.DIRECTORIES}
    own = {name: value for name, value in given.items() if value}
    draft = drafts.read(dataclasses.replace(load.config, **own), frozen)
    _check_draft(load, draft)
    made = self._engines[which] = _made(load, frozen, draft, devices)
    if load.config.prefill_engines or which:
      kv_cache = self._ports.add(which, made.state.kv_cache)
      made.state = made.state._replace(kv_cache=kv_cache)

  def _check_given(self, config: engine_config.EngineConfig) -> None:
    """Checks the flags of this process against the config of process 0.

    Raises:
      ValueError: one differs.
    """
    for name, value in self._given.items():
      expected = getattr(config, name)
      # Machines have directories of their own, with the same content.
      is_own = name in drafts.DIRECTORIES and value and expected
      if value != expected and not is_own:
        raise ValueError(
          f'engine.{name}: got {value}, expected {expected} as in process 0;'
          ' start every process with the same flags'
        )


def _check_alike(load: Load, directory: str | os.PathLike, digest: str) -> None:
  """Checks the weights and the programs of this process.

  Raises:
    ValueError: they are others than those of process 0.
  """
  if digest != load.weights_digest:
    raise ValueError(
      f'{directory}: got weights {digest[:16]}, expected those of process 0,'
      f' {load.weights_digest[:16]}; give all processes the same frozen'
      ' directory'
    )
  if (own := importlib.metadata.version('jaxlib')) != load.jaxlib:
    raise ValueError(
      f'jaxlib: got {own}, expected {load.jaxlib} as in process 0; install the'
      ' same requirements on every machine'
    )


def _check_draft(load: Load, draft: making.Weights | None) -> None:
  """Checks that the same model or head drafts as in process 0.

  Raises:
    ValueError: it is another one.
  """
  digest = draft.digest if draft else ''
  if digest != load.draft_digest:
    raise ValueError(
      f'engine.draft_{load.config.speculation}: got weights {digest[:16]},'
      f' expected those of process 0, {load.draft_digest[:16]}; give all'
      ' processes the same directory'
    )


def _made(
  load: Load,
  frozen: frozen_format.Opened,
  draft: making.Weights | None,
  devices: Sequence[jax.Device],
) -> told.Repeated:
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
    devices=devices,
  )
  backend = placement_lib.backend_of(placement, config, params, dtype)
  source, backend = making.made(draft, config, placement, backend)
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
    draft=source,
  )
  return told.Repeated(
    made.programs,
    made.params,
    made.state,
    placement.adapters,
    adapters,
    source,
  )
