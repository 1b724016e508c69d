"""An engine on devices of its own that computes prompts for another engine.

Its thread computes the full pages of a prompt, and sends their contents to the
devices that decode. There they enter the prefix cache, as if another sequence
had computed them; the rest of the prompt, at least one token, is computed where
the answer is. So a long prompt never makes a decode step longer, and nothing of
sampling is here.

Reference: the phases apart, Zhong et al. 2024, arXiv:2401.09670.
"""

from collections.abc import Callable, Hashable
import dataclasses
import functools
import logging
import queue
import threading
from typing import Any, Protocol

from inference.engine import adapter_table, device_state
from inference.engine.apart import pages as pages_lib
from inference.requests import requests as requests_lib
from inference.sampling import settings as settings_lib
from models.layers import adapters as adapters_lib

_LOG = logging.getLogger(__name__)
# The first token is sampled where the answer is.
_NO_ANSWER = settings_lib.Settings(
  temperature=0.0, max_tokens=1, ignore_eos=True
)


class Failed(RuntimeError):
  """The thread of a prefiller has ended with an exception, its cause."""


class Engine(Protocol):
  """The engine of a prefiller, see `inference.engine.engine.Engine`."""

  @property
  def has_work(self) -> bool: ...
  @property
  def kv_cache(self) -> device_state.KVCache: ...
  @property
  def adapters(self) -> adapter_table.AdapterTable: ...
  def submit(self, request: requests_lib.Request) -> int: ...
  def step(self) -> list[requests_lib.Update]: ...
  def cancel(self, request_id: int) -> list[requests_lib.Update]: ...
  def cached_pages(self, request: requests_lib.Request) -> list[int]: ...
  def compile_rest(self) -> None: ...
  def release(self) -> None: ...


@dataclasses.dataclass(frozen=True, kw_only=True)
class Computed:
  """Pages of a prompt, on the devices that decode."""

  key: Hashable
  num_pages: int  # from the first token on
  contents: Any  # of `pages.Port.sent`; (): there are no pages
  usage: requests_lib.Usage  # of the engine that computed them


class Prefiller:
  """Computes prompts, in a thread of its own."""

  def __init__(
    self,
    engine: Engine,
    read: pages_lib.Port,
    shardings: Any,
    on_result: Callable[[Computed | BaseException], None],
  ):
    """Starts the thread.

    Args:
      engine: that computes prompts; from now on the thread owns it.
      read: reads pages of its KV cache.
      shardings: of contents, on the devices that decode.
      on_result: is called by the thread for each prompt, or once with the
        exception that ended the thread.
    """
    self.engine = engine
    self._read, self._shardings = read, shardings
    self._on_result = on_result
    # Calls of the thread, in their order; None: the end.
    self._inbox: queue.Queue[Callable[[], Any] | None] = queue.Queue()
    self._asked: dict[int, tuple[Hashable, requests_lib.Request]] = {}
    self._thread = threading.Thread(
      target=self._run, name='prefiller', daemon=True
    )
    self._thread.start()

  def submit(self, key: Hashable, request: requests_lib.Request) -> None:
    """Asks for the pages of a prompt of whole pages."""
    self._inbox.put(functools.partial(self._begin, key, request))

  def load(self, digest: str, tree: adapters_lib.Tree) -> None:
    """Loads an adapter, before any prompt that is asked for later."""
    load = self.engine.adapters.load
    self._inbox.put(functools.partial(load, digest, tree))

  def unload(self, digest: str) -> None:
    """Unloads an adapter; its prompts are done or cancelled."""
    self._inbox.put(functools.partial(self.engine.adapters.unload, digest))

  def cancel(self, key: Hashable) -> None:
    """Ends the work for a prompt, unless it is done already."""
    self._inbox.put(functools.partial(self._end, key))

  def close(self) -> None:
    """Ends the thread, and waits until it has ended."""
    self._inbox.put(None)
    self._thread.join()

  def _run(self) -> None:
    try:
      while self._took():
        if self.engine.has_work:
          for update in self.engine.step():
            if update.completion:
              self._on_result(self._computed(update))
    except Exception as error:
      _LOG.exception('a prefiller has ended')
      self._on_result(error)

  def _took(self) -> bool:
    """Takes what was asked for; waits if there is no work. False: the end."""
    must_wait = not self.engine.has_work
    while True:
      try:
        call = self._inbox.get(block=must_wait)
      except queue.Empty:
        return True
      must_wait = False
      if call is None:
        return False
      call()

  def _end(self, key: Hashable) -> None:
    for request_id, (other, _) in list(self._asked.items()):
      if other == key:
        self.engine.cancel(request_id)
        del self._asked[request_id]

  def _begin(self, key: Hashable, request: requests_lib.Request) -> None:
    try:
      request_id = self.engine.submit(request)
    except (ValueError, requests_lib.Overloaded) as error:
      # The engine that answers has accepted it, and computes it itself.
      _LOG.warning('a prompt was not computed apart: %s', error)
      nothing = requests_lib.Usage()
      self._on_result(
        Computed(key=key, num_pages=0, contents=(), usage=nothing)
      )
      return
    self._asked[request_id] = key, request

  def _computed(self, update: requests_lib.Update) -> Computed:
    """Returns the pages of a prompt that is done; none if it failed."""
    key, request = self._asked.pop(update.request_id)
    assert update.completion is not None
    pages = self.engine.cached_pages(request)
    contents = self._read.sent(self.engine.kv_cache, pages, self._shardings)
    return Computed(
      key=key,
      num_pages=len(pages),
      contents=contents,
      usage=update.completion.usage,
    )


def request_of(
  request: requests_lib.Request, num_tokens: int
) -> requests_lib.Request:
  """Returns the request for the first tokens of a prompt, without an answer."""
  return requests_lib.Request(
    prompt_ids=request.prompt_ids[:num_tokens],
    settings=_NO_ANSWER,
    adapter=request.adapter,
    principal=request.principal,
    priority=request.priority,
    weight=request.weight,
  )
