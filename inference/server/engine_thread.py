"""The thread that owns an engine, and the inbox of its commands.

    thread = EngineThread(load, deliver=deliver)
    thread.start()
    thread.take(requests, updates, accepted)

Requests join and leave the running batch between two steps. Commands wait in
an inbox, which the thread empties before every step. The updates of a step are
delivered in one call: `EngineLoop` delivers into an event loop of this process,
`replicas.child` to another process. Without work the thread sleeps.

The thread also makes the engine, so that the server listens while the engine
compiles. The engine answers as soon as it has the programs that every step can
use; another thread compiles the others.

If a step fails, all open requests and all later requests fail: the state on the
device cannot be trusted any more. So no client waits for an answer that will
never come.
"""

from collections.abc import Callable, Sequence
import contextlib
import dataclasses
import functools
import gc
import logging
import queue
import threading
import time
from typing import Any, Protocol

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


class Sink(Protocol):
  """Receives the updates of requests that were submitted together."""

  def put(self, item: Item) -> None:
    """Adds an update."""
    ...

  def end(
    self, cancelled: Sequence[Item] = (), error: Exception | None = None
  ) -> None:
    """Ends the updates; cancelled sequences have a last update."""
    ...


class Accepted(Protocol):
  """Receives the answer to a command; a future has these members."""

  def done(self) -> bool:
    """Whether nobody waits for the answer any more."""
    ...

  def set_result(self, result: Any, /) -> None:
    """Notes that the engine has done it."""
    ...

  def set_exception(self, error: Any, /) -> None:
    """Notes that the engine has refused it."""
    ...


@dataclasses.dataclass
class _Open:
  """An unfinished request."""

  updates: Sink  # of the submission that the request belongs to
  which: int  # index among the requests submitted together
  num_left: int  # unfinished sequences


class EngineThread:
  """Runs an engine in a thread of its own, once."""

  def __init__(
    self,
    load: Callable[[], generate.Generator],
    *,
    deliver: Callable[..., None],
    on_load_failure: Callable[[], None] = lambda: None,
    on_ready: Callable[[], None] = lambda: None,
    on_failure: Callable[[], None] = lambda: None,
    on_compiled: Callable[[], None] = lambda: None,
  ):
    """Makes the thread without starting it.

    Args:
      load: makes the generator; called in the thread.
      deliver: calls a function with arguments where updates are received; it
        is itself called in the thread.
      on_load_failure: delivered if `load` raises; the error is in `failure`.
      on_ready: delivered when requests are answered.
      on_failure: delivered when a step has failed, and all requests have ended.
      on_compiled: called in a thread when all programs are compiled.
    """
    self.generator: generate.Generator | None = None
    self.failure: Exception | None = None
    self._load, self._on_load_failure = load, on_load_failure
    self._on_ready, self._on_failure = on_ready, on_failure
    self._on_compiled, self._call = on_compiled, deliver
    self._inbox: queue.SimpleQueue[_Command | None] = queue.SimpleQueue()
    self._open: dict[int, _Open] = {}  # by request id; used in the thread only
    self._is_closed = False
    self._started_at = 0.0  # seconds of `time.perf_counter`
    self._step_began: float | None = None  # the same; None: in no step
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
  def seconds_in_step(self) -> float:
    """The seconds since the step began that runs now, 0 if none does."""
    began = self._step_began
    return 0.0 if began is None else time.perf_counter() - began

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
    """Starts the thread."""
    self._started_at = time.perf_counter()
    self._thread.start()

  @property
  def is_closed(self) -> bool:
    """Whether no further request is taken."""
    return self._is_closed

  def take(
    self,
    requests: Sequence[requests_lib.Request],
    updates: Sink,
    accepted: Accepted,
  ) -> None:
    """Submits requests, all or none; any thread may call this.

    Args:
      requests: requests of one client.
      updates: receives their updates, and their end; also if they are refused.
      accepted: receives None once the engine has taken them, or the error:
        ValueError, Overloaded or Failed.
    """
    self._inbox.put(functools.partial(self._take, requests, updates, accepted))

  def cancel(self, updates: Sink) -> None:
    """Ends the requests of a sink before the next step; from any thread."""
    self._inbox.put(functools.partial(self._cancel, updates))

  def ask(
    self, function: Callable[[engine_lib.Engine], Any], called: Accepted
  ) -> None:
    """Calls a function with the engine, in its thread, between two steps.

    Args:
      function: may raise ValueError.
      called: receives what it returns, its error, or Failed.
    """

    def run() -> None:
      result = error = None
      if self.failure or not self.generator:
        error = failed()
      else:
        try:
          result = function(self.generator.engine)
        except ValueError as refusal:
          error = refusal
      self._call(_settle, called, error, result)

    self._inbox.put(run)

  def join(self) -> None:
    """Waits for the end of the thread."""
    self._thread.join()

  def begin_close(self) -> None:
    """Takes no further request, and tells the thread to end."""
    self._is_closed = True
    self._inbox.put(None)

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
        _LOG.info('products: %s', products)
      self._compiler.start()
      try:
        self._call(self._on_ready)
        self._work(self.generator.engine)
      except Exception as error:
        _LOG.error('the engine failed', exc_info=error)
        self.failure = error
    if self.failure:
      self._end_all(failed())
      if self.generator:
        self._call(self._on_failure)
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
        self._step_began = time.perf_counter()
        updates = engine.step()
        self._step_began = None
        self._hand_out(updates)
    self._inbox.put(None)  # again, for `_run`: `_obey` has read the first
    self._end_all(stopping())
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
    updates: Sink,
    accepted: Accepted,
  ) -> None:
    if self.failure or not self.generator:
      self._refuse(updates, accepted, failed())
      return
    try:
      request_ids = self.generator.engine.submit_all(requests)
    except (ValueError, engine_lib.Overloaded) as error:
      self._refuse(updates, accepted, error)
    except Exception:
      self._refuse(updates, accepted, failed())
      raise
    else:
      for which, request_id in enumerate(request_ids):
        num = requests[which].settings.n
        self._open[request_id] = _Open(updates, which, num)
      self._call(_settle, accepted, None)

  def _refuse(
    self, updates: Sink, accepted: Accepted, error: Exception
  ) -> None:
    self._call(updates.end, (), error)
    self._call(_settle, accepted, error)

  def _cancel(self, updates: Sink) -> None:
    # They may have ended before any reader noticed: then nothing is open.
    if any(each.updates is updates for each in self._open.values()):
      self._end(updates)

  def _end(self, updates: Sink, error: Exception | None = None) -> None:
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


def failed() -> Failed:
  """Returns the error of requests that a failed engine does not answer."""
  return Failed('the engine has failed; see the log of the server')


def stopping() -> Stopped:
  """Returns the error of requests that a stopping server ends."""
  return Stopped('the server is stopping')


def _settle(
  waiting: Accepted, error: Exception | None, result: Any = None
) -> None:
  if waiting.done():
    return  # the client has left
  if error:
    waiting.set_exception(error)
  else:
    waiting.set_result(result)


def _put_all(items) -> None:
  for updates, item in items:
    updates.put(item)
