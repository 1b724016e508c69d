"""Draining: after a signal to stop, open requests finish and others get 503.

The server listens until the open requests have finished. A client that comes in
this time gets 503 and tries again; a closed port would look like a crash.
"""

from inference.server.access import api_keys
from inference.server.api import errors


class Draining:
  """Whether a server drains, and how many requests are open."""

  def __init__(self):
    self.is_on = False
    self.num_open = 0  # accepted requests; probes do not count


class Refusals:
  """ASGI middleware: counts open requests, and refuses new ones in the end."""

  def __init__(self, app, draining: Draining):
    self._app, self._draining = app, draining

  async def __call__(self, scope, receive, send):
    if scope['type'] != 'http' or scope['path'] in api_keys.OPEN_PATHS:
      await self._app(scope, receive, send)
      return
    if self._draining.is_on:
      response = errors.stopping().response()
      # Otherwise a client that asks again and again would keep the server open.
      response.headers['connection'] = 'close'
      await response(scope, receive, send)
      return
    self._draining.num_open += 1
    try:
      await self._app(scope, receive, send)
    finally:
      self._draining.num_open -= 1
