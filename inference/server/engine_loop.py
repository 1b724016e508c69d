"""The engine's thread, as an event loop talks to it.

    engine_loop.start()                          # within the event loop
    updates = await engine_loop.submit(requests)
    async for which, update in updates: ...
    updates.close()                              # in the middle: cancels

The event loop stays free while the engine works: it answers /health, accepts
requests, and notices clients that have left. See `engine_thread`, which has the
thread; `replicas.loop` has the same members for engines in other processes.

However a submission ends, its `on_end` is called once, in the event loop, with
the counts of the engine.
"""

import asyncio
from collections.abc import Awaitable, Callable, Sequence
import contextlib
import dataclasses
from typing import Any, Protocol

from frozen import adapters as frozen_adapters
from inference import generate
from inference.engine import engine as engine_lib
from inference.requests import requests as requests_lib
from inference.server import engine_thread

LOADING, READY = engine_thread.LOADING, engine_thread.READY
FAILED, STOPPED = engine_thread.FAILED, engine_thread.STOPPED
Failed, Stopped = engine_thread.Failed, engine_thread.Stopped
Item = engine_thread.Item
Labelled = tuple[dict[str, str], Any]
_TICK_SECONDS = 0.02


class Port(Protocol):
  """The engine of a version, or its engines, as the server uses them."""

  failure: Exception | None

  @property
  def generator(self) -> generate.Generator | None:
    """Makes requests for the engine; None until it is loaded."""
    ...

  @property
  def state(self) -> str:
    """LOADING, READY, FAILED or STOPPED."""
    ...

  @property
  def is_loading(self) -> bool:
    """Whether the engine is still made."""
    ...

  @property
  def is_compiling(self) -> bool:
    """Whether a thread of this process compiles."""
    ...

  @property
  def is_idle(self) -> bool:
    """Whether the engine is complete, and has nothing to do."""
    ...

  def start(self) -> None:
    """Starts to load, within the event loop."""
    ...

  async def submit(
    self,
    requests: Sequence[requests_lib.Request],
    on_end: 'OnEnd' = lambda _: None,
    *,
    is_stream: bool = True,
  ) -> 'Updates':
    """Submits requests; see `EngineLoop.submit`."""
    ...

  async def close(self) -> None:
    """Ends open requests and the engine."""
    ...

  async def unload(self) -> None:
    """Ends the engine and frees its memory."""
    ...

  def check_adapter(self, adapter: frozen_adapters.Adapter) -> None:
    """Refuses an adapter that has no place; not in the event loop."""
    ...

  async def load_adapter(self, adapter: frozen_adapters.Adapter) -> None:
    """Loads an adapter; see `EngineLoop.load_adapter`."""
    ...

  async def unload_adapter(self, digest: str) -> None:
    """Unloads an adapter; see `EngineLoop.unload_adapter`."""
    ...

  def audit(self, item: Any) -> bool:
    """Takes a finished sequence of `audit`, if the engine is elsewhere."""
    ...

  def device(self) -> dict[str, Any] | None:
    """Returns the device of an engine elsewhere, None for this process."""
    ...

  def registries(self) -> list[Labelled]:
    """Returns the registries of metrics, with labels of their samples."""
    ...

  async def refresh(self) -> None:
    """Brings the registries up to now."""
    ...

  def digests(self) -> list[tuple[str, str]]:
    """Returns where weights are and their digests now, after `close`."""
    ...


@dataclasses.dataclass(frozen=True, kw_only=True)
class Ended:
  """The end of a submission; without updates, the engine did not take it."""

  updates: Sequence[Item]  # the last one of each sequence
  error: Exception | None = None  # if the loop has ended it


# The last update is handed out once the result is there.
OnEnd = Callable[[Ended], Awaitable[Any] | None]


def _do_nothing(_: Any) -> None:
  pass


class Updates:
  """The updates of requests submitted together, as (index, update)."""

  def __init__(
    self,
    num_sequences: int,
    cancel: Callable[['Updates'], None],
    on_end: OnEnd = lambda _: None,
  ):
    self._num_left, self._cancel = num_sequences, cancel
    self._num_running, self._on_end = num_sequences, on_end
    self._last: list[Item] = []
    self._ending: Awaitable[Any] | None = None
    self._arrived: asyncio.Queue[Item | Exception] = asyncio.Queue()

  def __aiter__(self):
    return self

  async def __anext__(self) -> Item:
    if not self._num_left:
      raise StopAsyncIteration
    item = await self._arrived.get()
    if isinstance(item, Exception):
      self._num_left = 0
      raise item
    self._num_left -= item[1].completion is not None
    if not self._num_left and self._ending is not None:
      await asyncio.shield(self._ending)  # also if the client leaves
    return item

  def put(self, item: Item) -> None:
    """Adds an update."""
    self._arrived.put_nowait(item)
    if item[1].completion is not None:
      self._last.append(item)
      self._num_running -= 1
      if not self._num_running:
        self.end()

  def end(
    self, cancelled: Sequence[Item] = (), error: Exception | None = None
  ) -> None:
    """Ends the updates; cancelled sequences have a last update."""
    if error:
      self._arrived.put_nowait(error)
    ended = Ended(updates=[*self._last, *cancelled], error=error)
    on_end = self._on_end
    # Both may refer to this object. In a cycle it would stay until the garbage
    # collector comes, which takes longer the more of them there are.
    self._cancel = self._on_end = _do_nothing
    try:
      self._ending = on_end(ended)
    except Exception as failure:  # must not keep other requests from ending
      self._ending = asyncio.get_running_loop().create_future()
      self._ending.set_exception(failure)

  def close(self) -> None:
    """Cancels unfinished requests; their pages are free at the next step."""
    if self._num_left:
      self._cancel(self)
    self._num_left = 0


