"""Turns: so many requests begin in a turn of the event loop, probes at once.

Beginning a request takes up to 1 ms: routes, text, the engine. When hundreds of
clients ask at the same moment, streams would wait until all have begun.
"""

import asyncio
import collections

from inference.server.access import api_keys

# Requests that begin together reach the engine together, and share its steps
# from the first one on. Streams wait for a turn; probes of /health do not, they
# have a process of their own (`doorkeeper`).
PER_TURN = 32


class Turns:
  """ASGI middleware: lets requests wait for their turn, first come first."""

  def __init__(self, app):
    self._app = app
    self._num_left = PER_TURN  # in this turn
    self._waiting: collections.deque[asyncio.Future] = collections.deque()
    self._is_refilling = False

  async def __call__(self, scope, receive, send):
    if scope['type'] == 'http' and scope['path'] not in api_keys.OPEN_PATHS:
      await self._turn()
    await self._app(scope, receive, send)

  async def _turn(self) -> None:
    loop = asyncio.get_running_loop()
    if not self._is_refilling:
      self._is_refilling = True
      loop.call_soon(self._refill, loop)
    if self._num_left:
      self._num_left -= 1
    else:
      self._waiting.append(loop.create_future())
      await self._waiting[-1]

  def _refill(self, loop: asyncio.AbstractEventLoop) -> None:
    self._num_left = PER_TURN
    while self._num_left and self._waiting:
      waiting = self._waiting.popleft()
      if not waiting.done():  # not cancelled
        waiting.set_result(None)
        self._num_left -= 1
    self._is_refilling = self._num_left < PER_TURN
    if self._is_refilling:
      loop.call_soon(self._refill, loop)
