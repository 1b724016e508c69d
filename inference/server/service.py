"""The parts of the server that its routes share."""

from collections.abc import Callable, Sequence
import dataclasses
import threading
import time
from typing import Any, Protocol

import prometheus_client

from frozen import manifest as manifest_lib
from inference import generate
from inference.engine import engine, requests as requests_lib
from inference.server import engine_loop as engine_loop_lib, server_config
from inference.server.access import admission as admission_lib, keys
from inference.server.api import errors
from inference.server.http import (
  bodies as bodies_lib,
  draining as draining_lib,
  exchanges,
)
from inference.server.records import database, responses
from inference.server.versions import fingerprint, memory, registry, shadow

_SHOWN_DIGITS = 16  # of a digest in NAME@DIGEST


class Observer(Protocol):
  """Sees finished sequences, such as an audit."""

  def observe(
    self, model: 'ServedModel', requests: Sequence[requests_lib.Request]
  ) -> 'OnFinished | None':
    """Returns the function that gets their completions; None: not these."""
    ...


# (index of the request among those submitted together, index of the sequence
# of the request, its completion)
OnFinished = Callable[[int, int, requests_lib.Completion], object]


class ServedModel:
  """A version of a model: its weights, its engine, its name in requests."""

  admission: admission_lib.Admission

  def __init__(
    self,
    name: str,
    engine_loop: engine_loop_lib.EngineLoop,
    manifest: manifest_lib.Manifest,
    *,
    context: int = 0,
    admission: admission_lib.Admission | None = None,
  ):
    """Describes the model; its weights need not be loaded yet.

    Args:
      name: the name in requests.
      engine_loop: runs its engine.
      manifest: of its frozen directory.
      context: most tokens of a sequence; 0: those of the model.
      admission: admits and bills its requests; None: that of the versions that
        it will be among.
    """
    self.name, self.engine_loop = name, engine_loop
    self.manifest, self.digest = manifest, manifest.weights_digest
    self.version = f'{name}@{self.digest[:_SHOWN_DIGITS]}'
    self.context = context or manifest.model['max_length']
    self.observers: list[Observer] = []
    if admission is not None:
      self.admission = admission
    self.shadow = shadow.Shadow(self)
    self.is_draining = False  # no new request finds it
    self.memory: memory.Plan | None = None  # once it is known
    self._num_held, self._lock = 0, threading.Lock()
    self._created = int(time.time())  # when this server began to load it

  def card(self) -> dict[str, Any]:
    """Returns its entry of /v1/models."""
    manifest = self.manifest
    generator = self.engine_loop.generator
    return {
      'id': self.name,
      'object': 'model',
      'created': self._created,
      'owned_by': 'two-lives',
      'max_model_len': self.context,
      'version': self.version,
      'digests': fingerprint.digests(manifest, generator),
      'lineage': {
        'weights_digest': self.digest,
        'num_params': manifest.num_params,
        'dtype': manifest.dtype,
        'experiment': manifest.name,
        'step': manifest.step,
        'tokens_seen': manifest.tokens_seen,
        'code_commit': manifest.code_commit,
        'knowledge_cutoff': manifest.knowledge_cutoff,
        'parents': manifest.lineage,
      },
    }

  def hold(self) -> None:
    """Keeps the model loaded, until `release`."""
    with self._lock:
      self._num_held += 1

  def release(self) -> None:
    """Ends a `hold`."""
    with self._lock:
      self._num_held -= 1

  @property
  def num_held(self) -> int:
    """Number of requests, and of other works, that need the model."""
    return self._num_held

  def generator(self) -> generate.Generator:
    """Returns the loaded generator.

    Raises:
      ApiError: status 503, the model still loads, or the engine has stopped.
    """
    loop = self.engine_loop
    if loop.state == engine_loop_lib.READY and loop.generator:
      return loop.generator
    if loop.state == engine_loop_lib.STOPPED:
      raise errors.stopping()
    raise errors.ApiError(
      503,
      f'the server is not ready: {loop.state}; ask /ready',
      param=None,
      code='not_ready',
    )

  async def submit(
    self, requests: Sequence[requests_lib.Request]
  ) -> engine_loop_lib.Updates:
    """Submits requests to the engine, all or none; returns their updates.

    The caller is billed for them, and its key has limits.

    Raises:
      ApiError: status 400, a prompt does not fit; 429, too many requests wait,
        or a limit is reached; 500 or 503, no request is answered any more.
    """
    # A request for an embedding answers with no token.
    is_text = all(each.pooling is None for each in requests)
    found = [each.observe(self, requests) for each in self.observers if is_text]
    watching = [each for each in found if each]
    admitted = await self.admission.admit(
      [_scored(each) for each in requests] if watching else requests,
      model=self.name,
      weights_digest=self.digest,
    )

    def end(ended: engine_loop_lib.Ended):
      for which, update in ended.updates:
        done = update.completion
        # Of a client that left, nothing is kept.
        if done and done.finish_reason != 'cancelled':
          for each in watching:
            each(which, update.index, done)
      return admitted.end(ended)

    try:
      updates = await self.engine_loop.submit(admitted.requests, end)
      admitted.open()
    except engine.Overloaded as error:
      raise errors.ApiError(
        429, str(error), param=None, code='overloaded'
      ) from error
    except ValueError as error:
      raise errors.refused_prompt(error) from error
    except (engine_loop_lib.Failed, engine_loop_lib.Stopped) as error:
      raise errors.failure(error) from error
    for other in exchanges.current().shadows:
      other.shadow.take(requests)
    return updates


