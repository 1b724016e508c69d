"""The engine's thread, and the queue through which an event loop talks to it.

    engine_loop.start()                          # within the event loop
    updates = await engine_loop.submit(requests)
    async for which, update in updates: ...
    updates.close()                              # in the middle: cancels

Requests join and leave the running batch between two steps. Commands of the
event loop wait in an inbox, which the thread empties before every step. The
updates of a step go to the event loop in one call. Without work the thread
sleeps. The event loop stays free: it answers /health, accepts requests, and
notices clients that have left.

The thread also makes the engine, so that the server listens while the engine
compiles. The engine answers as soon as it has the programs that every step can
use; another thread compiles the others.

If a step fails, all open requests and all later requests fail: the state on the
device cannot be trusted any more. So no client waits for an answer that will
never come.

However a submission ends, its `on_end` is called once, in the event loop, with
the counts of the engine.
"""

import asyncio
from collections.abc import Awaitable, Callable, Sequence
import contextlib
import dataclasses
import functools
import gc
import logging
import queue
import threading
import time
from typing import Any

from hardware import host_memory
from inference import generate
from inference.engine import engine as engine_lib
from inference.requests import requests as requests_lib
from inference.server.http import thread_priority

_LOG = logging.getLogger('uvicorn.error')

LOADING, READY, FAILED, STOPPED = 'loading', 'ready', 'failed', 'stopped'


_Command = Callable[[], None]


class Failed(RuntimeError):
  """The engine has failed; no request is answered any more."""


class Stopped(RuntimeError):
  """The server is stopping; no request is answered any more."""


Item = tuple[int, requests_lib.Update]  # with the index of the request


@dataclasses.dataclass(frozen=True, kw_only=True)
class Ended:
  """The end of a submission; without updates, the engine did not take it."""

  updates: Sequence[Item]  # the last one of each sequence
  error: Exception | None = None  # if the loop has ended it


# The last update is handed out once the result is there.
OnEnd = Callable[[Ended], Awaitable[Any] | None]


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
    try:
      self._ending = self._on_end(ended)
    except Exception as failure:  # must not keep other requests from ending
      self._ending = asyncio.get_running_loop().create_future()
      self._ending.set_exception(failure)

  def close(self) -> None:
    """Cancels unfinished requests; their pages are free at the next step."""
    if self._num_left:
      self._cancel(self)
    self._num_left = 0


@dataclasses.dataclass
class _Open:
  """An unfinished request."""

  updates: Updates  # of the submission that the request belongs to
  which: int  # index among the requests submitted together
  num_left: int  # unfinished sequences


