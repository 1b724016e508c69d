"""The bodies of requests: read within limits, and worked on in threads.

    bodies = Bodies(config)
    answer = await bodies.worked(request, lambda raw: ...)

A body is counted while it is read, so that neither a missing content-length nor
chunks get around the limit. Parsing, templates and tokenization run in threads:
/health and the streams do not wait for them. Long bodies have a thread of their
own, so that short ones do not wait for them either. Tiny bodies need no thread:
their work is shorter than the way there and back. Only a few long bodies are in
memory at once; others wait, unread.
"""

import asyncio
from collections.abc import AsyncGenerator, Callable
from concurrent import futures
import contextlib
import contextvars
import time
from typing import Any, TypeVar

import fastapi

from checks import expect
from inference.server import server_config
from inference.server.api import errors
from inference.server.http import thread_priority

# Bytes. In a thread beside a busy engine, 150 bytes took .65 ms, .25 ms of it
# for tokenization, which takes .006 ms alone: the rest is waiting for a core
# and for Python's lock (32 streams on 2 cores).
_TINY = 1024
_LONG = 64 * 1024  # bytes; the text of a shorter body takes milliseconds
_MOST_LONG = 8  # long bodies in memory
_PAUSE = 3  # times the duration of long work
_MOST_PAUSE_SECONDS = 1.0
_NUM_THREADS = 2  # for short bodies; and for grammars

_Result = TypeVar('_Result')


class Bodies:
  """Reads bodies and works on them; belongs to one event loop."""

  def __init__(self, config: server_config.ServerConfig):
    """Makes the threads, which start when the first work arrives."""
    self._config = config
    self._short, self._long, self._grammars = (
      futures.ThreadPoolExecutor(num, name, initializer=thread_priority.lower)
      for num, name in (
        (_NUM_THREADS, 'text'),
        (1, 'long-text'),
        (_NUM_THREADS, 'grammar'),
      )
    )
    self._may_be_long = asyncio.Semaphore(_MOST_LONG)
    self._timers: set[asyncio.Timeout] = set()
    self._is_stopped = False
    self._pause = 0.0  # seconds; used in the long thread only

  async def worked(
    self,
    request: fastapi.Request,
    work: Callable[[bytes], _Result],
    *,
    may_block: bool = False,
  ) -> _Result:
    """Returns the result of `work` on the body of a request.

    Args:
      request: its body is read.
      work: gets the body. It runs in a thread, unless the body is tiny.
      may_block: `work` may wait, for a disk for example; it runs in a thread,
        however short the body is.

    Raises:
      ApiError: the body is too large, does not arrive in time, or finds no
        room; or the error that `work` raises.
    """
    _check_type(request)
    async with contextlib.AsyncExitStack() as held:
      body = await self._read(request, held)
      if len(body) <= _TINY and not may_block:
        return work(body)
      return await self.in_thread(work, body, size=len(body))

  async def read(self, request: fastapi.Request) -> bytes:
    """Returns the body of a request, within the limits of `worked`."""
    async with contextlib.AsyncExitStack() as held:
      return await self._read(request, held)

  async def in_thread(
    self, work: Callable[..., _Result], *args: Any, size: int
  ) -> _Result:
    """Returns the result of `work(*args)`; `size` is the length of the text."""
    loop, run = asyncio.get_running_loop(), _in_exchange(work, *args)
    if size <= _LONG:
      return await loop.run_in_executor(self._short, run)
    return await loop.run_in_executor(self._long, self._paced, run)

  async def compiled(self, work: Callable[[], _Result]) -> _Result:
    """Returns the result of `work`, in a thread that compiles grammars.

    Some grammars take a second: requests without a grammar do not wait for
    them.
    """
    loop = asyncio.get_running_loop()
    return await loop.run_in_executor(self._grammars, _in_exchange(work))

  def stop(self) -> None:
    """Answers 503 to the requests whose bodies have not arrived."""
    self._is_stopped = True
    now = asyncio.get_running_loop().time()
    for timer in self._timers:
      timer.reschedule(now)

  def close(self) -> None:
    """Ends the threads after the work that they have begun."""
    for lane in (self._short, self._long, self._grammars):
      lane.shutdown(wait=False, cancel_futures=True)

  def _paced(self, work: Callable[[], _Result]) -> _Result:
    """Does long work, after a pause for the work before.

    A parser holds Python's lock from its first byte to its last. Without pauses
    a few clients with long bodies would hold it most of the time.
    """
    time.sleep(self._pause)
    start = time.thread_time()
    try:
      return work()
    finally:
      took = time.thread_time() - start
      self._pause = min(_PAUSE * took, _MOST_PAUSE_SECONDS)

  async def _read(
    self, request: fastapi.Request, held: contextlib.AsyncExitStack
  ) -> bytes:
    """Returns the body; `held` keeps its place among the long bodies."""
    most = self._config.max_body_bytes
    _check_length(request, most)
    body = bytearray()
    is_long = False
    async with self._until_late():
      async for part in request.stream():
        body += part
        if len(body) > most:
          raise _too_large(most)
        if len(body) > _LONG and not is_long:
          is_long = True
          await held.enter_async_context(self._may_be_long)
    return bytes(body)

  @contextlib.asynccontextmanager
  async def _until_late(self) -> AsyncGenerator[None]:
    seconds = self._config.body_seconds
    try:
      async with asyncio.timeout(0 if self._is_stopped else seconds) as timer:
        self._timers.add(timer)
        try:
          yield
        finally:
          self._timers.discard(timer)
    except TimeoutError as error:
      if self._is_stopped:
        raise errors.stopping() from error
      raise errors.ApiError(
        408,
        f'body: got a part of it in {seconds:g} s, expected all of it; send a'
        ' shorter body, or send it faster',
        param=None,
        code='timeout',
      ) from error


def _in_exchange(
  work: Callable[..., _Result], *args: Any
) -> Callable[[], _Result]:
  """Returns the work with its exchange set, for a call in a thread."""
  context = contextvars.copy_context()
  return lambda: context.run(work, *args)


def _check_type(request: fastapi.Request) -> None:
  """Refuses a body that any web page could make a browser send."""
  kind, _, _ = request.headers.get('content-type', '').partition(';')
  subtype = kind.strip().lower().removeprefix('application/')
  if subtype != 'json' and not subtype.endswith('+json'):
    raise errors.ApiError(
      400,
      f'content-type: got {expect.shown(kind)}, expected application/json',
      param=None,
      code=None,
    )


def _check_length(request: fastapi.Request, most: int) -> None:
  """Refuses a body that is announced as too large, before it is read."""
  length = request.headers.get('content-length', '0')
  if int(length) > most:  # the protocol has checked that these are digits
    raise _too_large(most)


def _too_large(most: int) -> errors.ApiError:
  return errors.ApiError(
    413,
    f'body: got more than {most} bytes, expected at most {most}; send several'
    ' requests, or start the server with a larger --server.max_body_bytes',
    param=None,
    code='body_too_large',
  )
