"""A version in a replica: its engine, and its updates on their way.

The engine's thread writes the updates of a dispatch in one frame. No event loop
is here, so the engine shares Python's lock with a thread that only reads.
"""

from collections.abc import Callable, Sequence
from concurrent import futures
import os
import pathlib
import time
from typing import Any, Protocol

from frozen import adapters as frozen_adapters, manifest as manifest_lib
from inference import adapters, generate
from inference.engine.processes import leader as leader_lib
from inference.requests import requests as requests_lib
from inference.server import engine_loop as engine_loop_lib, engine_thread
from inference.server.replicas import values
from inference.server.versions import about, audit, loading, memory
from parallel import frames

_TICK_SECONDS = 0.02
_LOSS_SECONDS = 1.0  # until the end of another process is known
_FAILED = 1  # exit code of a replica whose step has failed


class Process(Protocol):
  """The replica, as its versions use it."""

  texts: futures.ThreadPoolExecutor  # compile grammars
  setup: values.Setup

  def send(self, messages: Sequence[frames.Message]) -> None:
    """Sends messages; any thread may call this."""
    ...

  def threads(self) -> list[engine_thread.EngineThread]:
    """Returns the engines of all versions."""
    ...

  def leader(self) -> leader_lib.Leader | None:
    """Returns the leader of several processes; waits for them."""
    ...


class _Unread(futures.Future):
  """The answer to a command that nobody waits for."""


class Sink:
  """The updates of a submission, on their way to the server."""

  def __init__(
    self, version: 'Version', number: int, num_left: int, *, is_stream: bool
  ):
    self._version, self._number = version, number
    self._num_left, self._is_stream = num_left, is_stream
    # Updates of a sequence that are sent together, by (request, index).
    self._held: dict[tuple[int, int], list[requests_lib.Update]] = {}
    self.is_taken = self.is_left = self._is_accepted = False

  def put(self, item: engine_thread.Item) -> None:
    """Adds an update."""
    which, update = item
    if not self._is_stream:
      held = self._held.setdefault((which, update.index), [])
      held.append(update)
      if update.completion is None:
        return
      item = which, _joined(held)
    self._version.updates.append((self._number, *values.update(item)))
    self._num_left -= update.completion is not None
    if not self._num_left:
      self._version.sinks.pop(self._number, None)

  def end(
    self,
    cancelled: Sequence[engine_thread.Item] = (),
    error: Exception | None = None,
  ) -> None:
    """Ends the updates; a refusal is told by `set_exception`."""
    if self._is_accepted:
      kind = type(error).__name__ if error else ''
      last = [values.update(each) for each in cancelled]
      self._version.tell('ended', self._number, last, kind)
      self._version.sinks.pop(self._number, None)

  def done(self) -> bool:
    """Returns False: the server always waits for an answer."""
    return False

  def set_result(self, result: Any, /) -> None:
    """Tells that the engine has taken the requests."""
    del result
    self._is_accepted = True
    self._version.tell('accepted', self._number)

  def set_exception(self, error: Any, /) -> None:
    """Tells that the engine has refused the requests."""
    self._version.sinks.pop(self._number, None)
    is_failed = isinstance(error, engine_thread.Failed)
    self._version.tell(
      'refused', self._number, *values.error_as_values(error), is_failed
    )


def _joined(parts: Sequence[requests_lib.Update]) -> requests_lib.Update:
  """Returns the updates of a whole sequence as one."""
  last = parts[-1]
  return requests_lib.Update(
    last.request_id,
    last.index,
    ''.join(each.text for each in parts),
    tuple(token for each in parts for token in each.token_ids),
    tuple(scored for each in parts for scored in each.logprobs),
    last.completion,
    last.num_cached,
  )


class Audited:
  """What the audit needs of a version, or of an adapter beside it."""

  def __init__(
    self,
    version: 'Version',
    name: str,
    adapter: frozen_adapters.Adapter | None,
  ):
    self._of, self.version, self.adapter = version, name, adapter
    self.manifest = version.manifest

  @property
  def is_draining(self) -> bool:
    """Whether it is unloaded."""
    return self._of.thread.is_closed

  def generator(self) -> generate.Generator:
    """Returns the generator of the version."""
    assert self._of.thread.generator
    return self._of.thread.generator

  def hold(self) -> None:
    """Does nothing: `Version.unload` waits for the audit."""

  def release(self) -> None:
    """Does nothing."""


