"""The self-audit: finished requests, scored again by the cache-free forward.

A sampled share of the requests is recorded with the log-probabilities of its
tokens. While no engine has work, a thread of low priority computes them again,
one sequence alone, from the weights that the engine computes with. A page with
the keys of another request, a wrong mask, a damaged cache: all of them make a
difference that rounding cannot explain. It raises a metric and logs an error
with the id of the request. Nothing of a prompt or an answer is logged.

The thread stops between two layers as soon as a request arrives, and starts
that sequence again later, so that a request waits for one layer at most. The
weights themselves are compared with their digest when the server stops.
"""

from __future__ import annotations

import collections
from collections.abc import Callable, Sequence
import dataclasses
import logging
import random
import threading
import typing
from typing import Protocol
import weakref

import numpy as np
import prometheus_client

from frozen import adapters as frozen_adapters, manifest as manifest_lib
from inference import full_forward, generate
from inference.requests import requests as requests_lib
from inference.server import engine_thread
from inference.server.http import exchanges, thread_priority

if typing.TYPE_CHECKING:  # a replica has no service
  from inference.server import service

_LOG = logging.getLogger('uvicorn.error')

# Their ids are in memory until the engine is idle.
_MOST_WAITING = 64
# Of a sequence: attention and hidden states of more would take memory that the
# KV cache was given.
_MOST_TOKENS = 4096
_TICK_SECONDS = 0.05


class Audited(Protocol):
  """A version whose answers are scored again; `ServedModel` has these."""

  version: str
  manifest: manifest_lib.Manifest
  adapter: frozen_adapters.Adapter | None

  @property
  def is_draining(self) -> bool:
    """Whether it is unloaded soon."""
    ...

  def hold(self) -> None:
    """Keeps it loaded, until `release`."""
    ...

  def release(self) -> None:
    """Ends a `hold`."""
    ...

  def generator(self) -> generate.Generator:
    """Returns its generator."""
    ...


class Engine(Protocol):
  """An engine that must be idle."""

  @property
  def state(self) -> str:
    """A state of an engine loop."""
    ...

  @property
  def is_idle(self) -> bool:
    """Whether it is complete, and has nothing to do."""
    ...


class _Interrupted(Exception):
  """The engine has work, or the server stops."""


@dataclasses.dataclass(frozen=True, kw_only=True)
class Item:
  """A finished sequence."""

  model: Audited
  request_id: str
  index: int  # of the choice
  prompt_ids: tuple[int, ...]
  token_ids: tuple[int, ...]
  logprobs: tuple[float, ...]  # of token_ids


