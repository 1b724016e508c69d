"""The engines that compute prompts for an engine, and the pages they send."""

from collections.abc import Callable, Hashable, Mapping, Sequence
import dataclasses
import queue
from typing import Any
import weakref

import jax

from inference.engine import (
  device_state,
  engine_config,
  metrics as metrics_lib,
)
from inference.engine.apart import pages as pages_lib, prefiller
from inference.engine.processes import leader as leader_lib, ported
from inference.requests import answer as answer_lib, requests as requests_lib
from inference.scheduling import page_tables, sequence_manager
from models.layers import adapters as adapters_lib

# Prompts that one of them computes together: it has no answers in its batch.
_MOST_PROMPTS = 8
_WAIT_SECONDS = 0.05  # for pages; a cancelled request is noticed after it

# (config, params, devices, leader) -> an engine without drafts.
Make = Callable[
  [
    engine_config.EngineConfig,
    device_state.Unread,
    Sequence[jax.Device],
    leader_lib.Leader | None,
  ],
  Any,
]


class Prefillers:
  """Computes prompts on further devices; one thread, the engine's, owns it."""

  def __init__(
    self,
    engines: Sequence[tuple[Any, pages_lib.Port]],
    port: pages_lib.Port,
    *,
    config: engine_config.EngineConfig,
    page_tokens: int,
  ):
    """Starts a thread for each engine.

    Args:
      engines: that compute prompts, each with the port of its pages.
      port: writes pages of the engine that answers.
      config: of that engine.
      page_tokens: Q, tokens of a page.
    """
    self._port, self._config, self._page_tokens = port, config, page_tokens
    self._results: queue.Queue[Any] = queue.Queue()
    self._asked: dict[Hashable, tuple[int, int]] = {}  # which one, its tokens
    self._prefillers = tuple(
      prefiller.Prefiller(engine, own, port.shardings, self._results.put)
      for engine, own in engines
    )
    # Threads know the queue alone, and end with the engine that answers.
    self._close = weakref.finalize(self, _close, self._prefillers)

  @property
  def is_busy(self) -> bool:
    """Whether a prompt is being computed."""
    return bool(self._asked)

  def num_tokens(
    self,
    request: requests_lib.Request,
    manager: sequence_manager.SequenceManager,
    scope: Hashable,
  ) -> int:
    """Returns the first tokens of a prompt that are computed here, 0 for none.

    Whole pages, without the last token. A prompt of which a chunk is left to
    compute is faster where its answer is.
    """
    size, num_prompt = self._page_tokens, len(request.prompt_ids)
    if (
      request.settings.prompt_logprobs is not None
      or request.pooling is not None
      or request.most_flops is not None  # prompts here do not count
    ):
      return 0
    num = (num_prompt - 1) // size * size
    if num <= self._config.chunk_tokens:
      return 0
    found = manager.tables.cache.lookup(scope, request.prompt_ids[:num])
    is_long = num - len(found) * size > self._config.chunk_tokens
    return num if is_long else 0

  def submit(
    self, key: Hashable, request: requests_lib.Request, num_tokens: int
  ) -> None:
    """Asks for the first tokens of a prompt, of the engine with least work."""
    work = [0] * len(self._prefillers)
    for which, tokens in self._asked.values():
      work[which] += tokens
    which = work.index(min(work))
    self._asked[key] = which, num_tokens
    self._prefillers[which].submit(
      key, prefiller.request_of(request, num_tokens)
    )

  def load(self, digest: str, tree: adapters_lib.Tree) -> None:
    """Loads an adapter everywhere, see `adapter_table.Mirror`."""
    for each in self._prefillers:
      each.load(digest, tree)

  def unload(self, digest: str) -> None:
    """Unloads an adapter everywhere."""
    for each in self._prefillers:
      each.unload(digest)

  def cancel(self, key: Hashable) -> None:
    """Ends the work for a sequence, if there is any."""
    if key in self._asked:
      which, _ = self._asked.pop(key)
      self._prefillers[which].cancel(key)

  def landed(
    self,
    manager: sequence_manager.SequenceManager,
    lives: Mapping[page_tables.Sequence, answer_lib.Live],
    state: device_state.State,
    counters: metrics_lib.Metrics,
    *,
    is_idle: bool,
  ) -> device_state.State:
    """Returns the state with the pages that have come. Donates `state`.

    Args:
      manager: gets the pages, and the sequences that waited for them.
      lives: of the engine.
      state: of the engine.
      counters: of the engine; work for an answer counts wherever it is done.
      is_idle: whether no step is in flight. If no sequence has work either,
        this waits for pages.

    Raises:
      Failed: an engine here has failed.
    """
    must_wait = (
      is_idle
      and self.is_busy
      and not any(sequence.is_ready for sequence in lives)
    )
    while True:
      try:
        found = self._results.get(block=must_wait, timeout=_WAIT_SECONDS)
      except queue.Empty:
        return state
      must_wait = False
      if isinstance(found, BaseException):
        raise prefiller.Failed('a prefill engine has ended') from found
      if self._asked.pop(found.key, None) is None:
        self._port.drop(found.contents)  # it was cancelled
        continue
      num_tokens = found.num_pages * self._page_tokens
      sequence, pages = manager.adopt(
        found.key, num_tokens, num_computed=num_tokens - _cached(found)
      )
      usage = lives[sequence].usage
      usage.prefill_tokens += found.usage.prefill_tokens
      usage.flops += found.usage.flops
      usage.kv_byte_seconds += found.usage.kv_byte_seconds
      counters.prefill_tokens.inc(found.usage.prefill_tokens)
      counters.flops.inc(found.usage.flops)
      state = state._replace(
        kv_cache=self._port.write(state.kv_cache, pages, found.contents)
      )

  def compile_rest(self) -> None:
    """Compiles the programs that are left; from any thread."""
    for each in self._prefillers:
      each.engine.compile_rest()

  def release(self) -> None:
    """Ends the threads, and frees weights and KV caches."""
    self._close()
    for each in self._prefillers:
      each.engine.release()