class Version:
  """A frozen directory with its engine."""

  def __init__(self, process: Process, number: int, load: values.Load):
    """Starts to load it."""
    self._process, self._number, self._load = process, number, load
    self.manifest = manifest_lib.read(pathlib.Path(load.directory))
    self.sinks: dict[int, Sink] = {}
    self.updates: list[tuple] = []  # of a dispatch, until they are sent
    self._told: list[frames.Message] = []
    self._adapters: dict[str, Audited] = {}
    self._plan: memory.Plan | None = None
    self.thread = engine_thread.EngineThread(
      self._read,
      deliver=self._deliver,
      on_load_failure=self._fail_to_load,
      on_ready=self._ready,
      on_failure=self._fail,
      on_compiled=self._compiled,
    )
    self.auditor = audit.Auditor(
      1.0, process.setup.audit_threshold, engines=process.threads
    )
    self.auditor.start()
    self.thread.start()

  def tell(self, kind: str, *args: Any) -> None:
    """Sends a message about this version with the updates of the dispatch."""
    self._told.append((kind, self._number, *args))

  def _deliver(self, function: Callable, *args: Any) -> None:
    function(*args)
    messages: list[frames.Message] = []
    if self.updates:
      messages.append(('updates', self._number, self.updates))
    messages += self._told
    self.updates, self._told = [], []
    if messages:
      self._process.send(messages)

  def _read(self) -> generate.Generator:
    load, leader = self._load, self._process.leader()
    devices = leader.devices if leader else None
    self._plan = memory.plan(self.manifest, load.config, devices)
    return loading.read(
      load.directory,
      load.config,
      version=load.version,
      plan=self._plan,
      leader=leader,
    )

  def _ready(self) -> None:
    generator = self.thread.generator
    assert generator
    assert self._plan
    engine = generator.engine
    usable = engine.manager.tables.allocator.num_usable
    facts = values.Facts(
      capacity=engine.page_tokens * usable + 1,
      numerics=engine.backend.numerics(engine.config, engine.device),
      products=generator.products_text(),
      adapter_rank=engine.adapters.rank,
      memory=self._plan,
      device=about.device(),
    )
    self.tell('ready', facts)

  def _compiled(self) -> None:
    loading.keep_objects()
    self._process.send([('compiled', self._number)])

  def _fail_to_load(self) -> None:
    assert self.thread.failure
    error = values.error_as_values(self.thread.failure)
    self.tell('not_loaded', *error)

  def _fail(self) -> None:
    if self._process.leader():
      # If it failed because another process is lost, that is told first.
      time.sleep(_LOSS_SECONDS)
    self._process.send([('failed', self._number)])
    os._exit(_FAILED)

  def submit(
    self,
    number: int,
    requests: Sequence[requests_lib.Request],
    *,
    is_stream: bool,
  ) -> None:
    """Submits requests; constrained ones once their grammar is compiled."""
    num = sum(each.settings.n for each in requests)
    sink = self.sinks[number] = Sink(self, number, num, is_stream=is_stream)
    if any(each.room is None for each in requests):
      self._process.texts.submit(self._check, sink, requests)
    else:
      self._take(sink, requests)

  def _check(
    self, sink: Sink, requests: Sequence[requests_lib.Request]
  ) -> None:
    generator = self.thread.generator
    assert generator
    try:
      checked = [
        each if each.room else generator.engine.checked(each)
        for each in requests
      ]
    except Exception as error:
      # In the engine's thread: no other one may send updates.
      self.thread.ask(lambda _, e=error: sink.set_exception(e), _Unread())
    else:
      self._take(sink, checked)

  def _take(self, sink: Sink, requests: Sequence[requests_lib.Request]) -> None:
    self.thread.take(requests, sink, sink)
    sink.is_taken = True
    if sink.is_left:
      self.thread.cancel(sink)

  def cancel(self, number: int) -> None:
    """Cancels a submission, unless it has ended."""
    if sink := self.sinks.get(number):
      sink.is_left = True
      if sink.is_taken:
        self.thread.cancel(sink)

  def audited(self, name: str, directory: str) -> Audited:
    """Returns the version, or its adapter in a directory, for the audit."""
    if directory not in self._adapters:
      adapter = self._adapter(directory) if directory else None
      self._adapters[directory] = Audited(self, name, adapter)
    return self._adapters[directory]

  def _adapter(self, directory: str) -> frozen_adapters.Adapter:
    generator = self.thread.generator
    assert generator
    (found,) = adapters.read({'': directory}, generator.frozen).values()
    return found

  def load_adapter(self, directory: str) -> int:
    """Loads the adapter of a directory; returns its number of parameters."""
    found, generator = self._adapter(directory), self.thread.generator
    assert generator
    table, digest = generator.engine.adapters, found.manifest.adapter_digest
    row = table.fitted(found.tree)  # no step waits for it
    done = futures.Future()

    def load(engine) -> int:
      engine.adapters.load(digest, found.tree, row)
      return engine.adapters.find(digest).num_params

    self.thread.ask(load, done)
    return done.result()

  def check_adapter(self, directory: str) -> None:
    """Refuses an adapter that the engine has no place for."""
    found, generator = self._adapter(directory), self.thread.generator
    assert generator
    table = generator.engine.adapters
    table.check_room(found.manifest.adapter_digest)
    table.fitted(found.tree)

  def unload_adapter(self, digest: str) -> None:
    """Unloads an adapter, if it is loaded."""
    done = futures.Future()
    self.thread.ask(
      lambda engine: engine_loop_lib.drop_adapter(engine, digest), done
    )
    done.result()

  def collect(self) -> list[Any]:
    """Returns the metrics of the engine and of its audit."""
    generator = self.thread.generator
    found = list(self.auditor.metrics.registry.collect())
    if generator:
      found += generator.engine.metrics.registry.collect()
    return found

  def close(self) -> str | None:
    """Ends open requests and the engine; returns the digest of its weights."""
    self.thread.begin_close()
    if self.thread.is_loading:
      return None
    self.thread.join()
    self.auditor.close()
    generator = self.thread.generator
    return generator.weights_digest() if generator else None

  def unload(self) -> None:
    """Frees the memory of the engine."""
    self.thread.begin_close()
    self.auditor.close()
    while self.thread.is_compiling:  # XLA cannot be interrupted
      time.sleep(_TICK_SECONDS)
    self.thread.release()
