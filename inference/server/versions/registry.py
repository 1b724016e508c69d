"""The versions on a server: found by name, weighted, drained and unloaded.

A version is a frozen directory with an engine, a thread and a prefix cache of
its own. Its identity is NAME@DIGEST, the digest of its weights. A request to
NAME goes to one of the versions of that name, as their traffic says; a request
to NAME@DIGEST (at least 8 hex digits) goes to that version always.

A request keeps its version to its end: `find` holds the version until the
exchange ends, and `unload` waits for all holders. New requests do not find a
version that drains. So no request is lost when traffic moves.

An adapter is another kind of version, see `served_adapter`: its digest covers
its own weights and the weights of its base, and its engine is the engine of the
base. The base stays while adapters need it.
"""

from __future__ import annotations

import asyncio
from collections.abc import Coroutine, Iterable, Sequence
import threading
import typing

from inference.server import engine_loop as engine_loop_lib
from inference.server.access import admission as admission_lib
from inference.server.api import errors
from inference.server.http import exchanges
from inference.server.versions import traffic as traffic_lib

if typing.TYPE_CHECKING:  # it imports this module
  from inference.server import service

LEAST_DIGITS = 8  # of a digest in NAME@DIGEST
_TICK_SECONDS = 0.02
_HEADER = b'x-model-version'