def _cached(found: prefiller.Computed) -> int:
  """Returns the tokens that the engine of the prompt had found computed."""
  return found.usage.cached_tokens if found.num_pages else 0


def _close(prefillers: Sequence[prefiller.Prefiller]) -> None:
  for each in prefillers:
    each.close()


def start(
  config: engine_config.EngineConfig,
  params: device_state.Unread,
  state: device_state.State,
  devices: Sequence[jax.Device] | None,
  *,
  page_tokens: int,
  make: Make,
  leader: leader_lib.Leader | None = None,
) -> tuple[device_state.State, Prefillers | None]:
  """Returns the engines that a config asks for. Donates `state`.

  Args:
    config: of the engine that answers; it has the first devices.
    params: of the model.
    state: of the engine that answers.
    devices: of all; None: those of this process.
    page_tokens: Q, tokens of a page.
    make: returns an engine.
    leader: of the engine that answers, if other processes share it.

  Raises:
    ValueError: there are too few devices.
  """
  if not config.prefill_engines:
    return state, None
  devices = jax.local_devices() if devices is None else devices
  wanted = config.num_devices
  if len(devices) < wanted:
    raise ValueError(
      f'engine.prefill_engines: got {config.prefill_engines} with engine.tensor'
      f' = {config.tensor}, which takes {wanted} devices, expected at most'
      f' {len(devices)}; lower one of them'
    )
  own = dataclasses.replace(
    config,
    prefill_engines=0,
    speculation='off',
    draft_tokens=None,
    max_sequences=_MOST_PROMPTS,
    decode_shapes=(_MOST_PROMPTS,),
    # The engine that answers refuses requests.
    max_waiting=8 * (config.max_waiting + config.max_sequences),
  )
  port = ported.port(state.kv_cache, leader)
  state = state._replace(kv_cache=port.compile(state.kv_cache))
  engines = []
  for number in range(1, 1 + config.prefill_engines):
    first = number * config.tensor
    some = tuple(devices[first : first + config.tensor])
    beside = leader.beside(number, some) if leader else None
    engine = make(own, _on(params, some[0], config.tensor), some, beside)
    reader = ported.port(engine.kv_cache, beside)
    reader.warm(engine.kv_cache, port.shardings)
    engines.append((engine, reader))
  return state, Prefillers(
    engines, port, config=config, page_tokens=page_tokens
  )


def _on(
  params: device_state.Unread, device: jax.Device, num_devices: int
) -> device_state.Unread:
  """Returns params that are read onto a device."""
  if num_devices > 1:
    return params  # their placement puts each part where it belongs
  sharding = jax.sharding.SingleDeviceSharding(device)
  shapes = jax.tree.map(
    lambda leaf: jax.ShapeDtypeStruct(
      leaf.shape, leaf.dtype, sharding=sharding
    ),
    params.shapes,
  )
  return device_state.Unread(
    shapes,
    lambda convert: params.read(
      lambda path, weight: convert(path, jax.device_put(weight, device))
    ),
  )
