"""The engine: many requests, one frozen model.

    engine = Engine(config, params, tokenizer=..., weights_digest=...)
    request_id = engine.submit(Request(prompt_ids=..., settings=...))
    while engine.has_work:
      for update in engine.step(): ...

Sequences join and leave at every step (continuous batching: Yu et al., Orca,
OSDI 2022). The roster plans on the host, `programs` computes on the device, and
this class carries plans out: it is where the two meet, and the only part of
life two that changes while it runs.

The host is one step ahead. Step i+1 is planned and dispatched before the tokens
of step i are read: a token reaches the next step without leaving the device,
and what the host does with it takes no time from the device. A sequence that
turns out to have ended has then computed a token too many, which is dropped.

One thread owns an engine.
"""

from collections.abc import Hashable, Iterator
import dataclasses
import itertools
import secrets
import time
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp

from hardware import peaks
from inference.engine import (
  answer,
  compilations,
  device_state,
  engine_config,
  execution,
  inputs as inputs_lib,
  metrics,
  programs,
  requests,
  steps,
)
from inference.sampling import settings as settings_lib
from inference.scheduling import sequence_manager
from models import flops, kv_cache, layout, model_config, transformer
from text import tokenizer as tokenizer_lib


class Overloaded(RuntimeError):
  """The engine has as many sequences waiting as it takes in."""


class _Flight(NamedTuple):
  """A step that is dispatched and not read."""

  step: sequence_manager.Step
  shape: steps.Shape
  outputs: steps.Outputs


