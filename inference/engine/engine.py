"""The engine: many requests, one frozen model.

    engine = Engine(model_config, params, tokenizer=..., weights_digest=...)
    for which, update in engine.answer(requests): ...

or, step by step:

    request_id = engine.submit(Request(prompt_ids=..., settings=...))
    while engine.has_work:
      for update in engine.step(): ...

Sequences join and leave the batch at every step (continuous batching: Yu et
al., Orca, OSDI 2022). The SequenceManager plans on the host, `programs` compute
on the device, and this class carries the plans out. It is the only part of life
two that changes while it runs. `adapter_table` has the adapters of the model.

The host is one dispatch ahead. The next one is planned and sent before the
tokens of the last one are read: a token reaches the next step without leaving
the device, and the host works while the device computes. While all sequences
decode, one dispatch has several steps, since the host's work per dispatch takes
longer than a step of a fast device. The device knows which token ends a
sequence, and computes no further one. It does not know stop strings: tokens
after one are dropped.

One thread owns an engine.
"""

import collections
from collections.abc import Generator, Iterator, Sequence
import dataclasses
import time
from typing import Any

import jax
import jax.numpy as jnp

from inference.constraints import grammars
from inference.engine import (
  device_state,
  engine_config,
  entrance,
  flight as flight_lib,
  landing,
  loaded,
  metrics,
)
from inference.engine.apart import prefillers
from inference.engine.compiled import compilations
from inference.engine.drafting import making, speculating
from inference.engine.processes import follower, leader as leader_lib, told
from inference.engine.spread import placement as placement_lib, pool as pool_lib
from inference.requests import (
  accounts,
  feeding,
  requests as requests_lib,
)
from inference.scheduling import (
  fairness,
  scheduler,
  sequence_manager,
  spans,
)
from models import model_config as model_config_lib
from text import tokenizer as tokenizer_lib

Overloaded = requests_lib.Overloaded
# Prometheus reads the gauges every few seconds; setting them walks all pages.
_GAUGE_SECONDS = 0.1