class EngineLoop(engine_thread.EngineThread):
  """An engine in a thread of this process, as a `Port`."""

  def __init__(
    self,
    load: Callable[[], generate.Generator],
    *,
    on_load_failure: Callable[[], None] = lambda: None,
    on_compiled: Callable[[], None] = lambda: None,
  ):
    """Makes the thread without starting it.

    Args:
      load: makes the generator; called in the thread.
      on_load_failure: called in the event loop if `load` raises; the error is
        in `failure`.
      on_compiled: called in a thread when all programs are compiled.
    """
    super().__init__(
      load,
      deliver=self._deliver,
      on_load_failure=on_load_failure,
      on_compiled=on_compiled,
    )
    self._event_loop: asyncio.AbstractEventLoop | None = None

  def start(self) -> None:
    """Starts the thread, for the running event loop."""
    self._event_loop = asyncio.get_running_loop()
    super().start()

  async def submit(
    self,
    requests: Sequence[requests_lib.Request],
    on_end: OnEnd = lambda _: None,
    *,
    is_stream: bool = True,
  ) -> Updates:
    """Submits requests, all or none; returns their updates.

    Args:
      requests: requests of one client.
      on_end: called once, also if this raises.
      is_stream: whether updates are needed as they come. Engines in other
        processes hand them out together if not.

    Raises:
      ValueError: a request could never be answered.
      engine.Overloaded: too many sequences wait; try again later.
      Failed, Stopped: no request is answered any more.
    """
    del is_stream
    num_sequences = sum(request.settings.n for request in requests)
    updates = Updates(num_sequences, self.cancel, on_end)
    if self.is_closed:
      updates.end(error=engine_thread.stopping())
      raise engine_thread.stopping()
    accepted = asyncio.get_running_loop().create_future()
    self.take(requests, updates, accepted)
    try:
      await accepted
    except asyncio.CancelledError:
      updates.close()  # the client left before the submission
      raise
    return updates

  async def call(self, function: Callable[[engine_lib.Engine], Any]) -> Any:
    """Returns what a function of the engine returns, see `ask`.

    Raises:
      ValueError: the function raises it.
      Failed, Stopped: the engine does not run any more.
    """
    if self.is_closed:
      raise engine_thread.stopping()
    called = asyncio.get_running_loop().create_future()
    self.ask(function, called)
    return await called

  async def close(self) -> None:
    """Cancels open requests and ends the thread, unless it still loads."""
    self.begin_close()
    if not self.is_loading:
      await asyncio.to_thread(self.join)

  async def unload(self) -> None:
    """Ends the engine and frees its memory; no request needs it any more."""
    await self.close()
    while self.is_compiling:  # XLA cannot be interrupted
      await asyncio.sleep(_TICK_SECONDS)
    await asyncio.to_thread(self.release)

  def check_adapter(self, adapter: frozen_adapters.Adapter) -> None:
    """Refuses an adapter that the engine has no place for.

    Raises:
      ValueError: it does not fit, or all places are taken.
    """
    assert self.generator
    table = self.generator.engine.adapters
    table.check_room(adapter.manifest.adapter_digest)
    table.fitted(adapter.tree)

  async def load_adapter(self, adapter: frozen_adapters.Adapter) -> None:
    """Loads an adapter; no step waits for it.

    Raises:
      ValueError: the engine has no place for it.
      Failed, Stopped: the engine does not run any more.
    """
    if not self.generator:
      raise engine_thread.failed()
    digest, tree = adapter.manifest.adapter_digest, adapter.tree
    table = self.generator.engine.adapters
    row = await asyncio.to_thread(table.fitted, tree)
    await self.call(lambda engine: engine.adapters.load(digest, tree, row))

  async def unload_adapter(self, digest: str) -> None:
    """Frees the place of an adapter, if it is loaded.

    Raises:
      ValueError: a sequence needs it; a cancelled one has gone soon.
      Failed, Stopped: the engine does not run any more.
    """
    await self.call(lambda engine: drop_adapter(engine, digest))

  def audit(self, item: Any) -> bool:
    """Takes no sequence: the weights are in this process."""
    del item
    return False

  def device(self) -> dict[str, Any] | None:
    """Returns None: the device is of this process."""

  def registries(self) -> list[Labelled]:
    """Returns the registry of the engine's metrics, once it is loaded."""
    generator = self.generator
    return [({}, generator.engine.metrics.registry)] if generator else []

  async def refresh(self) -> None:
    """Does nothing: the registry has the values of now."""

  def digests(self) -> list[tuple[str, str]]:
    """Returns the digest of the weights that the engine computed with."""
    return [('', self.generator.weights_digest())] if self.generator else []

  def _deliver(self, function: Callable, *args) -> None:
    """Calls a function in the event loop, unless it is closed."""
    assert self._event_loop
    with contextlib.suppress(RuntimeError):
      self._event_loop.call_soon_threadsafe(function, *args)


def drop_adapter(engine: engine_lib.Engine, digest: str) -> None:
  """Unloads an adapter, if the engine has it; raises as `unload_adapter`."""
  if digest in engine.adapters.digests:
    engine.adapters.unload(digest)