class Engine:
  """Answers requests with one model; not for several threads."""

  def __init__(
    self,
    config: model_config.ModelConfig,
    params: device_state.Params,
    *,
    tokenizer: tokenizer_lib.Tokenizer,
    weights_digest: str,
    dtype: Any = jnp.float32,
    engine: engine_config.EngineConfig = engine_config.EngineConfig(),
  ):
    """Lays out the cache and compiles every program.

    Args:
      config: of the model; scanned layers are served apart.
      params: its variables, on one device. Never changed.
      tokenizer: of the model.
      weights_digest: of the params; cached prefixes are theirs alone.
      dtype: of the computation, and of pages unless they are int8.
      engine: rows, pages, numerics.
    """
    params, config = layout.unstack(params, config)
    self.config, self.model_config = engine, config
    self.params, self.weights_digest = params, weights_digest
    self.tokenizer = tokenizer
    self.metrics = metrics.Metrics()
    (device,) = jax.tree.leaves(params)[0].devices()
    kv_dtype = dtype if engine.kv_dtype == 'model' else engine.kv_dtype
    self.page_tokens = engine.page_tokens(config.max_length)
    backend = execution.choose(engine, config, dtype, device.platform)
    page_bytes = self.page_tokens * _kv_bytes_per_token(
      config, kv_dtype, backend.channels
    )
    num_pages = engine.pool_pages(
      config,
      bytes_per_token=page_bytes / self.page_tokens,
      weight_bytes=sum(leaf.nbytes for leaf in jax.tree.leaves(params)),
      memory_bytes=peaks.memory_bytes(device),
      is_host=device.platform == 'cpu',
    )
    self.page_bytes = page_bytes
    self.roster = sequence_manager.Roster(
      engine.limits(self.page_tokens), num_pages=num_pages
    )
    model = transformer.Transformer(config, jnp.dtype(dtype), backend.execution)
    with jax.default_device(device):
      self._state = device_state.init_state(
        model,
        num_slots=engine.max_sequences,
        num_pages=num_pages,
        page_size=self.page_tokens,
        kv_dtype=kv_dtype,
        channels=backend.channels,
        vocab_size=tokenizer.vocab_size,
      )
      start = time.perf_counter()
      self._programs = programs.Programs(
        model=model,
        params=params,
        state=self._state,
        shapes=[steps.Shape(*shape) for shape in engine.step_shapes()],
        chunk_tokens=engine.chunk_tokens,
        table_width=engine.table_width(config.max_length),
        vocab_size=tokenizer.vocab_size,
      )
      self.compile_seconds = time.perf_counter() - start
    self._flight: _Flight | None = None
    self._live: dict[Hashable, answer.Live] = {}
    self._ids = itertools.count()
    self._last_charged = time.perf_counter()

  # --------------------------------------------------------------------------
  # Requests

  @property
  def has_work(self) -> bool:
    """Whether a step would do anything."""
    return bool(self._live) or self._flight is not None

  @property
  def num_waiting(self) -> int:
    """Sequences that are not running."""
    return self.roster.gauges().num_waiting

  def room_for(self, request: requests.Request) -> int:
    """Returns how many tokens may follow the prompt of a request.

    Raises:
      ValueError: prompt and completion do not fit into the context or the
        cache, or an id is outside the vocabulary.
    """
    settings, context = request.settings, self.model_config.max_length
    num_prompt, wanted = len(request.prompt_ids), settings.max_tokens or 1
    vocab_size = self.tokenizer.vocab_size
    target = () if request.target is None else (request.target,)
    for token_id in (*request.prompt_ids, *target):
      if not 0 <= token_id < vocab_size:
        raise ValueError(
          f'prompt: got token id {token_id}, expected 0 <= id < {vocab_size}'
        )
    if not num_prompt:
      raise ValueError(
        "prompt: got no token ids, expected at least one; send the text '' to"
        ' start from BOS'
      )
    settings.check_ids(vocab_size)
    # A target that nothing follows is never read, and needs no position.
    room = context + (request.target is not None and wanted == 1)
    if num_prompt + wanted > room:
      raise ValueError(
        f'prompt: got {num_prompt} tokens and {wanted} to generate,'
        f' expected at most {context} together (the context of this model);'
        ' shorten the prompt or lower max_tokens'
      )
    # The last token is sampled and never computed: it needs no slot.
    capacity = self.page_tokens * self.roster.tables.allocator.num_usable + 1
    if num_prompt + wanted > capacity:
      raise ValueError(
        f'prompt: got {num_prompt} tokens and {wanted} to generate, expected at'
        f' most {capacity} together (the cache of this engine); lower'
        ' max_tokens or give the engine more pages'
      )
    return settings.max_tokens or max(min(context, capacity) - num_prompt, 1)

  def has_room_for(self, request: requests.Request) -> bool:
    """Whether `submit` would take a request in now.

    Of one that is larger than the whole queue it is told where nothing else is:
    that it can never be taken in, submitting it says.
    """
    return not self.has_work or (
      self.num_waiting + request.settings.n <= self.config.max_waiting
    )

  def submit(self, request: requests.Request) -> int:
    """Takes a request in; returns the id that its updates carry.

    Raises:
      ValueError: it could never be answered.
      Overloaded: too many wait; try again later.
    """
    max_new = self.room_for(request)
    num = request.settings.n
    waiting = self.num_waiting
    if waiting + num > self.config.max_waiting:
      self.metrics.refused.labels('overloaded').inc()
      raise Overloaded(
        f'got {num} more sequences while {waiting} wait, expected at most'
        f' {self.config.max_waiting} to wait; try again later'
      )
    request_id = next(self._ids)
    settings, prompt = request.settings, request.prompt_ids
    base = settings.seed
    if base is None:
      base = secrets.randbelow(settings_lib.NUM_SEEDS)
    principal = None if self.config.share_prefixes else request.principal
    reads = self.config.prefix_cache and settings.prompt_logprobs is None
    for index in range(num):
      # Each has a seed of its own; the first has the one given.
      seed = (base + index) % settings_lib.NUM_SEEDS
      live = answer.Live(
        request_id, index, request, seed, self.tokenizer, max_new
      )
      self.roster.submit(
        live.id,
        prompt,
        max_new,
        principal=request.principal,
        priority=request.priority,
        scope=(self.weights_digest, principal),
        reads_prefix_cache=reads,
        parent=(request_id, 0) if index else None,
      )
      self._live[live.id] = live
    return request_id

  def cancel(self, request_id: int) -> None:
    """Drops what is left of a request; its pages are free at the next step."""
    for live in list(self._live.values()):
      if live.request_id == request_id:
        self._close(live, 'cancelled')

  def set_params(
    self, params: device_state.Params, weights_digest: str
  ) -> None:
    """Serves other weights of the same model: the next step of on-policy RL.

    Raises:
      ValueError: sequences are in flight, or shapes and dtypes differ.
    """
    if self.has_work:
      raise ValueError(
        f'weights: got new ones while {len(self._live)} sequences run, expected'
        ' none; finish or cancel them, a sequence has one set of weights'
      )
    if 'layers' in params['params']:
      params, _ = layout.unstack(
        params, dataclasses.replace(self.model_config, scan_layers=True)
      )
    got, expected = (
      jax.tree.map(lambda x: (x.shape, x.dtype.name), tree)
      for tree in (params, self.params)
    )
    if got != expected:
      raise ValueError(
        'weights: got other names, shapes or dtypes than those served, expected'
        ' the same; make another engine for another model'
      )
    self.params, self.weights_digest = params, weights_digest
    self.roster.clear()

  # --------------------------------------------------------------------------
  # Steps

  def run(self) -> Iterator[requests.Update]:
    """Yields updates until nothing is left to do."""
    while self.has_work:
      yield from self.step()

  def step(self) -> list[requests.Update]:
    """Dispatches the next step, and returns what the one before has brought."""
    start = time.perf_counter()
    compiled = compilations.on_this_thread()
    # Before anybody enters: who does has held nothing until now, least of all
    # while the engine had nothing to do.
    self._charge_memory(start)
    plan = self.roster.plan()
    flight = None
    if plan.preempted or not plan.is_empty:
      self.metrics.preemptions.inc(len(plan.preempted))
      for live_id in plan.preempted:
        self._live[live_id].usage.preemptions += 1
      flight = self._dispatch(self.roster.begin(plan))
    landed, self._flight = self._flight, flight
    if flight is None and landed is None and self._live:
      raise RuntimeError(
        f'got {len(self._live)} sequences and nothing to do for any of them;'
        ' report this as a bug'
      )
    waited = 0.0
    updates: list[requests.Update] = []
    if landed is not None:
      before = time.perf_counter()
      outputs = jax.device_get(landed.outputs)
      waited = time.perf_counter() - before
      updates = self._land(landed, outputs)
    seconds = time.perf_counter() - start
    self.metrics.step_seconds.inc(seconds)
    self.metrics.host_seconds.inc(seconds - waited)
    self.metrics.compilations.inc(compilations.on_this_thread() - compiled)
    self._set_gauges()
    return updates

  def _dispatch(self, step: sequence_manager.Step) -> _Flight | None:
    """Sends a step to the device."""
    now = time.perf_counter()
    for live_id in step.seated:
      live = self._live[live_id]
      self._seat(live, step)
      if live.seated_at is None:
        self._note_seated(live, now)
    if step.copies:
      self._state = self._programs.copy_pages(self._state, step.copies)
    if not step.decodes and not step.chunks:
      return None
    shape = self._programs.shape_for(len(step.decodes), len(step.chunks))
    inputs = self._programs.empty_inputs(shape)
    inputs_lib.fill(
      inputs,
      step,
      chunk_tokens=self.config.chunk_tokens,
      scored_prompt=lambda live_id: self._live[live_id].scored_prompt(),
      forced_token=lambda live_id, position: self._live[live_id].forced_token(
        position
      ),
    )
    self._state, outputs = self._programs.step(
      shape, self.params, self._state, inputs
    )
    self._count(step, len(inputs.tokens_T))
    return _Flight(step, shape, outputs)

  def _seat(self, live: answer.Live, step: sequence_manager.Step) -> None:
    slot = self.roster.slot(live.id)
    self._state = self._programs.seat(self._state, slot, live.sampler_row())
    if live.has_penalties:
      ids = self.roster.tokens(live.id)
      self._state = self._programs.recount(
        self._state, slot, ids, live.num_prompt
      )

  def _note_seated(self, live: answer.Live, now: float) -> None:
    live.seated_at = now
    live.usage.queue_seconds = now - live.submitted_at
    live.usage.cached_tokens = self.roster.num_cached_tokens(live.id)
    self.metrics.queue.observe(live.usage.queue_seconds)
    self.metrics.cached_tokens.inc(live.usage.cached_tokens)

  def _land(self, flight: _Flight, outputs) -> list[requests.Update]:
    """Takes in the tokens of a step."""
    now = time.perf_counter()
    self._charge_memory(now)
    num_decodes = flight.shape.num_decodes
    for index, chunk in enumerate(flight.step.chunks):
      if (live := self._live.get(chunk.id)) and live.scored_prompt():
        live.take_prompt_logprobs(
          outputs.prompt, chunk, index * self.config.chunk_tokens
        )
    updates = []
    for place, row in inputs_lib.sampling_rows(flight.step, num_decodes):
      live = self._live.get(row.id)
      if live is None:
        continue  # it ended while this step ran
      token = int(outputs.tokens_R[place])
      self.roster.append(row.id, token)
      since = live.submitted_at if live.last_at is None else live.last_at
      which = 'first_token' if live.last_at is None else 'inter_token'
      getattr(self.metrics, which).observe(now - since)
      updates.append(live.push(token, outputs.logprobs, place, now))
      self.metrics.sampled_tokens.inc()
      if live.transcript.finish_reason:
        self._close(live, live.transcript.finish_reason)
    return updates

  def _close(self, live: answer.Live, reason: str) -> None:
    self.metrics.finished.labels(reason).inc()
    self.roster.end(live.id)
    del self._live[live.id]

  def _charge_memory(self, now: float) -> None:
    """Charges each sequence for the pages that it held since last time."""
    seconds, self._last_charged = now - self._last_charged, now
    for live_id in self.roster.running():
      held = self.roster.num_pages_held(live_id) * self.page_bytes
      self._live[live_id].usage.kv_byte_seconds += held * seconds

  def _count(self, step: sequence_manager.Step, num_rows: int) -> None:
    """Charges the work of a step to its sequences, and counts its rows."""
    num_real = 0
    for row in (*step.decodes, *step.chunks):
      live = self._live[row.id]
      num_real += row.length
      num_logits = int(row.samples)
      if live.scored_prompt():
        num_logits = row.length
      cost = flops.span_flops(
        self.model_config, row.start, row.length, num_logits
      )
      live.usage.flops += cost
      self.metrics.flops.inc(cost)
    for row in step.decodes:
      self._live[row.id].usage.decode_tokens += 1
    for row in step.chunks:
      self._live[row.id].usage.prefill_tokens += row.length
    num_prefill = num_real - len(step.decodes)
    self.metrics.steps.inc()
    self.metrics.decode_tokens.inc(len(step.decodes))
    self.metrics.prefill_tokens.inc(num_prefill)
    self.metrics.rows.labels('real').inc(num_real)
    self.metrics.rows.labels('padding').inc(num_rows - num_real)

  def _set_gauges(self) -> None:
    gauges = self.roster.gauges()
    self.metrics.running.set(gauges.num_running)
    self.metrics.waiting.set(gauges.num_waiting)
    self.metrics.pages_used.set(gauges.pages_used)
    self.metrics.pages_idle.set(gauges.pages_idle)
    self.metrics.pages_free.set(gauges.pages_free)
    slots = gauges.pages_used * self.page_tokens
    held = gauges.tokens_held
    self.metrics.kv_waste.set(1 - held / slots if slots else 0.0)
    looked_up = gauges.prefix_tokens_looked_up
    found = gauges.prefix_tokens_found
    self.metrics.prefix_hit_rate.set(found / looked_up if looked_up else 0.0)


def _kv_bytes_per_token(config, dtype, channels: int) -> float:
  vector = channels * jnp.dtype(dtype).itemsize
  if jnp.dtype(dtype) == jnp.int8:
    vector += 4  # its scale
  rows, _ = kv_cache.rows_and_width(config)
  return config.num_layers * rows * vector
