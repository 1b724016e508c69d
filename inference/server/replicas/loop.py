"""A version on all replicas, with the members of an engine loop."""

import asyncio
from collections.abc import Callable, Sequence
import contextlib
import dataclasses
from typing import Any, Protocol

from frozen import adapters as frozen_adapters
from inference import generate
from inference.requests import requests as requests_lib
from inference.server import engine_loop, engine_thread
from inference.server.replicas import (
  dispatch as dispatch_lib,
  link as link_lib,
  place as place_lib,
  placement,
  remote_engine,
  submission as submission_lib,
  values,
)
from models import flops as flops_lib

_COLLECT_SECONDS = 2.0  # that metrics may take
_CLOSE_SECONDS = 120.0  # that steps in flight and the digest may take


class Fleet(Protocol):
  """The replicas of a server, as `fleet.Fleet` has them."""

  def join(self, loop: 'ReplicaLoop') -> Any:
    """Adds a version; returns its number. Starts replicas if it must."""
    ...

  def leave(self, number: int) -> None:
    """Removes a version."""
    ...


class ReplicaLoop:
  """A version on replicas; a `Port` of the server."""

  def __init__(
    self,
    fleet: Fleet,
    load: values.Load,
    *,
    on_load_failure: Callable[[], None] = lambda: None,
    on_loaded: Callable[[values.Facts], None] = lambda _: None,
  ):
    """Loads nothing yet.

    Args:
      fleet: the replicas.
      load: the version.
      on_load_failure: called in the event loop if no replica can load it.
      on_loaded: called in the event loop with the facts of each replica.
    """
    self.failure: Exception | None = None
    self.generator: generate.Generator | None = None
    self.load = load
    self._fleet = fleet
    self._on_load_failure, self._on_loaded = on_load_failure, on_loaded
    self._made: generate.Generator | None = None
    self._places: dict[int, place_lib.Place] = {}  # by index of the replica
    self._is_closed = False
    self._adapters: dict[str, str] = {}  # directories by digest
    self._digests: list[tuple[str, str]] = []
    self._metrics = place_lib.Metrics()
    self._dispatch = dispatch_lib.Dispatch(
      self._ready, self._metrics, max_sequences=load.config.max_sequences
    )
    self._closing: asyncio.Task | None = None
    self._tasks: set[asyncio.Task] = set()  # else nothing refers to them

  @property
  def number(self) -> int:
    """Number of the version, that a fleet gives it."""
    return self._dispatch.number

  @number.setter
  def number(self, number: int) -> None:
    self._dispatch.number = number

  @property
  def state(self) -> str:
    """LOADING also while all replicas start again."""
    if self.failure:
      return engine_thread.FAILED
    if self._is_closed:
      return engine_thread.STOPPED
    if self.generator and self._ready():
      return engine_thread.READY
    return engine_thread.LOADING

  @property
  def is_loading(self) -> bool:
    """Whether no replica has loaded it yet."""
    return not (self.generator or self.failure or self._is_closed)

  @property
  def is_compiling(self) -> bool:
    """Returns False: this process compiles nothing."""
    return False

  @property
  def is_idle(self) -> bool:
    """Whether it is ready and has no open request."""
    return self.state == engine_thread.READY and not any(
      each.open for each in self._places.values()
    )

  @property
  def facts(self) -> values.Facts | None:
    """What a replica has told; None until the first is ready."""
    found = [each.facts for each in self._places.values() if each.facts]
    return found[0] if found else None

  def start(self) -> None:
    """Starts to load it on all replicas, within the event loop."""
    self._event_loop = asyncio.get_running_loop()
    self._run(self._start())

  async def _start(self) -> None:
    try:
      # In a thread: a tokenizer may take a second.
      self._made = await asyncio.to_thread(
        remote_engine.generator, self.load.directory, self.load.config
      )
    except Exception as error:
      self._fail_to_load(error)
      return
    self._dispatch.flops = flops_lib.SpanFlops(self._made.engine.model_config)
    if not self._is_closed:
      self._fleet.join(self)

  # --------------------------------------------------------------------------
  # Replicas come and go

  def attach(self, replica: place_lib.Replica) -> None:
    """Loads the version on a replica whose process has started.

    The first replica compiles the programs; the others find them on disk.
    """
    if self._is_closed:
      return
    self._places[replica.index] = place_lib.Place(replica)
    self._metrics.ready.labels(str(replica.index)).set(0)
    self._load_next()

  def _load_next(self) -> None:
    """Loads the version where it waits: on one replica, until one is ready."""
    states = [each.state for each in self._places.values()]
    for each in self._places.values():
      if each.state == place_lib.WAITING and (
        self.generator or place_lib.LOADING not in states
      ):
        each.state = place_lib.LOADING
        each.send('load', self.number, self.load)
        states.append(place_lib.LOADING)

  def detach(self, replica: place_lib.Replica) -> None:
    """Moves the submissions of a replica that has died."""
    place = self._places.get(replica.index)
    if place is None or self._is_closed:
      return
    place.state = place_lib.LOST
    self._metrics.ready.labels(str(replica.index)).set(0)
    self._metrics.deaths.labels(str(replica.index)).inc()
    self._dispatch.lose(place)
    self._load_next()

  def give_up(self) -> None:
    """Fails: all replicas have died too often."""
    self.failure = engine_thread.failed()
    self._dispatch.is_failed = True
    self._dispatch.end_pending(self.failure)

  def obey(self, replica: place_lib.Replica, message: Sequence[Any]) -> None:
    """Takes a message of a replica about this version."""
    place = self._places[replica.index]
    kind, *args = message
    if kind == 'updates':
      for number, *update in args[0]:
        self._dispatch.take(place, number, update)
    elif kind == 'accepted':
      self._dispatch.accepted(place, args[0])
    elif kind == 'refused':
      number, name, text, is_failed = args
      error = values.error_of((name, text))
      self._dispatch.refused(place, number, error, is_failed=is_failed)
    elif kind == 'ended':
      self._dispatch.ended(place, *args)
    elif kind == 'ready':
      self._run(self._loaded(place, args[0]))
    elif kind == 'not_loaded':
      self._not_loaded(place, values.error_of((args[0], args[1])))
    else:
      assert kind in ('compiled', 'failed'), kind  # both are in the log

  async def _loaded(self, place: place_lib.Place, facts: values.Facts) -> None:
    assert self._made
    try:
      for directory in list(self._adapters.values()):
        await place.call('load_adapter', self.number, directory)
    except Exception as error:
      place.replica.fail(f'adapter: {error}')
      return
    if self._places.get(place.replica.index) is not place or self._is_closed:
      return
    others = self.facts or facts
    if facts.device['platform'] != others.device['platform']:
      place.replica.fail(
        f'got a device of platform {facts.device["platform"]}, expected'
        f' {others.device["platform"]} as in other replicas; lower --replicas,'
        ' or give each the same devices'
      )
      return
    place.facts, place.state = facts, place_lib.READY
    place.known = placement.Known(facts.capacity)
    self._metrics.ready.labels(str(place.replica.index)).set(1)
    place.replica.note_ready()
    self._made.engine.learn(facts)  # pyright: ignore
    self._on_loaded(facts)
    self.generator = self._made
    self._load_next()
    self._dispatch.place_pending()

  def _not_loaded(self, place: place_lib.Place, error: Exception) -> None:
    if self.generator:
      place.replica.fail(f'it does not load: {error}')
    else:
      self._fail_to_load(error)

  def _fail_to_load(self, error: Exception) -> None:
    self.failure = error
    self._dispatch.is_failed = True
    self._dispatch.end_pending(engine_thread.failed())
    self._on_load_failure()

  # --------------------------------------------------------------------------
  # Submissions

  async def submit(
    self,
    requests: Sequence[requests_lib.Request],
    on_end: engine_loop.OnEnd = lambda _: None,
    *,
    is_stream: bool = True,
  ) -> engine_loop.Updates:
    """Submits requests, all or none; see `EngineLoop.submit`."""
    num_sequences = sum(each.settings.n for each in requests)
    updates = engine_loop.Updates(
      num_sequences, lambda _: self._dispatch.leave(found), on_end
    )
    if self._is_closed or self.failure:
      error = engine_thread.stopping()
      if self.failure:
        error = engine_thread.failed()
      updates.end(error=error)
      raise error
    first = requests[0]
    is_shared = self.load.config.share_prefixes
    scope = '' if is_shared else first.principal, first.adapter
    found = submission_lib.Submission(
      submission_lib.seeded(requests),
      updates,
      asyncio.get_running_loop().create_future(),
      is_stream,
      placement.blocks(scope, first.prompt_ids),
    )
    self._dispatch.place(found)
    try:
      await found.accepted
    except asyncio.CancelledError:
      updates.close()  # the client left before the submission
      raise
    return updates

  def _ready(self) -> list[place_lib.Place]:
    return [
      each for each in self._places.values() if each.state == place_lib.READY
    ]

  # --------------------------------------------------------------------------
  # The rest of the port

  async def close(self) -> None:
    """Ends open requests, and the engine on all replicas."""
    if self._closing is None:
      self._is_closed = True
      self._closing = asyncio.create_task(self._close_all())
    await asyncio.shield(self._closing)

  async def _close_all(self) -> None:
    stopping = engine_thread.stopping()
    self._dispatch.end_pending(stopping)
    found = await asyncio.gather(
      *(self._close(each) for each in self._places.values())
    )
    self._digests = [
      (f'replica {place.replica.index}: ', digest)
      for place, digest in zip(self._places.values(), found, strict=True)
      if digest
    ]
    self._dispatch.end_all(list(self._places.values()), stopping)

  async def _close(self, place: place_lib.Place) -> str | None:
    if place.state != place_lib.READY:
      return None
    try:
      return await asyncio.wait_for(
        place.call('close', self.number), _CLOSE_SECONDS
      )
    except (link_lib.Died, TimeoutError):
      return None

  async def unload(self) -> None:
    """Ends the engine on all replicas and frees its memory."""
    await self.close()
    self.generator = None
    await asyncio.gather(
      *(
        each.call('unload', self.number)
        for each in self._places.values()
        if each.replica.link
      ),
      return_exceptions=True,
    )
    self._fleet.leave(self.number)

  def check_adapter(self, adapter: frozen_adapters.Adapter) -> None:
    """Refuses an adapter that has no place; not in the event loop.

    Raises:
      ValueError: it does not fit, or no replica is ready.
    """
    asked = asyncio.run_coroutine_threadsafe(
      self._check_adapter(str(adapter.directory)), self._event_loop
    )
    asked.result()

  async def _check_adapter(self, directory: str) -> None:
    ready = self._ready()
    if not ready:
      raise ValueError('adapter: got no replica that is ready; try again')
    await ready[0].call('check_adapter', self.number, directory)

  async def load_adapter(self, adapter: frozen_adapters.Adapter) -> None:
    """Loads an adapter on all replicas; they read it from its directory.

    Raises:
      ValueError: a replica has no place for it.
      Failed: no replica is ready.
    """
    digest, directory = adapter.manifest.adapter_digest, str(adapter.directory)
    if not (ready := self._ready()):
      raise engine_thread.failed()
    found = await asyncio.gather(
      *(each.call('load_adapter', self.number, directory) for each in ready),
      return_exceptions=True,
    )
    if errors := [each for each in found if isinstance(each, ValueError)]:
      raise errors[0]
    counts = [each for each in found if isinstance(each, int)]
    if not counts:
      raise engine_thread.failed()
    self._adapters[digest] = directory
    assert self._made
    self._made.engine.adapters.add(digest, counts[0])  # pyright: ignore

  async def unload_adapter(self, digest: str) -> None:
    """Unloads an adapter on all replicas.

    Raises:
      ValueError: a sequence needs it; a cancelled one has gone soon.
    """
    self._adapters.pop(digest, None)
    found = await asyncio.gather(
      *(
        each.call('unload_adapter', self.number, digest)
        for each in self._ready()
      ),
      return_exceptions=True,
    )
    if errors := [each for each in found if isinstance(each, ValueError)]:
      raise errors[0]
    assert self._made
    self._made.engine.adapters.remove(digest)  # pyright: ignore

  def audit(self, item: Any) -> bool:
    """Sends a finished sequence to the audit of a replica."""
    ready = self._ready()
    if ready:
      fields = {
        field.name: getattr(item, field.name)
        for field in dataclasses.fields(item)
        if field.name != 'model'
      }
      adapter = item.model.adapter
      directory = str(adapter.directory) if adapter else ''
      place = min(ready, key=lambda each: each.num_open)
      name = item.model.version
      place.send('audit', self.number, name, directory, fields)
    return True

  def device(self) -> dict[str, Any]:
    """Returns the device of a replica; see `about`."""
    facts = self.facts
    if facts is None:
      return {'platform': 'unknown', 'device': 'unknown', 'num_devices': 0}
    return facts.device

  def registries(self) -> list[engine_loop.Labelled]:
    """Returns the metrics of all replicas, as `refresh` has found them."""
    return [
      ({}, self._metrics.registry),
      *(
        ({'replica': str(index)}, place_lib.Stored(place.families))
        for index, place in self._places.items()
        if place.families
      ),
    ]

  async def refresh(self) -> None:
    """Asks all replicas for their metrics; one that is late keeps its last."""
    await asyncio.gather(*(self._collect(each) for each in self._ready()))

  async def _collect(self, place: place_lib.Place) -> None:
    with contextlib.suppress(link_lib.Died, TimeoutError):
      place.families = await asyncio.wait_for(
        place.call('collect', self.number), _COLLECT_SECONDS
      )

  def digests(self) -> list[tuple[str, str]]:
    """Returns the digests of the weights on all replicas, after `close`."""
    return self._digests

  def _run(self, work) -> None:
    task = asyncio.get_running_loop().create_task(work)
    self._tasks.add(task)
    task.add_done_callback(self._tasks.discard)