class EngineLoop:
  """Runs an engine in a thread of its own, once."""

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
    self.generator: generate.Generator | None = None
    self.failure: Exception | None = None
    self._load, self._on_load_failure = load, on_load_failure
    self._on_compiled = on_compiled
    self._inbox: queue.SimpleQueue[_Command | None] = queue.SimpleQueue()
    self._open: dict[int, _Open] = {}  # by request id; used in the thread only
    self._is_closed = False
    self._started_at = 0.0  # seconds of `time.perf_counter`
    self._event_loop: asyncio.AbstractEventLoop | None = None
    # A daemon: XLA cannot be interrupted, and a process that is told to stop
    # during a compilation must not wait for its end.
    self._thread = threading.Thread(
      target=self._run, name='engine', daemon=True
    )
    self._compiler = threading.Thread(
      target=self._compile_rest, name='compiler', daemon=True
    )

  @property
  def state(self) -> str:
    """LOADING while programs compile, READY, FAILED or STOPPED."""
    if self.failure:
      return FAILED
    if self._is_closed:
      return STOPPED
    return READY if self.generator else LOADING

  @property
  def is_loading(self) -> bool:
    """Whether the thread still makes the generator, closed or not."""
    return self._thread.is_alive() and not (self.generator or self.failure)

  @property
  def is_compiling(self) -> bool:
    """Whether a thread compiles, in which XLA cannot be interrupted."""
    if self.is_loading or self._compiler.is_alive():
      return True
    generator = self.generator
    return generator is not None and generator.engine.is_compiling

  @property
  def is_idle(self) -> bool:
    """Whether the engine is complete, and has nothing to do."""
    generator = self.generator
    return (
      self.state == READY
      and generator is not None
      and not self._compiler.is_alive()
      and not generator.engine.has_work
      and self._inbox.empty()
    )

  def release(self) -> None:
    """Frees the memory of the engine, after `close` and all compilation."""
    self._thread.join()
    if self.generator:
      self.generator.engine.release()
      self.generator = None
    # Programs and the engine are in cycles, of objects that may be frozen.
    was_frozen = gc.get_freeze_count() > 0
    gc.unfreeze()
    gc.collect()
    if was_frozen:
      gc.freeze()
    host_memory.return_freed_memory()

  def start(self) -> None:
    """Starts the thread, for the running event loop."""
    self._started_at = time.perf_counter()
    self._event_loop = asyncio.get_running_loop()
    self._thread.start()

  async def submit(
    self,
    requests: Sequence[requests_lib.Request],
    on_end: OnEnd = lambda _: None,
  ) -> Updates:
    """Submits requests, all or none; returns their updates.

    Args:
      requests: requests of one client.
      on_end: called once, also if this raises.

    Raises:
      ValueError: a request could never be answered.
      engine.Overloaded: too many sequences wait; try again later.
      Failed, Stopped: no request is answered any more.
    """
    updates = Updates(
      sum(request.settings.n for request in requests),
      lambda each: self._inbox.put(functools.partial(self._cancel, each)),
      on_end,
    )
    if self._is_closed:
      updates.end(error=_stopping())
      raise _stopping()
    accepted = asyncio.get_running_loop().create_future()
    self._inbox.put(functools.partial(self._take, requests, updates, accepted))
    try:
      await accepted
    except asyncio.CancelledError:
      updates.close()  # the client left before the submission
      raise
    return updates

  async def call(self, function: Callable[[engine_lib.Engine], Any]) -> None:
    """Calls a function with the engine, in its thread, between two steps.

    Raises:
      ValueError: the function raises it.
      Failed, Stopped: the engine does not run any more.
    """
    if self._is_closed:
      raise _stopping()
    called = asyncio.get_running_loop().create_future()

    def run() -> None:
      error = None
      if self.failure or not self.generator:
        error = _failed()
      else:
        try:
          function(self.generator.engine)
        except ValueError as refusal:
          error = refusal
      self._call(_settle, called, error)

    self._inbox.put(run)
    await called

  async def close(self) -> None:
    """Cancels open requests and ends the thread, unless it still loads."""
    self._is_closed = True
    self._inbox.put(None)
    if not self.is_loading:
      await asyncio.to_thread(self._thread.join)

  # --------------------------------------------------------------------------
  # In the thread

  def _run(self) -> None:
    thread_priority.lower()  # first, so that XLA's threads have it too
    try:
      self.generator = self._load()
    except Exception as error:
      self.failure = error
      self._call(self._on_load_failure)
    else:
      seconds = time.perf_counter() - self._started_at
      _LOG.info('ready after %.1f s; %s', seconds, self.generator.memory_text())
      if products := self.generator.products_text():
        _LOG.info('products with kernels in fewer bits: %s', products)
      self._compiler.start()
      try:
        self._work(self.generator.engine)
      except Exception as error:
        _LOG.error('the engine failed', exc_info=error)
        self.failure = error
    if self.failure:
      self._end_all(_failed())
    while (command := self._inbox.get()) is not None:
      command()  # fails its request: no client may wait forever

  def _compile_rest(self) -> None:
    assert self.generator
    start = time.perf_counter()
    try:
      self.generator.engine.compile_rest()
    except Exception as error:
      # The programs that exist can compute every step.
      _LOG.error('programs are missing, steps are slower', exc_info=error)
    else:
      self._on_compiled()
      seconds = time.perf_counter() - start
      _LOG.info('all programs are compiled, %.1f s after ready', seconds)

  def _work(self, engine: engine_lib.Engine) -> None:
    while self._obey(is_idle=not engine.has_work):
      if engine.has_work:
        self._hand_out(engine.step())
    self._inbox.put(None)  # again, for `_run`: `_obey` has read the first
    self._end_all(_stopping())
    while engine.has_work:
      engine.step()  # reads the step in flight

  def _obey(self, *, is_idle: bool) -> bool:
    """Runs the commands of the inbox; without work, waits for one.

    Returns:
      False if the end was among them.
    """
    try:
      command = self._inbox.get(block=is_idle)
      while command is not None:
        command()
        command = self._inbox.get_nowait()
    except queue.Empty:
      return True
    return False

  def _take(
    self,
    requests: Sequence[requests_lib.Request],
    updates: Updates,
    accepted: asyncio.Future,
  ) -> None:
    if self.failure or not self.generator:
      self._refuse(updates, accepted, _failed())
      return
    try:
      request_ids = self.generator.engine.submit_all(requests)
    except (ValueError, engine_lib.Overloaded) as error:
      self._refuse(updates, accepted, error)
    except Exception:
      self._refuse(updates, accepted, _failed())
      raise
    else:
      for which, request_id in enumerate(request_ids):
        num = requests[which].settings.n
        self._open[request_id] = _Open(updates, which, num)
      self._call(_settle, accepted, None)

  def _refuse(
    self, updates: Updates, accepted: asyncio.Future, error: Exception
  ) -> None:
    self._call(updates.end, (), error)
    self._call(_settle, accepted, error)

  def _cancel(self, updates: Updates) -> None:
    # They may have ended before any reader noticed: then nothing is open.
    if any(each.updates is updates for each in self._open.values()):
      self._end(updates)

  def _end(self, updates: Updates, error: Exception | None = None) -> None:
    """Cancels the open requests of a submission in the engine."""
    assert self.generator
    cancelled = []
    for request_id, each in list(self._open.items()):
      if each.updates is updates:
        del self._open[request_id]
        # The counts of a failed engine are known, unless they are the failure.
        with contextlib.suppress(*[Exception] * bool(self.failure)):
          last = self.generator.engine.cancel(request_id)
          cancelled += [(each.which, update) for update in last]
    self._call(updates.end, cancelled, error)

  def _hand_out(self, arrived: Sequence[requests_lib.Update]) -> None:
    """Gives the updates of a step to the event loop, which wakes once."""
    items = []
    for update in arrived:
      each = self._open[update.request_id]
      items.append((each.updates, (each.which, update)))
      each.num_left -= update.completion is not None
      if not each.num_left:
        del self._open[update.request_id]
    if items:
      self._call(_put_all, items)

  def _end_all(self, error: Exception) -> None:
    whose = {id(each.updates): each.updates for each in self._open.values()}
    for updates in whose.values():
      self._end(updates, error)

  def _call(self, function: Callable, *args) -> None:
    """Calls a function in the event loop, unless it is closed."""
    assert self._event_loop
    with contextlib.suppress(RuntimeError):
      self._event_loop.call_soon_threadsafe(function, *args)


def _failed() -> Failed:
  return Failed('the engine has failed; see the log of the server')


def _stopping() -> Stopped:
  return Stopped('the server is stopping')


def _settle(future: asyncio.Future, error: Exception | None) -> None:
  if future.done():
    return  # the client has left
  if error:
    future.set_exception(error)
  else:
    future.set_result(None)


def _put_all(items) -> None:
  for updates, item in items:
    updates.put(item)
