"""The listener: uvicorn with limits, and an orderly end of open requests.

After a signal to stop, open requests have `drain_seconds` to finish. Then their
streams end with an error event and [DONE], and other requests are answered 503.
uvicorn would cancel the tasks in place of that: half answers, 500s, tracebacks.
"""

import asyncio
from collections.abc import Awaitable, Callable
import contextlib
import resource

import uvicorn

from inference.server import protocol, server_config

# For the last events to reach clients that read. Others are cut off.
_FLUSH_SECONDS = 2.0
_TICK_SECONDS = 0.05
# Files other than connections: weights, the compilation cache, logs, threads.
_OTHER_FILES = 128


class Listener(uvicorn.Server):
  """Serves an app until a signal stops it."""

  def __init__(
    self,
    app,
    config: server_config.ServerConfig,
    *,
    end_requests: Callable[[], Awaitable[None]],
    **options,
  ):
    """Takes the app.

    Args:
      app: the ASGI app.
      config: the limits.
      end_requests: ends all open requests with an error; called after the
        drain.
      **options: of `uvicorn.Config`, such as host and port.
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

  async def shutdown(self, sockets=None) -> None:
    """Stops listening; finishes open requests, or ends them."""
    ending = asyncio.create_task(self._end_in_time())
    await super().shutdown(sockets)
    ending.cancel()
    with contextlib.suppress(asyncio.CancelledError):
      await ending

  async def _end_in_time(self) -> None:
    clock = asyncio.get_running_loop().time
    deadline = clock() + self._drain_seconds
    while clock() < deadline and not self.force_exit:
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