class Versions:
  """The versions of a server; the event loop and threads of text use it."""

  def __init__(
    self,
    models: Iterable[service.ServedModel],
    admission: admission_lib.Admission,
    observers: Sequence[service.Observer] = (),
  ):
    """Takes models of different names; each gets all requests to its name.

    Args:
      models: the first versions.
      admission: admits and bills the requests of all versions.
      observers: observers of all versions.
    """
    self._admission, self._observers = admission, observers
    self._lock = threading.Lock()
    self._models: list[service.ServedModel] = []
    self._traffic: dict[str, traffic_lib.Traffic] = {}
    self._tasks: set[asyncio.Task] = set()  # else nothing refers to them
    for model in models:
      self.add(model)
      self.set_traffic(
        model.name, traffic_lib.Traffic(weights={model.digest: 1.0})
      )

  def all(self) -> list[service.ServedModel]:
    """Returns all versions: loading, draining and failed ones, too."""
    with self._lock:
      return list(self._models)

  def engine_loops(self) -> list[engine_loop_lib.Port]:
    """Returns the engine loops of all versions; adapters have none."""
    return [each.engine_loop for each in self.all() if each.base is None]

  def names(self) -> list[str]:
    """Returns the names that requests may use, oldest first."""
    with self._lock:
      return [
        name for name, each in self._traffic.items() if any(_weights(each))
      ]

  def states(self) -> dict[str, list[str]]:
    """Returns the states of the versions that answer each name."""
    with self._lock:
      return {
        name: [
          each.state
          for each in self._models
          if each.name == name
          and traffic.weights.get(each.digest, 0) > 0
          and not each.is_draining
        ]
        or [engine_loop_lib.STOPPED]
        for name, traffic in self._traffic.items()
        if any(_weights(traffic))
      }

  def traffic(self) -> dict[str, traffic_lib.Traffic]:
    """Returns the traffic of each name."""
    with self._lock:
      return dict(self._traffic)

  def add(self, model: service.ServedModel) -> None:
    """Adds a version, which gets no traffic yet.

    Raises:
      ApiError: status 409, the version is there already.
    """
    with self._lock:
      if any(each.version == model.version for each in self._models):
        raise errors.ApiError(
          409,
          f'path: got {model.version}, which is loaded already, expected other'
          ' weights or another name',
          param='path',
          code='version_exists',
        )
      model.observers.extend(self._observers)
      model.admission = self._admission
      self._models.append(model)
      no_traffic = traffic_lib.Traffic(weights={})
      self._traffic.setdefault(model.name, no_traffic)
    self._admission.ledger.note_model(model.name, model.digest, model.origin)

  def set_traffic(self, name: str, traffic: traffic_lib.Traffic) -> None:
    """Sets the traffic of a name; requests in flight stay where they are."""
    with self._lock:
      self._traffic[name] = traffic

  def find(self, name: str) -> service.ServedModel:
    """Returns the version that answers a name, held until the exchange ends.

    Raises:
      ApiError: status 404, no version has the name.
    """
    exchange = exchanges.current()
    with self._lock:
      model = self._of_name(name, exchange) or self._of_digest(name)
      if model is not None:
        model.hold()
        exchange.at_end(model.release)
        shown = errors.printable(model.version)
        exchange.answer_headers[_HEADER] = shown.encode('ascii', 'replace')
        return model
    raise errors.no_model(name, self.names())

  def default(self, name: str) -> service.ServedModel | None:
    """Returns the version that gets most requests of a name; holds nothing."""
    with self._lock:
      return self._heaviest(name)

  def version(self, version: str) -> service.ServedModel:
    """Returns the version of an identity, in any state.

    Raises:
      ApiError: status 404, there is none.
    """
    with self._lock:
      if found := self._matching(version, self._models):
        return found
    raise errors.no_model(version, [each.version for each in self.all()])

  def share(self, model: service.ServedModel) -> float:
    """Returns the share of the requests to its name that a version gets."""
    with self._lock:
      traffic = self._traffic.get(model.name)
      total = sum(_weights(traffic))
      if traffic is None or not total:
        return 0.0
      return traffic.weights.get(model.digest, 0.0) / total

  def of_name(self, name: str, version: str) -> service.ServedModel:
    """Returns a version of a name that does not drain.

    Args:
      name: in requests.
      version: NAME@DIGEST, or DIGEST alone.

    Raises:
      ApiError: status 404, there is none.
    """
    digits = version.removeprefix(f'{name}@')
    with self._lock:
      open_models = [each for each in self._models if not each.is_draining]
      if found := self._matching(f'{name}@{digits}', open_models):
        return found
    raise errors.no_model(version, [each.version for each in open_models])

  def load(self, model: service.ServedModel) -> None:
    """Adds a version and starts it; it answers its name if nothing else does.

    Raises:
      ApiError: status 409, the version is there already.
    """
    self.add(model)
    self.run(self._answer_alone(model, model.start()))

  def start_unloading(self, model: service.ServedModel) -> None:
    """Drains a version, then frees its memory, in a task.

    Raises:
      ApiError: status 409, it drains already, nothing else answers its name,
        or adapters need it.
    """
    adapters = [each.version for each in self.all() if each.base is model]
    if adapters:
      raise _in_use(
        model,
        f'is the base of {", ".join(map(errors.printable, adapters))}',
        'unload its adapters first',
      )
    if model.is_draining:
      raise _in_use(model, 'drains already', 'wait until it is gone')
    # An adapter has no engine that would be lost: its name ends with it.
    if model.base is None and self._is_last(model):
      raise _in_use(
        model,
        'answers all requests to its name',
        'move the traffic first, with POST /admin/traffic',
      )
    model.is_draining = True
    if model.base is not None:  # from now on no request finds it by its name
      with self._lock:
        left = _without(self._traffic[model.name], model.digest)
        self._traffic[model.name] = left
    self.run(self._unload(model))

  def run(self, work: Coroutine) -> None:
    """Runs a coroutine as a task of the server."""
    task = asyncio.create_task(work)
    self._tasks.add(task)
    task.add_done_callback(self._tasks.discard)

  def start(self) -> None:
    """Starts the engine loops, within the event loop."""
    for model in self.all():
      if (loading := model.start()) is not None:
        self.run(loading)

  async def close(self) -> None:
    """Ends all requests and all tasks."""
    for task in list(self._tasks):
      task.cancel()
    await asyncio.gather(*(each.close() for each in self.engine_loops()))

  async def _answer_alone(
    self, model: service.ServedModel, loading: Coroutine | None
  ) -> None:
    """Gives a version the traffic of its name, if the name has none."""
    if loading is not None:
      await loading  # no client sees it ready before it has traffic
    while model.state == engine_loop_lib.LOADING:
      await asyncio.sleep(_TICK_SECONDS)
    with self._lock:
      traffic = self._traffic.get(model.name)
      if _takes(model, model.name) and not any(_weights(traffic)):
        self._traffic[model.name] = traffic_lib.Traffic(
          weights={model.digest: 1.0}
        )

  async def _unload(self, model: service.ServedModel) -> None:
    while model.num_held:
      await asyncio.sleep(_TICK_SECONDS)
    await model.unload()
    with self._lock:
      self._models.remove(model)
      left = _without(self._traffic[model.name], model.digest)
      self._traffic[model.name] = left
      if not any(each.name == model.name for each in self._models):
        del self._traffic[model.name]

  def _is_last(self, model: service.ServedModel) -> bool:
    """Returns whether a name would have no answer without a version."""
    with self._lock:
      weights = self._traffic[model.name].weights
      able = [each for each in self._models if _takes(each, model.name)]
      others = [weights.get(each.digest, 0) for each in able if each != model]
      return model in able and weights.get(model.digest, 0) > 0 == sum(others)

  def _of_name(
    self, name: str, exchange: exchanges.Exchange
  ) -> service.ServedModel | None:
    traffic = self._traffic.get(name)
    if traffic is None:
      return None
    key = traffic_lib.key(
      traffic,
      request_id=exchange.request_id,
      principal=exchange.principal,
      conversation=exchange.conversation,
    )
    # A version that has failed hands its share to the others.
    able = {each.digest: each for each in self._models if _takes(each, name)}
    weights = {d: w for d, w in traffic.weights.items() if d in able}
    digest = traffic_lib.choose(weights, key)
    if digest is None:
      return self._heaviest(name)  # its error tells the client its state
    exchange.shadows = [
      able[each]
      for each in traffic_lib.copies(traffic.shadows, key)
      if each in able and each != digest
    ]
    return able[digest]

  def _of_digest(self, name: str) -> service.ServedModel | None:
    open_models = [each for each in self._models if not each.is_draining]
    return self._matching(name, open_models)

  def _matching(self, version: str, models) -> service.ServedModel | None:
    """Returns the only version among models that NAME@DIGEST means."""
    name, _, digits = version.rpartition('@')
    if len(digits) < LEAST_DIGITS:
      return None
    found = [
      each
      for each in models
      if each.name == name and each.digest.startswith(digits.lower())
    ]
    return found[0] if len(found) == 1 else None

  def _heaviest(self, name: str) -> service.ServedModel | None:
    traffic = self._traffic.get(name)
    if traffic is None or not any(_weights(traffic)):
      return None
    models = [each for each in self._models if each.name == name]
    return max(
      models, key=lambda each: traffic.weights.get(each.digest, 0), default=None
    )


def _takes(model: service.ServedModel, name: str) -> bool:
  """Returns whether a version takes new requests to a name."""
  is_ready = model.state == engine_loop_lib.READY
  return model.name == name and is_ready and not model.is_draining


def _weights(traffic: traffic_lib.Traffic | None) -> list[float]:
  return list(traffic.weights.values()) if traffic else []


def _without(traffic: traffic_lib.Traffic, digest: str) -> traffic_lib.Traffic:
  return traffic_lib.Traffic(
    weights={d: w for d, w in traffic.weights.items() if d != digest},
    shadows={d: s for d, s in traffic.shadows.items() if d != digest},
    is_by_principal=traffic.is_by_principal,
  )


def _in_use(model, why: str, fix: str) -> errors.ApiError:
  return errors.ApiError(
    409,
    f'{model.version}: got a version that {why}, expected another; {fix}',
    param=None,
    code='version_in_use',
  )
