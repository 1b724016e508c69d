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
two that changes while it runs.

The host is one step ahead. Step i+1 is planned and dispatched before the tokens
of step i are read: a token reaches the next step without leaving the device,
and the host works while the device computes. If a sequence turns out to have
ended at step i, its token of step i+1 is dropped.

One thread owns an engine.
"""

import collections
from collections.abc import Generator, Iterator, Sequence
from concurrent import futures
import dataclasses
import itertools
import time
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp

from hardware import peaks
from inference.engine import (
  answer as answer_lib,
  compilations,
  device_state,
  engine_config,
  execution,
  inputs as inputs_lib,
  metrics,
  programs,
  requests as requests_lib,
  steps,
)
from inference.output import stop_strings
from inference.sampling import settings as settings_lib
from inference.scheduling import fairness, page_tables, sequence_manager
from models import flops, model_config as model_config_lib, transformer
from text import tokenizer as tokenizer_lib


class Overloaded(RuntimeError):
  """Too many sequences wait for the engine to take more; try again later."""


class _Flight(NamedTuple):
  """A step that is dispatched, and whose outputs are not read yet."""

  step: sequence_manager.Step
  shape: steps.Shape
  outputs: steps.Outputs


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
  ):
    """Allocates the KV cache and compiles the programs.

    Args:
      model_config: of the model; scanned layers are unstacked.
      params: variables of the model, on one device. Never changed. Those that
        are `Unread` are read while programs compile.
      tokenizer: of the model.
      weights_digest: of the params; cached prefixes belong to one digest.
      dtype: of the computation, and of the KV cache unless it is int8.
      config: the layout of the engine.
      compile_all: False compiles the few programs that every step can use. The
        others are left to `compile_rest`.
    """
    params = device_state.unread(params)
    self.config = config
    self.model_config = dataclasses.replace(model_config, scan_layers=False)
    self.weights_digest, self.tokenizer = weights_digest, tokenizer
    self.metrics = metrics.Metrics()
    device = params.device
    self.context = config.context(model_config.max_length)
    self.page_tokens = config.page_tokens(self.context)
    backend = execution.choose(config, model_config, dtype, device.platform)
    self._backend = backend
    bytes_per_token = backend.bytes_per_token(model_config)
    self.page_bytes = self.page_tokens * bytes_per_token
    num_pages = config.pool_pages(
      self.context,
      bytes_per_token=bytes_per_token,
      weight_bytes=params.num_bytes,
      memory_bytes=peaks.memory_bytes(device),
      is_host=device.platform == 'cpu',
    )
    self.manager = sequence_manager.SequenceManager(
      config.limits(self.page_tokens), num_pages=num_pages
    )
    model = transformer.Transformer(
      self.model_config, jnp.dtype(dtype), backend.execution
    )
    # A thread reads the weights: programs need their shapes alone.
    with jax.default_device(device), futures.ThreadPoolExecutor(1) as pool:
      reading = pool.submit(backend.read, params, self.model_config)
      self._state = device_state.init_state(
        model,
        num_slots=config.max_sequences,
        num_pages=num_pages,
        page_size=self.page_tokens,
        kv_dtype=backend.kv_dtype,
        channels=backend.channels,
        vocab_size=tokenizer.vocab_size,
      )
      start = time.perf_counter()
      self._programs = programs.Programs(
        model=model,
        params=backend.shapes(params, self.model_config),
        state=self._state,
        shapes=[steps.Shape(*shape) for shape in config.step_shapes()],
        chunk_tokens=config.chunk_tokens,
        table_width=config.table_width(self.context),
        vocab_size=tokenizer.vocab_size,
        compile_all=compile_all,
      )
      self.compile_seconds = time.perf_counter() - start
      self.params = reading.result()
    self._device = device
    self._flight: _Flight | None = None
    self._live: dict[page_tables.Sequence, answer_lib.Live] = {}
    self._inboxes: dict[int, collections.deque[requests_lib.Update]] = {}
    self._ids = itertools.count()
    self._last_charged = time.perf_counter()

  # --------------------------------------------------------------------------
  # Requests

  @property
  def has_work(self) -> bool:
    """Whether a step would do anything."""
    return bool(self._live) or self._flight is not None

  def compile_rest(self) -> None:
    """Compiles the programs that are left, in a thread beside the engine's."""
    with jax.default_device(self._device):
      self._programs.compile_rest()

  @property
  def num_waiting(self) -> int:
    """Number of sequences that wait for a slot."""
    return self.manager.gauges().num_waiting

  def checked(self, request: requests_lib.Request) -> requests_lib.Request:
    """Returns a request with its `room`, the tokens that may follow its prompt.

    Raises:
      ValueError: prompt and completion do not fit into the context or the KV
        cache, or a token id is outside the vocabulary.
    """
    # The last token is sampled and never computed: it needs no place in a page.
    capacity = self.page_tokens * self.manager.tables.allocator.num_usable + 1
    room = requests_lib.room_for(
      request,
      vocab_size=self.tokenizer.vocab_size,
      context=self.context,
      capacity=capacity,
    )
    return dataclasses.replace(request, room=room)

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
    requests = [
      self.checked(request) if request.room is None else request
      for request in requests
    ]
    asked = requests_lib.num_sequences(requests)
    most = self.config.max_waiting
    own_most = fairness.most_waiting(most)
    if max(asked.values()) > own_most:
      raise ValueError(
        f'prompt: got {asked.total()} completions to make, expected at most'
        f' {own_most} of one client (engine.max_waiting); send several requests'
      )
    if not self._has_places(asked):
      self.metrics.refused.labels('overloaded').inc()
      raise Overloaded(
        f'got {asked.total()} more completions to make while'
        f' {self.num_waiting} wait, expected at most {most} to wait, and'
        f' {own_most} of one client; try again later'
      )
    return [self._submit(request) for request in requests]

  def _has_places(self, asked: collections.Counter[str]) -> bool:
    own = {each: self.manager.num_waiting_of(each) for each in asked}
    return fairness.has_places(
      asked, own, max_waiting=self.config.max_waiting, waiting=self.num_waiting
    )

  def answer(
    self, requests: Sequence[requests_lib.Request]
  ) -> Generator[tuple[int, requests_lib.Update]]:
    """Yields updates, each with the index of its request among `requests`.

    Submits requests as the queue has room for them. Several iterators may be
    open at once: the one that is asked for its next update runs a step, and
    updates for the others wait in their inboxes. Closing an iterator cancels
    its requests.

    Raises:
      ValueError: a request could never be answered; at the call, before any
        work.
    """
    return self._answer([self.checked(request) for request in requests])

  def _answer(self, requests: list[requests_lib.Request]):
    pending = collections.deque(enumerate(requests))
    which: dict[int, int] = {}  # index in `requests`, by request id
    num_left: dict[int, int] = {}  # unfinished sequences, by request id
    try:
      while pending or num_left:
        while pending and self._has_room_for(pending[0][1]):
          index, request = pending.popleft()
          request_id = self.submit(request)
          which[request_id], num_left[request_id] = index, request.settings.n
          self._inboxes[request_id] = collections.deque()
        full = next((key for key in num_left if self._inboxes[key]), None)
        if full is None:
          for update in self.step():
            if update.request_id in self._inboxes:
              self._inboxes[update.request_id].append(update)
          continue
        update = self._inboxes[full].popleft()
        if update.completion:
          num_left[full] -= 1
          if not num_left[full]:
            del num_left[full], self._inboxes[full]
        yield which[full], update
    finally:
      for request_id in num_left:
        self.cancel(request_id)
        del self._inboxes[request_id]

  def _has_room_for(self, request: requests_lib.Request) -> bool:
    # Without work, `submit` refuses a request that is larger than the queue.
    asked = requests_lib.num_sequences([request])
    return not self.has_work or self._has_places(asked)

  def _submit(self, request: requests_lib.Request) -> int:
    """Makes the n sequences of a checked request."""
    assert request.room is not None
    request_id, settings = next(self._ids), request.settings
    base = settings_lib.new_seed() if settings.seed is None else settings.seed
    principal = None if self.config.share_prefixes else request.principal
    stop = stop_strings.StopStrings(settings.stop)
    parent = None
    for index in range(settings.n):
      sequence = self.manager.submit(
        (request_id, index),
        request.prompt_ids,
        request.room,
        principal=request.principal,
        priority=request.priority,
        scope=(self.weights_digest, principal),
        # Logprobs need every position of the prompt computed.
        reads_prefix_cache=(
          self.config.prefix_cache and settings.prompt_logprobs is None
        ),
        parent=parent,
      )
      parent = parent or sequence
      self._live[sequence] = answer_lib.Live(
        request_id,
        index,
        request,
        sequence,
        seed=settings_lib.sample_seed(base, index),
        tokenizer=self.tokenizer,
        stop=stop,
      )
    return request_id

  def cancel(self, request_id: int) -> None:
    """Ends the unfinished sequences of a request, and releases their pages."""
    for live in list(self._live.values()):
      if live.request_id == request_id:
        self._close(live, 'cancelled')

  def set_params(
    self, params: device_state.Params, weights_digest: str
  ) -> None:
    """Serves other weights of the same model, as on-policy RL does each step.

    Raises:
      ValueError: a request is unfinished, or shapes or dtypes differ.
    """
    if self.has_work:
      raise ValueError(
        f'weights: got new ones while {len(self._live)} sequences run, expected'
        ' none; finish or cancel them, a sequence has one set of weights'
      )
    params = self._backend.laid_out(params, self.model_config)
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
    self.manager.clear()

  # --------------------------------------------------------------------------
  # Steps

  def run(self) -> Iterator[requests_lib.Update]:
    """Yields updates until no work is left."""
    while self.has_work:
      yield from self.step()

  def step(self) -> list[requests_lib.Update]:
    """Dispatches the next step, and returns the updates of the step before."""
    start = time.perf_counter()
    compiled = compilations.on_this_thread()
    # Before sequences enter: they have held no pages until now.
    self._charge_memory(start)
    plan = self.manager.plan()
    flight = None
    if plan.preempted or not plan.is_empty:
      flight = self._dispatch(self.manager.begin(plan))
    landed, self._flight = self._flight, flight
    if flight is None and landed is None and self._live:
      raise RuntimeError(
        f'got {len(self._live)} sequences and nothing to do for any of them;'
        ' report this as a bug'
      )
    waited = 0.0
    updates: list[requests_lib.Update] = []
    if landed is not None:
      before = time.perf_counter()
      outputs = jax.device_get(landed.outputs)
      waited = time.perf_counter() - before
      updates = self._land(landed, outputs)
    seconds = time.perf_counter() - start
    self.metrics.step_seconds.inc(seconds)
    self.metrics.host_seconds.inc(seconds - waited)
    self.metrics.compilations.inc(compilations.on_this_thread() - compiled)
    self.metrics.set_gauges(self.manager.gauges(), self.page_tokens)
    return updates

  def _dispatch(self, step: sequence_manager.Step) -> _Flight | None:
    """Sends a step to the device."""
    now = time.perf_counter()
    self.metrics.preemptions.inc(len(step.preempted))
    for sequence in step.preempted:
      self._live[sequence].usage.preemptions += 1
    for sequence in step.seated:
      live = self._live[sequence]
      self._seat(live)
      if live.seated_at is None:
        live.begin(now)
        self.metrics.queue.observe(live.usage.queue_seconds)
        self.metrics.cached_tokens.inc(live.usage.cached_tokens)
    if step.copies:
      self._state = self._programs.copy_pages(self._state, step.copies)
    if not step.spans:
      return None
    shape = self._programs.shape_for(len(step.decodes), len(step.chunks))
    inputs = self._programs.empty_inputs(shape)
    inputs_lib.fill(
      inputs,
      step,
      chunk_tokens=self.config.chunk_tokens,
      answers=self._live,
    )
    self._state, outputs = self._programs.step(
      shape, self.params, self._state, inputs
    )
    self._count(step, len(inputs.tokens_T))
    return _Flight(step, shape, outputs)

  def _seat(self, live: answer_lib.Live) -> None:
    """Writes the settings of a sequence to its slot."""
    sequence = live.sequence
    assert sequence.slot is not None
    self._state = self._programs.seat(
      self._state, sequence.slot, live.sampler_row()
    )
    if live.has_penalties:
      self._state = self._programs.recount(
        self._state, sequence.slot, sequence.tokens, sequence.num_prompt
      )

  def _land(self, flight: _Flight, outputs) -> list[requests_lib.Update]:
    """Takes the tokens of a step, and returns the updates."""
    now = time.perf_counter()
    self._charge_memory(now)
    updates = self._land_failures(flight, outputs)
    for place, span in inputs_lib.sampling_spans(
      flight.step, flight.shape.num_decodes
    ):
      live = self._live.get(span.sequence)
      if live is None:
        continue  # it ended while this step ran
      token = int(outputs.tokens_R[place])
      self.manager.append(span.sequence, token)
      since = live.submitted_at if live.last_at is None else live.last_at
      which = 'first_token' if live.last_at is None else 'inter_token'
      getattr(self.metrics, which).observe(now - since)
      updates.append(live.push(token, outputs.logprobs, place, now))
      self.metrics.sampled_tokens.inc()
      if live.transcript.finish_reason:
        self._close(live, live.transcript.finish_reason)
    return updates

  def _land_failures(
    self, flight: _Flight, outputs
  ) -> list[requests_lib.Update]:
    """Takes prompt logprobs, and ends sequences without a finite next token."""
    updates = []
    num_decodes = flight.shape.num_decodes
    for place, span in inputs_lib.placed_spans(flight.step, num_decodes):
      live = self._live.get(span.sequence)
      is_sound = outputs.tokens_R[place] >= 0
      if live and place >= num_decodes and live.scored_prompt():
        at = (place - num_decodes) * self.config.chunk_tokens
        is_sound &= live.take_prompt_logprobs(outputs.prompt, span, at)
      if is_sound:
        continue
      if live is None:  # it ended while this step ran
        self.manager.discard(span.sequence)
      else:
        updates.append(live.fail())
        self._close(live, 'error')
    return updates

  def _close(self, live: answer_lib.Live, reason: str) -> None:
    self.metrics.finished.labels(reason).inc()
    self.manager.end(live.sequence, is_sound=reason != 'error')
    del self._live[live.sequence]

  def _charge_memory(self, now: float) -> None:
    """Charges each sequence for its pages since the last charge."""
    seconds, self._last_charged = now - self._last_charged, now
    for sequence in self.manager.running():
      held = len(sequence.pages) * self.page_bytes
      self._live[sequence].usage.kv_byte_seconds += held * seconds

  def _count(self, step: sequence_manager.Step, num_tokens: int) -> None:
    """Charges the work of a step to its sequences, and counts its tokens.

    Args:
      step: that was dispatched.
      num_tokens: T of its shape, padding included.
    """
    for span in step.spans:
      live = self._live[span.sequence]
      num_logits = span.length if live.scored_prompt() else int(span.samples)
      cost = flops.span_flops(
        self.model_config, span.start, span.length, num_logits
      )
      live.usage.flops += cost
      self.metrics.flops.inc(cost)
    for span in step.decodes:
      self._live[span.sequence].usage.decode_tokens += 1
    for span in step.chunks:
      self._live[span.sequence].usage.prefill_tokens += span.length
    self.metrics.count_step(step, num_tokens)
