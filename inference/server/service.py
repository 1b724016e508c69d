"""The parts of the server that its routes share."""

from collections.abc import Callable, Coroutine, Mapping, Sequence
import dataclasses
import threading
import time
from typing import Any, Protocol

import prometheus_client

from frozen import adapters as frozen_adapters, manifest as manifest_lib
from inference import generate
from inference.engine import engine
from inference.requests import requests as requests_lib
from inference.search.routing import router as router_lib
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
    """Returns the function that gets the completions; None: observes none."""
    ...


# (index of the request in its submission, index of the sequence of the request,
# its completion)
OnFinished = Callable[[int, int, requests_lib.Completion], object]


class ServedModel:
  """A version of a model: its weights, its engine, its name in requests."""

  admission: admission_lib.Admission

  def __init__(
    self,
    name: str,
    engine_loop: engine_loop_lib.Port,
    manifest: manifest_lib.Manifest,
    *,
    context: int = 0,
    admission: admission_lib.Admission | None = None,
  ):
    """Describes the model; its weights need not be loaded yet.

    Args:
      name: the name in requests.
      engine_loop: runs its engine.
      manifest: manifest of its frozen directory.
      context: most tokens of a sequence; 0: the context of the model.
      admission: admits and bills its requests; None: the admission of the
        `Versions` that it is added to.
    """
    self.name, self.engine_loop, self.manifest = name, engine_loop, manifest
    self.adapter: frozen_adapters.Adapter | None = None
    self.base: ServedModel | None = None  # of an adapter
    self.identify(manifest.weights_digest)
    self.context = context or manifest.model['max_length']
    self.observers: list[Observer] = []
    if admission is not None:
      self.admission = admission
    self.shadow = shadow.Shadow(self)
    self.is_draining = False  # no new request finds it
    self.memory: memory.Plan | None = None  # once it is known
    self._num_held, self._lock = 0, threading.Lock()
    self._created = int(time.time())  # when this server began to load it

  def identify(self, digest: str) -> None:
    """Sets the digest that names the version."""
    self.digest = digest
    self.version = f'{self.name}@{digest[:_SHOWN_DIGITS]}'

  @property
  def state(self) -> str:
    """The state of the version: a state of an engine loop."""
    return self.engine_loop.state

  @property
  def failure(self) -> Exception | None:
    """The error that ended it."""
    return self.engine_loop.failure

  @property
  def origin(self) -> manifest_lib.Provenance:
    """The origin of its weights; of an adapter, only the adapter's own."""
    return self.adapter.manifest if self.adapter else self.manifest

  def loaded(self) -> generate.Generator | None:
    """Returns its generator, None until it is loaded."""
    return self.engine_loop.generator

  def registries(self) -> list[engine_loop_lib.Labelled]:
    """Returns the registries of its metrics, with labels of their samples."""
    return [({}, self.shadow.registry), *self.engine_loop.registries()]

  def start(self) -> Coroutine | None:
    """Starts to load it; returns the rest of the work, if there is any."""
    self.engine_loop.start()

  async def unload(self) -> None:
    """Frees its memory; no request needs it any more."""
    await self.engine_loop.unload()

  def count(self, updates: Sequence[engine_loop_lib.Item]) -> None:
    """Counts the last updates of sequences; the engine has done so."""

  def card(self) -> dict[str, Any]:
    """Returns its entry of /v1/models."""
    manifest = self.manifest
    return {
      'id': self.name,
      'object': 'model',
      'created': self._created,
      'owned_by': 'two-lives',
      'max_model_len': self.context,
      'version': self.version,
      'digests': fingerprint.digests(manifest, self.loaded()),
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
    state, generator = self.state, self.loaded()
    if state == engine_loop_lib.READY and generator:
      return generator
    if state == engine_loop_lib.STOPPED:
      raise errors.stopping()
    raise errors.ApiError(
      503,
      f'the server is not ready: {state}; ask /ready',
      param=None,
      code='not_ready',
    )

  def asked(
    self, requests: Sequence[requests_lib.Request]
  ) -> list[requests_lib.Request]:
    """Returns requests as this version answers them."""
    digest = self.digest if self.adapter else ''
    return [dataclasses.replace(each, adapter=digest) for each in requests]

  async def submit(
    self,
    requests: Sequence[requests_lib.Request],
    on_end: Callable[[engine_loop_lib.Ended], object] = lambda _: None,
    *,
    is_stream: bool = True,
  ) -> engine_loop_lib.Updates:
    """Submits requests to the engine, all or none; returns their updates.

    The caller is billed for them, and its key has limits.

    Args:
      requests: of one client.
      on_end: called once with their end, if the engine has taken them.
      is_stream: whether the client gets tokens as they come.

    Raises:
      ApiError: status 400, a prompt does not fit; 429, too many requests wait,
        or a limit is reached; 500 or 503, no request is answered any more.
    """
    requests = self.asked(requests)
    # The answer to a request for an embedding has no token.
    is_text = all(each.pooling is None for each in requests)
    found = [each.observe(self, requests) for each in self.observers if is_text]
    watching = [each for each in found if each]
    admitted = await self.admission.admit(
      [_scored(each) for each in requests] if watching else requests,
      model=self.name,
      weights_digest=self.digest,
    )

    def end(ended: engine_loop_lib.Ended):
      self.count(ended.updates)
      on_end(ended)
      for which, update in ended.updates:
        done = update.completion
        # Observers keep nothing of a client that has left.
        if done and done.finish_reason != 'cancelled':
          for each in watching:
            each(which, update.index, done)
      return admitted.end(ended)

    try:
      updates = await self.engine_loop.submit(
        admitted.requests, end, is_stream=is_stream
      )
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

  def is_adapter(self, path: str) -> bool:
    """Returns whether a path is the directory of an adapter."""
    ...

  def adapter_asked(
    self,
    path: str,
    name: str,
    *,
    base: str | None,
    models: Sequence[ServedModel],
  ) -> ServedModel:
    """Returns an adapter, which is not loaded yet; see `versions.loader`."""
    ...

  def load_asked(
    self, path: str, name: str, *, kv_memory: str | None
  ) -> ServedModel:
    """Returns a version, which is not started; see `versions.loader`."""
    ...

  def check_memory(self, model: ServedModel, *, pending: int) -> None:
    """Refuses a version that does not fit; see `versions.loader`."""
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
  # Of the effort auto, by the digest of a version.
  routers: Mapping[str, router_lib.Router] = dataclasses.field(
    default_factory=dict
  )
  # Reward models of strategies, and the verifiers that they may name.
  scorers: Mapping[str, ServedModel] = dataclasses.field(default_factory=dict)
  verifiers: Sequence[str] = ()
  # Of metrics that belong to no version.
  metrics: Sequence[prometheus_client.CollectorRegistry] = ()

  @property
  def has_keys(self) -> bool:
    """Whether a request needs a key."""
    return self.keyring.has_keys

  @property
  def model(self) -> ServedModel:
    """The model for requests without a model name: the first name's."""
    names = self.versions.names()
    model = self.versions.default(names[0]) if names else None
    if model is None:
      raise errors.no_model('', names)
    return model

  @property
  def context(self) -> int:
    """Most tokens of a sequence of any model."""
    return max((each.context for each in self.versions.all()), default=0)

  def engine_loops(self) -> list[engine_loop_lib.Port]:
    """Returns the engine loops of all versions and scorers."""
    judges = (each.engine_loop for each in self.scorers.values())
    return [*self.versions.engine_loops(), *judges]

  def registries(self) -> list[engine_loop_lib.Labelled]:
    """Returns the registries of metrics, with the labels of their samples."""
    found: list[engine_loop_lib.Labelled]
    found = [({}, registry) for registry in self.metrics]
    for model in (*self.versions.all(), *self.scorers.values()):
      labels = {'model': model.name, 'version': model.version}
      found += [({**labels, **own}, each) for own, each in model.registries()]
    return found

  def find(self, name: str) -> ServedModel:
    """Returns the model that answers a name, until the exchange ends.

    Raises:
      ApiError: status 404, there is none.
    """
    return self.versions.find(name)