class Auditor:
  """Observes models, and scores a share of their requests again."""

  def __init__(
    self,
    share: float,
    threshold: float = 0.0,
    *,
    engines: Callable[[], Sequence[Engine]] = list,
  ):
    """Starts without a thread.

    Args:
      share: share of the requests to audit, 0 to 1.
      threshold: the difference that raises an alarm, in nats; 0: the tolerance
        of the dtype, see `full_forward.tolerance`.
      engines: returns the engines that must be idle.
    """
    self._share, self._threshold, self.engines = share, threshold, engines
    self._waiting: collections.deque[Item] = collections.deque()
    self._forwards: weakref.WeakKeyDictionary[
      Audited, full_forward.FullForward
    ] = weakref.WeakKeyDictionary()
    self._random = random.Random()
    self._is_closed = threading.Event()
    self._thread = threading.Thread(target=self._run, name='audit', daemon=True)
    self.metrics = Metrics()

  def start(self) -> None:
    """Starts the thread, if a share is to be audited."""
    if self._share:
      self._thread.start()

  def close(self) -> None:
    """Ends the thread after the program that it runs."""
    self._is_closed.set()
    if self._thread.is_alive():
      self._thread.join()

  def observe(
    self,
    model: service.ServedModel,
    requests: Sequence[requests_lib.Request],
  ) -> service.OnFinished | None:
    """Returns the function that keeps finished sequences, for a share."""
    if self._random.random() >= self._share:
      return None
    request_id = exchanges.current().request_id

    def keep(
      which: int, index: int, completion: requests_lib.Completion
    ) -> None:
      request, found = requests[which], completion.logprobs
      if completion.finish_reason == 'error' or not found:
        return
      item = Item(
        model=model,
        request_id=request_id,
        index=which * request.settings.n + index,
        prompt_ids=request.prompt_ids,
        token_ids=tuple(completion.token_ids),
        logprobs=tuple(each.chosen for each in found),
      )
      # Where the weights are in another process, it has an audit of its own.
      if not model.engine_loop.audit(item):
        self.keep(item)

    return keep

  def keep(self, item: Item) -> None:
    """Keeps a sequence until the engines are idle; drops it if there are many.

    Any thread may call this.
    """
    if len(item.prompt_ids) + len(item.token_ids) > _MOST_TOKENS:
      self.metrics.skipped.labels('too_long').inc()
    elif len(self._waiting) >= _MOST_WAITING:
      self.metrics.skipped.labels('busy').inc()
    else:
      self._waiting.append(item)

  # --------------------------------------------------------------------------
  # In the thread

  def _run(self) -> None:
    thread_priority.lower()
    while not self._is_closed.wait(_TICK_SECONDS):
      while self._waiting and self._may_work():
        item = self._waiting.popleft()
        try:
          self._audit(item)
        except _Interrupted:
          self._waiting.appendleft(item)
        except Exception as error:
          self.metrics.skipped.labels('failed').inc()
          if not item.model.is_draining:
            _LOG.error('the audit failed', exc_info=error)

  def _may_work(self) -> bool:
    return not self._is_closed.is_set() and all(
      each.is_idle or each.state != engine_thread.READY
      for each in self.engines()
    )

  def _pause(self) -> None:
    if not self._may_work():
      raise _Interrupted

  def _audit(self, item: Item) -> None:
    item.model.hold()  # it is not unloaded meanwhile
    try:
      found = self._forward(item.model).logprobs(
        (*item.prompt_ids, *item.token_ids), len(item.prompt_ids), self._pause
      )
      self._judge(item, np.abs(found - np.asarray(item.logprobs, np.float32)))
    finally:
      item.model.release()

  def _forward(self, model: Audited) -> full_forward.FullForward:
    if model not in self._forwards:
      generator = model.generator()
      self._forwards[model] = full_forward.FullForward(
        generator.engine.params,
        generator.engine.placement.all_model,
        dtype=generator.frozen.manifest.dtype,
        vocab_size=generator.tokenizer.vocab_size,
        adapter=model.adapter.tree if model.adapter else None,
      )
    return self._forwards[model]

  def _judge(self, item: Item, differences: np.ndarray) -> None:
    # A difference that is no number is the worst one.
    differences = np.where(np.isnan(differences), np.inf, differences)
    worst = int(np.argmax(differences))
    largest = float(differences[worst])
    threshold = self._threshold or _tolerance(item.model)
    self.metrics.count(len(differences), largest)
    if largest > threshold:
      self.metrics.alarms.inc()
      _LOG.error(
        'self-audit: %s answered request %s, choice %d, with a log-probability'
        ' at new token %d that is %.3g nats from that of the cache-free forward'
        ' (%.3g are allowed): its answers may be wrong',
        item.model.version,
        item.request_id,
        item.index,
        worst,
        largest,
        threshold,
      )


def _tolerance(model: Audited) -> float:
  """Returns the tolerance of a model's log-probabilities, in nats."""
  engine = model.generator().engine
  return full_forward.tolerance(
    model.manifest.dtype,
    platform=engine.device.platform,
    kv_dtype=engine.config.kv_dtype,
  )


class Metrics:
  """The results of the audit since the start."""

  def __init__(self):
    self.registry = prometheus_client.CollectorRegistry()

    def counter(name: str, text: str, labels: Sequence[str] = ()):
      return prometheus_client.Counter(
        name, text, labels, registry=self.registry
      )

    self.sequences = counter('audited_sequences', 'Sequences scored again.')
    self.tokens = counter('audited_tokens', 'Tokens of these sequences.')
    self.alarms = counter(
      'audit_alarms', 'Sequences that differ by more than rounding explains.'
    )
    self.skipped = counter(
      'audit_skipped', 'Sampled sequences that were not scored.', ['reason']
    )
    self.largest = prometheus_client.Gauge(
      'audit_largest_difference',
      'Largest difference of a log-probability, in nats.',
      registry=self.registry,
    )
    self._largest = 0.0

  def count(self, num_tokens: int, difference: float) -> None:
    """Counts a sequence and its largest difference."""
    self.sequences.inc()
    self.tokens.inc(num_tokens)
    self._largest = max(self._largest, difference)
    self.largest.set(self._largest)
