"""A version on all replicas, with the members of an engine loop.

`placement` chooses the replica of a submission. If a replica dies, submissions
of which the client has seen nothing go to another one, at most `_MOST_TRIES`
times, since one of them may be the reason; while no replica is ready they wait.
The others end with an error, and are billed for the tokens that were received.
A whole answer is handed out only once it is complete, so only a stream can have
been seen. Each submission ends once, whatever happens, and so is billed once.
"""

import asyncio
from collections.abc import Callable, Sequence
import dataclasses
import itertools
import logging
from typing import Any, Protocol

import prometheus_client

from frozen import adapters as frozen_adapters
from inference import generate
from inference.engine import engine as engine_lib
from inference.requests import requests as requests_lib
from inference.server import engine_loop, engine_thread
from inference.server.replicas import (
  link as link_lib,
  placement,
  remote_engine,
  submission as submission_lib,
  values,
)
from models import flops as flops_lib

_LOG = logging.getLogger('uvicorn.error')
_MOST_TRIES = 2  # replicas that may die with one submission
_FULL_SECONDS = 0.1  # until a submission that found no place is tried again
_COLLECT_SECONDS = 2.0  # that metrics may take
_CLOSE_SECONDS = 120.0  # that steps in flight and the digest may take
LOADING, READY, LOST = 'loading', 'ready', 'lost'


class Replica(Protocol):
  """A process with engines, as `fleet.Replica` has it."""

  index: int

  @property
  def link(self) -> link_lib.Link | None:
    """The link to its process; None while there is none."""
    ...

  def fail(self, why: str) -> None:
    """Ends the process, to start another one."""
    ...


class Fleet(Protocol):
  """The replicas of a server, as `fleet.Fleet` has them."""

  def join(self, loop: 'ReplicaLoop') -> Any:
    """Adds a version; returns its number. Starts replicas if it must."""
    ...

  def leave(self, number: int) -> None:
    """Removes a version."""
    ...


class Place:
  """A version on one replica."""

  def __init__(self, replica: Replica):
    self.replica, self.state = replica, LOADING
    self.facts: values.Facts | None = None
    self.known = placement.Known(0)
    self.open: dict[int, submission_lib.Submission] = {}
    self.num_open = self.num_served = 0
    self.families: list[Any] = []  # its metrics, when last asked

  def send(self, *message: Any) -> None:
    """Sends a message, if the process lives."""
    if self.replica.link:
      self.replica.link.send(message)


class _Stored:
  """Metrics of another process, as a registry."""

  def __init__(self, families: list[Any]):
    self._families = families

  def collect(self) -> list[Any]:
    """Returns the families."""
    return self._families


