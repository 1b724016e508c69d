"""An adapter on a server: a version whose engine is that of its base.

It has a name, an identity NAME@DIGEST and traffic as every version has. The
digest covers the weights of the adapter and of its base. Its requests join the
batch of the base, and cached prefixes are its own.
"""

import asyncio
from collections.abc import Coroutine, Sequence
from typing import Any

import prometheus_client

from frozen import adapters as frozen_adapters
from inference import generate
from inference.engine import metrics
from inference.server import engine_loop as engine_loop_lib, service
from inference.server.api import errors
from inference.server.versions import fingerprint

_TICK_SECONDS = 0.02


class ServedAdapter(service.ServedModel):
  """An adapter that answers under a name of its own."""

  adapter: frozen_adapters.Adapter
  base: service.ServedModel

  def __init__(
    self,
    name: str,
    adapter: frozen_adapters.Adapter,
    base: service.ServedModel,
  ):
    """Describes the adapter; it is loaded once its base is.

    Args:
      name: name of the adapter in requests.
      adapter: an adapter of the base.
      base: the version whose engine computes it.
    """
    super().__init__(
      name, base.engine_loop, base.manifest, context=base.context
    )
    self.adapter, self.base = adapter, base
    self.identify(adapter.manifest.adapter_digest)
    self._generator: generate.Generator | None = None
    self._failure: Exception | None = None
    self._metrics = _Metrics()

  @property
  def state(self) -> str:
    """The state of its base, or LOADING, or FAILED."""
    if self.failure:
      return engine_loop_lib.FAILED
    state = self.base.state
    if state == engine_loop_lib.READY and self._generator is None:
      return engine_loop_lib.LOADING
    return state

  @property
  def failure(self) -> Exception | None:
    """The error that ended the adapter or its base."""
    return self._failure or self.base.failure

  def loaded(self) -> generate.Generator | None:
    """Returns its generator, None until it is loaded."""
    return self._generator

  def registries(self) -> list[engine_loop_lib.Labelled]:
    """Returns the registries of its metrics; its base has the engine's."""
    return [({}, self.shadow.registry), ({}, self._metrics.registry)]

  def count(self, updates: Sequence[engine_loop_lib.Item]) -> None:
    """Counts the last updates of sequences."""
    self._metrics.count(updates)

  def start(self) -> Coroutine | None:
    """Returns the work that loads it."""
    return self._load()

  async def _load(self) -> None:
    while self.base.state == engine_loop_lib.LOADING:
      await asyncio.sleep(_TICK_SECONDS)
    try:
      self.base.generator()  # 503: it has stopped, or failed
      await self.engine_loop.load_adapter(self.adapter)
    except (
      errors.ApiError,
      ValueError,
      engine_loop_lib.Failed,
      engine_loop_lib.Stopped,
    ) as error:
      self._failure = error
    else:
      self._generator = self.base.generator().beside(self.adapter)

  async def unload(self) -> None:
    """Frees its slot in the engine; no request needs it any more."""
    while self.state == engine_loop_lib.LOADING:
      await asyncio.sleep(_TICK_SECONDS)
    if self._generator is None:
      return
    self._generator = None
    while True:
      try:
        await self.engine_loop.unload_adapter(self.digest)
        return
      except ValueError:  # its last sequence is cancelled, and not yet gone
        await asyncio.sleep(_TICK_SECONDS)
      except (engine_loop_lib.Failed, engine_loop_lib.Stopped):
        return

  def card(self) -> dict[str, Any]:
    """Returns its entry of /v1/models."""
    manifest, card = self.adapter.manifest, super().card()
    return {
      **card,
      'root': self.base.name,
      'parent': self.base.version,
      'digests': fingerprint.digests(
        self.manifest, self.loaded(), self.adapter
      ),
      'lineage': {
        **card['lineage'],
        'weights_digest': self.manifest.weights_digest,
        'adapter_digest': self.digest,
        'num_params': manifest.num_params,
        'experiment': manifest.experiment,
        'step': manifest.step,
        'tokens_seen': manifest.tokens_seen,
        'code_commit': manifest.code_commit,
        'knowledge_cutoff': manifest.knowledge_cutoff,
        'parents': {**manifest.lineage, 'base': manifest.base_digest},
      },
    }


class _Metrics:
  """The usage of the requests to an adapter; parts of the engine's sums."""

  def __init__(self):
    self.registry = prometheus_client.CollectorRegistry()

    def counter(name: str, text: str, labels: Sequence[str] = ()):
      return prometheus_client.Counter(
        f'adapter_{name}', text, labels, registry=self.registry
      )

    self._finished = counter(
      'finished', 'Sequences that ended, a part of finished.', ['reason']
    )
    self._tokens = {
      name: counter(name, f'A part of {name}.')
      for name in ('prefill_tokens', 'decode_tokens', 'cached_tokens')
    }
    self._sampled = counter('sampled_tokens', 'A part of sampled_tokens.')
    self._flops = counter('flops', 'A part of flops.')
    self._kv_byte_seconds = counter(
      'kv_byte_seconds', 'Bytes of pages, times seconds.'
    )

    def histogram(name: str, text: str) -> metrics.Histogram:
      return metrics.Histogram(f'adapter_{name}', text, self.registry)

    self._queue = histogram(
      'queue_seconds', 'From submission to the first step.'
    )
    self._first_token = histogram(
      'time_to_first_token_seconds', 'From submission to the first token.'
    )
    self._inter_token = histogram(
      'inter_token_seconds', 'Between two tokens, the mean of each sequence.'
    )

  def count(self, updates: Sequence[engine_loop_lib.Item]) -> None:
    for _, update in updates:
      if (done := update.completion) is None:
        continue
      self._finished.labels(done.finish_reason).inc()
      usage, num_tokens = done.usage, done.num_completion_tokens
      for name, each in self._tokens.items():
        each.inc(getattr(usage, name))
      self._sampled.inc(num_tokens)
      self._flops.inc(usage.flops)
      self._kv_byte_seconds.inc(usage.kv_byte_seconds)
      self._queue.observe(usage.queue_seconds)
      if num_tokens:
        seconds = usage.queue_seconds + usage.prefill_seconds
        self._first_token.observe(seconds)
      if num_tokens > 1:
        mean = usage.decode_seconds / (num_tokens - 1)
        self._inter_token.observe(mean, num_tokens - 1)