def _scored(request: requests_lib.Request) -> requests_lib.Request:
  """Returns a request whose tokens get log-probabilities, asked or not."""
  settings = request.settings
  if settings.logprobs is not None:
    return request
  settings = dataclasses.replace(settings, logprobs=0)
  return dataclasses.replace(request, settings=settings)


class Loader(Protocol):
  """Makes the versions that an administrator asks for."""

  def load_asked(
    self, path: str, name: str, *, kv_memory: str | None, pending: int
  ) -> ServedModel:
    """Returns a version, which is not started; see `versions.loader`."""
    ...


@dataclasses.dataclass(frozen=True, kw_only=True)
class Service:
  """The parts that every route may use."""

  versions: registry.Versions
  bodies: bodies_lib.Bodies
  records: database.Database
  store: responses.Store
  config: server_config.ServerConfig
  keyring: keys.Keyring
  admission: admission_lib.Admission
  loader: Loader | None  # of the versions that an administrator asks for
  draining: draining_lib.Draining
  # Of metrics that belong to no version.
  metrics: Sequence[prometheus_client.CollectorRegistry] = ()

  @property
  def has_keys(self) -> bool:
    """Whether a request needs a key."""
    return self.keyring.has_keys

  @property
  def model(self) -> ServedModel:
    """The model of a request that names none: of the first name."""
    names = self.versions.names()
    model = self.versions.default(names[0]) if names else None
    if model is None:
      raise errors.no_model('', names)
    return model

  @property
  def context(self) -> int:
    """Most tokens of a sequence of any model."""
    return max((each.context for each in self.versions.all()), default=0)

  def registries(self) -> list[tuple[dict[str, str], Any]]:
    """Returns the registries of metrics, with the labels of their samples."""
    found: list[tuple[dict[str, str], Any]]
    found = [({}, registry) for registry in self.metrics]
    for model in self.versions.all():
      labels = {'model': model.name, 'version': model.version}
      found.append((labels, model.shadow.registry))
      if generator := model.engine_loop.generator:
        found.append((labels, generator.engine.metrics.registry))
    return found

  def find(self, name: str) -> ServedModel:
    """Returns the model that answers a name, until the exchange ends.

    Raises:
      ApiError: status 404, there is none.
    """
    return self.versions.find(name)