class Engine:
  """Answers requests with one model; one thread owns it."""

  def __init__(
    self,
    model_config: model_config_lib.ModelConfig,
    params: device_state.Params | device_state.Unread,
    *,
    tokenizer: tokenizer_lib.Tokenizer,
    weights_digest: str,
    dtype: Any = jnp.float32,
    config: engine_config.EngineConfig = engine_config.EngineConfig(),
    compile_all: bool = True,
    draft: making.Weights | None = None,
    devices: Sequence[jax.Device] | None = None,
    leader: leader_lib.Leader | None = None,
  ):
    """Allocates the KV cache and compiles the programs.

    Args:
      model_config: of the model; scanned layers are unstacked.
      params: variables of the model, on one device; never changed. `Unread`
        params are read while programs compile.
      tokenizer: of the model.
      weights_digest: of the params; cached prefixes belong to one digest.
      dtype: of the computation, and of the KV cache unless it is int8.
      config: the layout of the engine.
      compile_all: False compiles the few programs that every step can use. The
        others are left to `compile_rest`.
      draft: the model or the head that drafts, with such speculation.
      devices: of which the first `config.num_devices` are used; None: all here.
      leader: tells the other processes of an engine over several; None: all
        devices are of this process.
    """
    params = device_state.unread(params)
    self.config = config
    self.model_config = dataclasses.replace(model_config, scan_layers=False)
    self.weights_digest, self.tokenizer = weights_digest, tokenizer
    self.metrics, self._last_gauged = metrics.Metrics(), 0.0
    self._leader = leader
    if leader:
      devices = leader.devices_of(config)
    vocab_size = tokenizer.vocab_size
    self.placement = placement_lib.make(
      config, self.model_config, params, devices, vocab_size=vocab_size
    )
    self.device = self.placement.device
    self.context = config.context(model_config.max_length)
    self.page_tokens = config.page_tokens(self.context)
    backend = placement_lib.backend_of(self.placement, config, params, dtype)
    self.draft, backend = making.made(draft, config, self.placement, backend)
    self.backend = backend
    with jax.default_device(self.device):
      self.adapters = told.table(leader, config, params, dtype, self.placement)
    others = self.adapters.num_bytes + making.num_bytes(self.draft)
    pool = pool_lib.sized(self.placement, config, backend, params, others)
    self.page_bytes = pool.page_bytes
    self.manager = sequence_manager.SequenceManager(
      config.limits(self.page_tokens), num_pages=pool.num_pages
    )
    loading = self._begin_others(pool.num_pages, jnp.dtype(dtype).name)
    made = loaded.load(
      self.placement,
      backend,
      params,
      pool,
      config=config,
      dtype=dtype,
      vocab_size=vocab_size,
      make=told.maker(leader),
      beside=self.adapters.beside,
      draft=self.draft,
      compile_all=compile_all or leader is not None,
    )
    self._state, self._programs, self.params, self.compile_seconds = made
    self._begin_prefillers(params, devices, dtype, compile_all)
    if leader:
      leader.wait(loading)
    self.adapters.put = self._programs.put_adapter
    self._begin_empty()

  def _begin_prefillers(
    self,
    params: device_state.Unread,
    devices: Sequence[jax.Device] | None,
    dtype: Any,
    compile_all: bool,
  ) -> None:
    """Makes the engines that compute prompts, if the config has any."""
    self._state, self._prefillers = prefillers.start(
      self.config,
      params,
      self._state,
      devices,
      page_tokens=self.page_tokens,
      leader=self._leader,
      make=lambda own, params, devices, leader: Engine(
        self.model_config,
        params,
        tokenizer=self.tokenizer,
        weights_digest=self.weights_digest,
        dtype=dtype,
        config=own,
        compile_all=compile_all,
        devices=devices,
        leader=leader,
      ),
    )
    self.adapters.mirror = self._prefillers

  def _begin_others(self, num_pages: int, dtype: str) -> int:
    """Tells the other processes to load; returns the number of that call."""
    if self._leader is None:
      return 0
    return self._leader.ask(
      'load',
      follower.Load(
        weights_digest=self.weights_digest,
        config=self.config,
        dtype=dtype,
        num_pages=num_pages,
        draft_digest=making.digest(self.draft),
      ),
    )

  def _begin_empty(self) -> None:
    """Starts without requests."""
    self._flight: flight_lib.Flight | None = None
    self._grammars = grammars.Grammars(self.tokenizer)
    self._feeder = feeding.Feeder(self)
    self._speculator = speculating.Speculator(
      self.config, self._programs, self.manager, self.metrics, self.draft
    )
    self._accounts = accounts.Accounts(
      self.metrics, self.model_config, self.page_bytes
    )
    self._answers = landing.Answers(
      self.config, self.manager, self.metrics, self._accounts, self._speculator
    )
    self._live = self._answers.live
    self._entrance = entrance.Entrance(
      self.config,
      tokenizer=self.tokenizer,
      adapters=self.adapters,
      manager=self.manager,
      answers=self._answers,
      prefillers=self._prefillers,
    )

  # --------------------------------------------------------------------------
  # Requests

  @property
  def has_work(self) -> bool:
    """Whether a step would do anything."""
    return bool(self._live) or self._flight is not None

  def compile_rest(self) -> None:
    """Compiles the programs that are left, in a thread beside the engine's."""
    with jax.default_device(self.device):
      self._programs.compile_rest()
      if self.draft:
        self.draft.compile()
      if self._prefillers:
        self._prefillers.compile_rest()

  @property
  def is_compiling(self) -> bool:
    """Whether a thread of its own compiles."""
    return self._programs.masks.is_compiling

  @property
  def num_waiting(self) -> int:
    """Number of sequences that wait for a slot."""
    return self.manager.num_waiting

  def checked(self, request: requests_lib.Request) -> requests_lib.Request:
    """Returns a request with its `room`, the tokens that may follow its prompt.

    Raises:
      ValueError: prompt and completion do not fit into the context or the KV
        cache, a token id is outside the vocabulary, or its adapter is not
        loaded.
    """
    self.adapters.find(request.adapter)
    # The last token is sampled and never computed: it needs no place in a page.
    capacity = self.page_tokens * self.manager.tables.allocator.num_usable + 1
    room = requests_lib.room_for(
      request,
      vocab_size=self.tokenizer.vocab_size,
      context=self.context,
      capacity=capacity,
    )
    request = dataclasses.replace(request, room=room)
    return flight_lib.with_grammar(request, self._grammars, self._programs)

  def submit(self, request: requests_lib.Request) -> int:
    """Submits one request, see `submit_all`; returns its id."""
    (request_id,) = self.submit_all([request])
    return request_id

  def submit_all(self, requests: Sequence[requests_lib.Request]) -> list[int]:
    """Submits requests, all or none; returns the ids that updates carry.

    Raises:
      ValueError: a request could never be answered, or all together are more
        sequences than the queue holds.
      Overloaded: too many sequences wait; try again later.
    """
    requests = [each if each.room else self.checked(each) for each in requests]
    asked = requests_lib.num_sequences(requests)
    most = self.config.max_waiting
    requests_lib.check_few(asked, fairness.most_waiting(most))
    if not self.has_places(asked):
      self.metrics.refused.labels('overloaded').inc()
      raise requests_lib.overloaded(asked, self.num_waiting, most)
    return [
      self._entrance.enter(request, self.weights_digest) for request in requests
    ]

  def has_places(self, asked: collections.Counter[str]) -> bool:
    """Returns whether the queue holds so many sequences of each principal."""
    own = {each: self.manager.num_waiting_of(each) for each in asked}
    return fairness.has_places(
      asked, own, max_waiting=self.config.max_waiting, waiting=self.num_waiting
    )

  def answer(
    self, requests: Sequence[requests_lib.Request]
  ) -> Generator[tuple[int, requests_lib.Update]]:
    """Yields updates, each with the index of its request among `requests`.

    Submits requests as the queue has room for them. Closing an iterator cancels
    its requests. Several may be open at once, see `feeding`.

    Raises:
      ValueError: a request could never be answered; at the call, before any
        work.
    """
    return self._feeder.answer([self.checked(request) for request in requests])

  def cached_pages(self, request: requests_lib.Request) -> list[int]:
    """Returns the pages of a prompt that the prefix cache has."""
    scope = entrance.scope_of(request, self.weights_digest, self.config)
    return self.manager.tables.cache.lookup(scope, request.prompt_ids)

  @property
  def kv_cache(self) -> device_state.KVCache:
    """The pages; each step donates them."""
    return self._state.kv_cache

  def cancel(self, request_id: int) -> list[requests_lib.Update]:
    """Ends a request, releases its pages; returns its last updates.

    They say what was used; work in flight is charged to nobody.
    """
    self._answers.charge_memory(now := time.perf_counter())
    ended = [x for x in self._live.values() if x.request_id == request_id]
    for live in ended:
      if self._prefillers:
        self._prefillers.cancel(live.sequence.id)
      self._answers.close(live, 'cancelled')
    return [live.cancelled(now) for live in ended]

  def set_params(
    self, params: device_state.Params, weights_digest: str
  ) -> None:
    """Serves other weights of the same model, as on-policy RL does each step.

    Raises:
      ValueError: a request is unfinished, an adapter of the weights before is
        loaded, shapes or dtypes differ, or the engine has several processes.
    """
    self.adapters.check_empty()
    if self._prefillers:
      raise ValueError(
        'weights: got new ones for an engine with others that compute prompts,'
        ' expected none; set engine.prefill_engines = 0'
      )
    if self._leader:
      raise ValueError(
        'weights: got new ones for an engine over several processes, expected'
        ' the directory that it was made from; start it with another one'
      )
    if self.has_work:
      raise ValueError(
        f'weights: got new ones while {len(self._live)} sequences run, expected'
        ' none; finish or cancel them, a sequence has one set of weights'
      )
    params = self.placement.read(self.backend, device_state.unread(params))
    device_state.check_alike(params, self.params)
    self.params, self.weights_digest = params, weights_digest
    if self.draft:
      self.draft.use(params)
    self.manager.clear()

  def whole_params(self) -> device_state.Params:
    """Returns the params of the model, as arrays of the host.

    They become such one by one, when NumPy asks; from any thread.
    """
    params = self.params
    if self._leader:
      params = self._leader.whole(params)
    return self.placement.of_model(params)

  def release(self) -> None:
    """Frees weights and KV cache at once, whatever refers to the arrays."""
    if self._leader:
      self._leader.release()
    held = self.adapters.beside(self.params), self._state
    if self.draft:
      held = held, self.draft.arrays
    if self._prefillers:
      self._prefillers.release()
    for leaf in jax.tree.leaves(held):
      leaf.delete()

  # --------------------------------------------------------------------------
  # Steps

  def run(self) -> Iterator[requests_lib.Update]:
    """Yields updates until no work is left."""
    while self.has_work:
      yield from self.step()

  def step(self) -> list[requests_lib.Update]:
    """Dispatches the next steps, and returns the updates of those before."""
    start = time.perf_counter()
    compiled = compilations.on_this_thread()
    # Before sequences enter: they have held no pages until now.
    self._answers.charge_memory(start)
    if self._prefillers:
      self._state = self._prefillers.landed(
        self.manager,
        self._live,
        self._state,
        self.metrics,
        is_idle=self._flight is None,
      )
    updates: list[requests_lib.Update] = []
    waited, landed = -self._speculator.waited, self._flight
    may_draft = self._may_draft
    if landed and self._speculator.wants_tokens(landed.step, may_draft):
      self._flight = None
      updates, seconds = self._land(landed)
      waited += seconds
    plan = self.manager.plan()
    flight = None
    if plan.preempted or not plan.is_empty:
      flight = self._dispatch(self._begun(plan))
    landed, self._flight = self._flight, flight
    waits = self._prefillers is not None and self._prefillers.is_busy
    is_idle = flight is None and landed is None and not updates
    if is_idle and self._live and not waits:
      raise RuntimeError(
        f'got {len(self._live)} sequences and nothing to do for any of them;'
        ' report this as a bug'
      )
    if landed is not None:
      updates, seconds = self._land(landed)
      waited += seconds
    if flight is not None and flight.pending is not None:
      self._state, self._flight = flight_lib.sampled(
        flight, self._programs, self._state, self._live, self.metrics
      )
    now, waited = time.perf_counter(), waited + self._speculator.waited
    self.metrics.step_seconds.inc(now - start)
    self.metrics.host_seconds.inc(now - start - waited)
    self.metrics.compilations.inc(compilations.on_this_thread() - compiled)
    if now > self._last_gauged + _GAUGE_SECONDS or not self.has_work:
      self._last_gauged = now
      self.metrics.set_gauges(self.manager.gauges(), self.page_tokens)
    return updates

  @property
  def _may_draft(self) -> bool:
    """Whether the next step may verify drafts, as far as grammars go."""
    if not self._answers.num_constrained:
      return True
    return self._programs.can_mask_drafts

  def _begun(self, plan: scheduler.StepPlan) -> spans.Step:
    """Carries out a plan, with drafts or several decode steps if it may."""
    most = 1 if self._answers.num_constrained else self._speculator.most_steps
    may_draft = self._flight is None and self._may_draft
    if may_draft and (drafts := self._speculator.drafts(plan)):
      return self.manager.begin(plan, drafts=drafts)
    limit = self.config.stream_seconds
    most = self._accounts.most_decode_steps(most, limit, len(plan.decodes))
    num = self.manager.decode_steps(plan, most)
    return self.manager.begin(plan, decode_steps=num)

  def _dispatch(self, step: spans.Step) -> flight_lib.Flight | None:
    """Sends a step to the device, without sampling if a grammar is read."""
    now = time.perf_counter()
    self.metrics.preemptions.inc(len(step.preempted))
    for sequence in step.preempted:
      self._live[sequence].usage.preemptions += 1
    seated = [self._live[sequence] for sequence in step.seated]
    self._state = flight_lib.seat(seated, self._programs, self._state)
    for live in seated:
      if live.seated_at is None:
        live.begin(now)
        self.metrics.queue.observe(live.usage.queue_seconds)
        self.metrics.cached_tokens.inc(live.usage.cached_tokens)
    if step.copies:
      self._state = self._programs.copy_pages(self._state, step.copies)
    if not step.spans:
      return None
    if step.is_verified:
      step = self._speculator.filled(step, self._state)
    self.metrics.dispatches.inc()
    self._state, flight = flight_lib.sent(
      step,
      self._programs,
      self.adapters.beside(self.params),
      self._state,
      lives=self._live,
      chunk_tokens=self.config.chunk_tokens,
    )
    return flight

  def _land(
    self, flight: flight_lib.Flight
  ) -> tuple[list[requests_lib.Update], float]:
    """Takes the tokens of a dispatch; returns updates and seconds waited."""
    outputs, waited = flight_lib.read(flight, self._live)
    return self._answers.land(flight, time.perf_counter(), outputs), waited
