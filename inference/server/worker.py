"""One thread that generates; requests wait for their turn.

The event loop stays free: it answers /health, accepts requests and notices
disconnects while the thread works. First come, first served; batching requests
together is a later issue's.
"""

import asyncio
from collections.abc import AsyncGenerator, Generator
from concurrent import futures
import contextlib
import threading

from inference import generate


class Worker:
  """Runs generations one after another, off the event loop."""

  def __init__(self):
    self._pool = futures.ThreadPoolExecutor(1, thread_name_prefix='generate')

  async def run(
    self, updates: Generator[generate.Update]
  ) -> AsyncGenerator[generate.Update]:
    """Yields the updates as they come; closing this stops the generation."""
    loop = asyncio.get_running_loop()
    queue: asyncio.Queue[generate.Update | Exception | None] = asyncio.Queue()
    is_abandoned = threading.Event()

    def put(item):
      # The loop may be gone when the server was stopped meanwhile.
      with contextlib.suppress(RuntimeError):
        loop.call_soon_threadsafe(queue.put_nowait, item)

    def work():
      try:
        with contextlib.closing(updates):
          if is_abandoned.is_set():
            return
          for update in updates:
            if is_abandoned.is_set():
              return
            put(update)
      except Exception as error:
        put(error)
      else:
        put(None)

    self._pool.submit(work)
    try:
      while (item := await queue.get()) is not None:
        if isinstance(item, Exception):
          raise item
        yield item
    finally:
      is_abandoned.set()

  def close(self) -> None:
    """Lets the running generation end and drops those that wait."""
    self._pool.shutdown(wait=True, cancel_futures=True)
