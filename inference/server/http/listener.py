"""The listener: uvicorn with limits, and an orderly end of open requests.

After a signal to stop, open requests have `drain_seconds` to finish; new ones
are answered 503, see `draining`. Then streams end with an error event and
[DONE], and other requests are answered 503. uvicorn alone would cancel the
tasks: half answers, 500s, tracebacks.
"""

import asyncio
from collections.abc import Awaitable, Callable
import contextlib
import os
import resource
import socket
from typing import Any

from fastapi import responses
import uvicorn

from inference.server import server_config
from inference.server.http import (
  door as door_lib,
  draining as draining_lib,
  protocol,
)

# Time in which the last events may reach clients; slower clients are cut off.
_FLUSH_SECONDS = 2.0
_TICK_SECONDS = 0.05
# Files other than connections: weights, the compilation cache, logs, threads;
# and connections that come from the door and are not taken yet.
_OTHER_FILES = 128 + 300


class Listener(uvicorn.Server):
  """Serves an app until a signal stops it."""

  def __init__(
    self,
    app,
    config: server_config.ServerConfig,
    *,
    end_requests: Callable[[], Awaitable[None]],
    health: Callable[[], responses.Response] | None = None,
    draining: draining_lib.Draining | None = None,
    **options,
  ):
    """Takes the app.

    Args:
      app: the ASGI app.
      config: the limits.
      end_requests: ends all open requests with an error; called after the
        drain.
      health: returns the answer to GET /health, for the process that accepts
        connections and answers probes; None: the event loop does both.
      draining: draining state of the app; None: the port is closed at once.
      **options: options of `uvicorn.Config`, such as host and port.
    """
    super().__init__(
      uvicorn.Config(
        app,
        http=protocol.make_protocol(config),
        ws='none',
        timeout_keep_alive=config.idle_seconds,  # pyright: ignore[reportArgumentType]
        **options,
      )
    )
    self._drain_seconds, self._end_requests = config.drain_seconds, end_requests
    self._draining = draining
    self._health = health
    self._door: door_lib.Door | None = None
    self.port = 0  # that it listens on, once it has started
    self._opening: set[asyncio.Task] = set()  # else nothing refers to them

  async def serve(self, sockets=None) -> None:
    """Serves until a signal; the process then exits with 0."""
    with self.capture_signals():
      await self._serve(sockets)
      self._captured_signals.clear()  # uvicorn would raise them again

  async def startup(self, sockets=None) -> None:
    """Listens; connections come by the door."""
    await super().startup(sockets)
    listening = []
    for server in self.servers:
      listening += [
        socket.socket(fileno=os.dup(each.fileno())) for each in server.sockets
      ]
      server.close()  # the door accepts
    self.servers = []
    self._door = door_lib.Door(listening, adopt=self._adopt)
    self._door.start(has_keeper=self._health is not None)
    self.port = listening[0].getsockname()[1]

  async def on_tick(self, counter: int) -> bool:
    """Tells the door that the event loop turns."""
    is_over = await super().on_tick(counter)
    self._tell()
    return is_over

  async def shutdown(self, sockets=None) -> None:
    """Finishes open requests, or ends them; stops listening."""
    now = asyncio.get_running_loop().time()
    deadline = now + self._drain_seconds
    if self._draining:
      self._draining.is_on = True
      while self._draining.num_open and not self._is_over(deadline):
        await asyncio.sleep(_TICK_SECONDS)
        self._tell()
    if self._door:
      await self._door.close()
    ending = asyncio.create_task(self._end_in_time(deadline))
    await super().shutdown(sockets)
    ending.cancel()
    with contextlib.suppress(asyncio.CancelledError):
      await ending

  def _tell(self) -> None:
    if self._door and self._health:
      self._door.tell(self._health(), self.server_state.default_headers)

  def _adopt(self, connection: socket.socket) -> None:
    loop = asyncio.get_running_loop()
    opening = loop.create_task(
      loop.connect_accepted_socket(self._protocol, connection)
    )
    self._opening.add(opening)
    opening.add_done_callback(self._opening.discard)

  def _protocol(self) -> asyncio.Protocol:
    make: Any = self.config.http_protocol_class
    return make(
      config=self.config,
      server_state=self.server_state,
      app_state=self.lifespan.state,
    )

  def _is_over(self, deadline: float) -> bool:
    now = asyncio.get_running_loop().time()
    return now >= deadline or self.force_exit

  async def _end_in_time(self, deadline: float) -> None:
    while not self._is_over(deadline):
      await asyncio.sleep(_TICK_SECONDS)
    await self._end_requests()
    await asyncio.sleep(_FLUSH_SECONDS)
    for connection in list(self.server_state.connections):
      connection.abort()  # pyright: ignore[reportAttributeAccessIssue]


def allow_files(num_connections: int) -> None:
  """Lets the process have a file for each connection.

  Raises:
    ValueError: the hard limit of the system is below that.
  """
  wanted = num_connections + _OTHER_FILES
  soft, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
  if soft != resource.RLIM_INFINITY and soft < wanted:
    if hard != resource.RLIM_INFINITY and hard < wanted:
      raise ValueError(
        f'server.max_connections: got {num_connections}, expected at most'
        f' {max(hard - _OTHER_FILES, 0)}, since this process may open {hard}'
        ' files; lower it or raise `ulimit -Hn`'
      )
    resource.setrlimit(resource.RLIMIT_NOFILE, (wanted, hard))