class _Metrics:
  """The server's own counts of the replicas of a version."""

  def __init__(self):
    self.registry = prometheus_client.CollectorRegistry()
    self.ready = prometheus_client.Gauge(
      'replica_ready',
      'Whether the replica answers requests.',
      ['replica'],
      registry=self.registry,
    )

    def counter(name: str, text: str, labels: Sequence[str]):
      return prometheus_client.Counter(
        name, text, labels, registry=self.registry
      )

    self.deaths = counter(
      'replica_deaths', 'Processes of the replica that ended.', ['replica']
    )
    self.placed = counter(
      'replica_submissions',
      'Submissions sent to the replica: it knew their prefix, or not.',
      ['replica', 'prefix'],
    )
    self.moved = counter(
      'replica_moved_submissions',
      'Submissions that went to another replica when one died.',
      [],
    )


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
    self._fleet, self.number = fleet, -1  # set by `join`
    self._on_load_failure, self._on_loaded = on_load_failure, on_loaded
    self._made: generate.Generator | None = None
    self._places: dict[int, Place] = {}  # by index of the replica
    self._pending: list[submission_lib.Submission] = []
    self._attempts = itertools.count()
    self._is_closed = False
    self._adapters: dict[str, str] = {}  # directories by digest
    self._digests: list[tuple[str, str]] = []
    self._metrics = _Metrics()
    self._tasks: set[asyncio.Task] = set()  # else nothing refers to them
    self._flops: flops_lib.SpanFlops | None = None

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
    self._flops = flops_lib.SpanFlops(self._made.engine.model_config)
    if not self._is_closed:
      self._fleet.join(self)

  # --------------------------------------------------------------------------
  # Replicas come and go

  def attach(self, replica: Replica) -> None:
    """Loads the version on a replica whose process has started.

    The first replica compiles the programs; the others find them on disk.
    """
    is_first = not self._places
    place = self._places[replica.index] = Place(replica)
    self._metrics.ready.labels(str(replica.index)).set(0)
    if is_first or self.generator:
      place.send('load', self.number, self.load)
    else:
      place.state = LOST  # until the first one is ready

  def detach(self, replica: Replica, how: str) -> None:
    """Moves the submissions of a replica that has died."""
    place = self._places.get(replica.index)
    if place is None or self._is_closed:
      return
    if place.open:
      _LOG.error('replica %d ended with %s', replica.index, how)
    place.state = LOST
    self._metrics.ready.labels(str(replica.index)).set(0)
    self._metrics.deaths.labels(str(replica.index)).inc()
    found, place.open, place.num_open = list(place.open.values()), {}, 0
    for each in found:
      self._move(each)

  def give_up(self) -> None:
    """Fails: all replicas have died too often."""
    self.failure = engine_thread.failed()
    self._end_pending(engine_thread.failed())

  def obey(self, replica: Replica, message: Sequence[Any]) -> None:
    """Takes a message of a replica about this version."""
    place = self._places[replica.index]
    kind, *args = message
    if kind == 'updates':
      for number, *update in args[0]:
        if found := place.open.get(number):
          self._take(place, found, update)
    elif kind == 'accepted':
      if found := place.open.get(args[0]):
        found.is_accepted = True
        if not found.accepted.done():
          found.accepted.set_result(None)
    elif kind == 'refused':
      self._refused(place, *args)
    elif kind == 'ended':
      self._ended(place, *args)
    elif kind == 'ready':
      self._run(self._loaded(place, args[0]))
    elif kind == 'not_loaded':
      self._not_loaded(place, values.error_of((args[0], args[1])))
    else:
      assert kind in ('compiled', 'failed'), kind  # both are in the log

  async def _loaded(self, place: Place, facts: values.Facts) -> None:
    assert self._made
    try:
      for directory in list(self._adapters.values()):
        await self._call(place, 'load_adapter', directory)
    except Exception as error:
      place.replica.fail(f'adapter: {error}')
      return
    if self._places.get(place.replica.index) is not place or self._is_closed:
      return
    place.facts, place.state = facts, READY
    place.known = placement.Known(facts.capacity)
    self._metrics.ready.labels(str(place.replica.index)).set(1)
    self._made.engine.learn(facts)  # pyright: ignore
    self._on_loaded(facts)
    self.generator = self._made
    for each in self._places.values():
      if each.state == LOST and each.replica.link:
        each.state = LOADING
        each.send('load', self.number, self.load)
    waiting, self._pending = self._pending, []
    for each in waiting:
      self._place(each)

  def _not_loaded(self, place: Place, error: Exception) -> None:
    if self.generator:
      place.replica.fail(f'it does not load: {error}')
    else:
      self._fail_to_load(error)

  def _fail_to_load(self, error: Exception) -> None:
    self.failure = error
    self._end_pending(engine_thread.failed())
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
      num_sequences, lambda _: self._leave(found), on_end
    )
    if self._is_closed or self.failure:
      error = engine_thread.stopping()
      if self.failure:
        error = engine_thread.failed()
      updates.end(error=error)
      raise error
    first = requests[0]
    scope = first.principal, first.adapter
    found = submission_lib.Submission(
      submission_lib.seeded(requests),
      updates,
      asyncio.get_running_loop().create_future(),
      is_stream,
      placement.blocks(scope, first.prompt_ids),
    )
    self._place(found)
    try:
      await found.accepted
    except asyncio.CancelledError:
      updates.close()  # the client left before the submission
      raise
    return updates

  def _ready(self) -> list[Place]:
    return [each for each in self._places.values() if each.state == READY]

  def _place(self, found: submission_lib.Submission) -> None:
    """Sends a submission to a replica, or keeps it until one is ready."""
    if found.is_ended:
      return
    ready = self._ready()
    able = [each for each in ready if each not in found.refused_by]
    if not able:
      found.place = None
      self._pending.append(found)
      if ready:  # all of them are full
        self._event_loop.call_later(_FULL_SECONDS, self._place_again, found)
      return
    candidates = [
      placement.Candidate(
        index=each.replica.index,
        num_open=each.num_open,
        num_known=each.known.num_known(found.blocks),
        num_served=each.num_served,
      )
      for each in able
    ]
    slots = self.load.config.max_sequences
    chosen = placement.choose(candidates, margin=max(1, slots // 4))
    place = self._places[chosen.index]
    found.place, found.number = place, next(self._attempts)
    place.open[found.number] = found
    place.num_open += found.num_sequences
    place.num_served += found.num_sequences
    place.known.add(found.blocks)
    prefix = 'known' if chosen.num_known else 'new'
    self._metrics.placed.labels(str(chosen.index), prefix).inc()
    place.send(
      'submit',
      self.number,
      found.number,
      [remote_engine.sent(each) for each in found.requests],
      found.is_stream,
    )

  def _place_again(self, found: submission_lib.Submission) -> None:
    if found in self._pending:
      self._pending.remove(found)
      found.refused_by.clear()
      self._place(found)

  def _take(
    self, place: Place, found: submission_lib.Submission, update: Sequence[Any]
  ) -> None:
    if found.take(values.item(tuple(update))):  # pyright: ignore
      self._remove(place, found)

  def _remove(self, place: Place, found: submission_lib.Submission) -> None:
    del place.open[found.number]
    place.num_open -= found.num_sequences
    found.place = None

  def _refused(
    self, place: Place, number: int, kind: str, text: str, is_failed: bool
  ) -> None:
    if (found := place.open.get(number)) is None:
      return
    self._remove(place, found)
    error = values.error_of((kind, text))
    if is_failed:
      self._move(found)
    elif not isinstance(error, engine_lib.Overloaded):
      self._end(found, (), error)
    else:
      found.refused_by.add(place)
      is_full = found.refused_by >= set(self._ready())
      if is_full and not found.is_accepted:
        self._end(found, (), error)
      else:  # another replica has taken it before: it is not lost
        self._place(found)

  def _ended(
    self, place: Place, number: int, last: Sequence[Any], kind: str
  ) -> None:
    if (found := place.open.get(number)) is None:
      return
    self._remove(place, found)
    items = [values.item(each) for each in last]
    if kind == engine_thread.Failed.__name__:
      self._move(found, items)
    elif kind:
      self._end(found, items, engine_thread.stopping())
    else:
      self._end(found, items, None)

  def _leave(self, found: submission_lib.Submission) -> None:
    """Cancels a submission; its client has left."""
    if found.is_ended:
      return
    found.is_left = True
    if found.place:
      found.place.send('cancel', self.number, found.number)
    else:
      if found in self._pending:
        self._pending.remove(found)
      self._end(found, self._counted(found), None)

  def _move(
    self,
    found: submission_lib.Submission,
    last: Sequence[engine_loop.Item] | None = None,
  ) -> None:
    """Sends a submission to another replica; ends it if it cannot."""
    found.num_tries += 1
    found.place = None
    if found.is_left:
      self._end(found, last or self._counted(found), None)
    elif found.has_streamed or found.num_tries >= _MOST_TRIES or self.failure:
      error = engine_thread.failed()
      self._end(found, last or self._counted(found), error)
    else:
      found.forget()
      self._metrics.moved.inc()
      self._place(found)

  def _counted(
    self, found: submission_lib.Submission
  ) -> list[engine_loop.Item]:
    return found.counted(self._flops) if self._flops else []

  def _end(
    self,
    found: submission_lib.Submission,
    last: Sequence[engine_loop.Item],
    error: Exception | None,
  ) -> None:
    if found.is_ended:
      return
    found.is_ended = True
    found.updates.end(last, error)
    if not found.accepted.done():
      if error:
        found.accepted.set_exception(error)
      else:
        found.accepted.set_result(None)

  def _end_pending(self, error: Exception) -> None:
    waiting, self._pending = self._pending, []
    for each in waiting:
      self._end(each, self._counted(each), error)

  # --------------------------------------------------------------------------
  # The rest of the port

  async def close(self) -> None:
    """Ends open requests, and the engine on all replicas."""
    if self._is_closed:
      return
    self._is_closed = True
    stopping = engine_thread.stopping()
    self._end_pending(stopping)
    found = await asyncio.gather(
      *(self._close(each) for each in self._places.values())
    )
    self._digests = [
      (f'replica {place.replica.index}: ', digest)
      for place, digest in zip(self._places.values(), found, strict=True)
      if digest
    ]
    for place in self._places.values():
      for each in list(place.open.values()):
        self._end(each, self._counted(each), stopping)
      place.open.clear()

  async def _close(self, place: Place) -> str | None:
    if place.state != READY:
      return None
    try:
      return await asyncio.wait_for(self._call(place, 'close'), _CLOSE_SECONDS)
    except (link_lib.Died, TimeoutError):
      return None

  async def unload(self) -> None:
    """Ends the engine on all replicas and frees its memory."""
    await self.close()
    self.generator = None
    await asyncio.gather(
      *(
        self._call(each, 'unload')
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
    await self._call(ready[0], 'check_adapter', directory)

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
      *(self._call(each, 'load_adapter', directory) for each in ready),
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
      *(self._call(each, 'unload_adapter', digest) for each in self._ready()),
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

  def registries(self) -> list[engine_loop.Labelled]:
    """Returns the metrics of all replicas, as `refresh` has found them."""
    return [
      ({}, self._metrics.registry),
      *(
        ({'replica': str(index)}, _Stored(place.families))
        for index, place in self._places.items()
        if place.families
      ),
    ]

  async def refresh(self) -> None:
    """Asks all replicas for their metrics; one that is late keeps its last."""
    await asyncio.gather(*(self._collect(each) for each in self._ready()))

  async def _collect(self, place: Place) -> None:
    try:
      place.families = await asyncio.wait_for(
        self._call(place, 'collect'), _COLLECT_SECONDS
      )
    except (link_lib.Died, TimeoutError):
      pass

  def digests(self) -> list[tuple[str, str]]:
    """Returns the digests of the weights on all replicas, after `close`."""
    return self._digests

  async def _call(self, place: Place, name: str, *args: Any) -> Any:
    if place.replica.link is None:
      raise link_lib.Died('the replica has ended')
    return await place.replica.link.call(name, self.number, *args)

  def _run(self, work) -> None:
    task = asyncio.get_running_loop().create_task(work)
    self._tasks.add(task)
    task.add_done_callback(self._tasks.discard)
