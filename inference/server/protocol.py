"""HTTP/1.1 connections that no client can hold for longer than it may.

`make_protocol` adds to uvicorn's h11 protocol the limits that it lacks: the
time for the head of a request, for the rest of a body that nobody reads, and
for a client to read its answer; and a number of connections that leaves room
for probes. `Framing` refuses a request whose end two readers could see at
different places (request smuggling, RFC 9112 section 6.3).
"""

import asyncio
from collections.abc import Callable
import functools
import json
import logging
import time
from typing import Any

from fastapi import responses
import h11
from uvicorn.protocols.http import h11_impl

from inference.server import api_keys, schema, server_config

# Connections beyond the limit, so that a probe is answered at the limit too.
_NUM_SPARE = 32
# A client that reads less than this in `write_seconds` is not reading.
_LEAST_READ = 4096
_LINGER_SECONDS = 2.0

_UNCLEAR = schema.ApiError(
  400,
  'transfer-encoding: got it with content-length, or a version other than'
  ' HTTP/1.1, expected one of the two headers and HTTP/1.1',
  param=None,
  code=None,
)
_TOO_MANY = schema.ApiError(
  503,
  'connection: got one more than this server takes, expected fewer; try again',
  param=None,
  code='too_many_connections',
)


def make_protocol(config: server_config.ServerConfig) -> Any:
  """Returns the class of connections, for `uvicorn.Config(http=...)`."""
  logger = logging.getLogger('uvicorn.access')
  logger.addFilter(_shorten)  # once, however often it is called
  return functools.partial(_Protocol, limits=config)


class _Protocol(h11_impl.H11Protocol):
  """One connection.

  Two timers run, each only while the client has to do something: `_reading`
  until a head is there, or the rest of a body that nobody reads; `_writing`
  until the client has taken what was written.
  """

  def __init__(self, *args, limits: server_config.ServerConfig, **kwargs):
    super().__init__(*args, **kwargs)
    self._limits = limits
    self._reading: asyncio.TimerHandle | None = None
    self._writing: asyncio.TimerHandle | None = None
    self._num_unread = 0  # bytes that the client had not read at the last look
    self.waits_since = time.monotonic()

  @property
  def is_waiting(self) -> bool:
    """Whether the connection waits for a head or a body."""
    return not self._has_request or self.conn.their_state is h11.SEND_BODY

  @property
  def _has_request(self) -> bool:
    return self.cycle is not None and not self.cycle.response_complete

  @property
  def _is_unread(self) -> bool:
    """Whether a body still arrives whose request is answered."""
    return not self._has_request and self.conn.their_state is h11.SEND_BODY

  def connection_made(self, transport: asyncio.Transport) -> None:  # pyright: ignore[reportIncompatibleMethodOverride]
    """Takes a connection, in place of an idle one if there are too many."""
    super().connection_made(_Lingering(transport, self._linger))  # pyright: ignore[reportArgumentType]
    # Whatever the kernel does not take at once starts the timer of writing.
    transport.set_write_buffer_limits(high=0)
    most = self._limits.max_connections
    if len(self.connections) > most:
      self._replace_waiting()
    if len(self.connections) > most + _NUM_SPARE:
      transport.abort()
    elif len(self.connections) > most:
      self.app = _only_probes(self.app)
    self._expect_head()

  def connection_lost(self, exc: Exception | None) -> None:
    """Stops the timers."""
    self._stop_reading()
    super().connection_lost(exc)  # its `resume_writing` stops the other timer
    self._unset_keepalive_if_required()

  def data_received(self, data: bytes) -> None:
    """Reads a part of a request."""
    if self.transport.is_closing():
      return
    if self._reading is None and not self._has_request:
      self._expect_head()  # of a second request, on a connection kept alive
    is_unread = self._is_unread
    super().data_received(data)
    if self._has_request:
      self._stop_reading()  # `bodies` waits for the body
    elif is_unread and not self._is_unread:
      self._stop_reading()
      self._expect_head()

  def on_response_complete(self) -> None:
    """Waits for the next request, or for the rest of a refused body."""
    super().on_response_complete()
    self.waits_since = time.monotonic()
    if self._is_unread and self._reading is None:
      self._reading = self.loop.call_later(
        self._limits.body_seconds, self.abort
      )

  def shutdown(self) -> None:
    """Closes the connection after the answer in progress."""
    if self.transport.is_closing():
      self.abort()
    else:
      super().shutdown()

  def pause_writing(self) -> None:
    """Starts the time in which the client must read."""
    super().pause_writing()
    self._num_unread = self.transport.get_write_buffer_size()
    self._look_later()

  def resume_writing(self) -> None:
    """The client has read all."""
    if self._writing:
      self._writing.cancel()
      self._writing = None
    super().resume_writing()

  def send_400_response(self, msg: str) -> None:
    """Answers a request that is not HTTP, if an answer can still be sent."""
    if self.conn.our_state in (h11.IDLE, h11.SEND_RESPONSE):
      error = schema.ApiError(400, f'request: {msg}', param=None, code=None)
      body = json.dumps(error.body()).encode()
      headers = [
        (b'content-type', b'application/json'),
        (b'content-length', str(len(body)).encode()),
        (b'connection', b'close'),
      ]
      for event in (
        h11.Response(status_code=400, headers=headers, reason=b'Bad Request'),
        h11.Data(data=body),
        h11.EndOfMessage(),
      ):
        self.transport.write(self.conn.send(event) or b'')
    self.transport.close()

  def _should_upgrade(self) -> bool:
    return False  # uvicorn logs two lines about every header `upgrade`

  def _linger(self) -> bool:
    """Keeps the connection for a while if the client still sends.

    Closing it at once would reset it, and the client would lose its answer.
    """
    if self.conn.their_state not in (h11.SEND_BODY, h11.ERROR):
      return False
    self.transport.write_eof()
    self.flow.resume_reading()
    self._stop_reading()
    self._reading = self.loop.call_later(_LINGER_SECONDS, self.abort)
    return True

  def _expect_head(self) -> None:
    self._reading = self.loop.call_later(
      self._limits.head_seconds, self._end_waiting
    )

  def _end_waiting(self) -> None:
    self._reading = None
    if not self._has_request:
      self.transport.close()

  def _replace_waiting(self) -> None:
    """Closes the connection that has waited longest without a request."""
    waiting = [
      each
      for each in self.connections
      if isinstance(each, _Protocol) and each is not self and each.is_waiting
    ]
    if waiting:
      oldest = min(waiting, key=lambda each: each.waits_since)
      oldest.abort()

  def abort(self) -> None:
    """Closes the connection without waiting for the client."""
    self.connections.discard(self)  # now, not when the event loop gets to it
    self.transport.abort()

  def _look_later(self) -> None:
    if self._writing is None:
      self._writing = self.loop.call_later(
        self._limits.write_seconds, self._look
      )

  def _look(self) -> None:
    """Closes the connection of a client that has stopped reading."""
    self._writing = None
    before = self._num_unread
    self._num_unread = self.transport.get_write_buffer_size()
    if not self._num_unread:
      return
    if self._num_unread > before - _LEAST_READ:
      self.abort()
    else:
      self._look_later()

  def _stop_reading(self) -> None:
    if self._reading:
      self._reading.cancel()
    self._reading = None


class _Lingering:
  """A transport that asks before it closes."""

  def __init__(self, transport: asyncio.Transport, linger: Callable[[], bool]):
    self._transport, self._linger = transport, linger
    self._is_closing = False

  def __getattr__(self, name: str) -> Any:
    return getattr(self._transport, name)

  def is_closing(self) -> bool:
    return self._is_closing or self._transport.is_closing()

  def close(self) -> None:
    if not self.is_closing() and self._linger():
      self._is_closing = True
    else:
      self._transport.close()


class Framing:
  """ASGI middleware: answers 400 where the end of a request is not certain."""

  def __init__(self, app):
    self._app = app

  async def __call__(self, scope, receive, send):
    if scope['type'] == 'http':
      names = {name for name, _ in scope['headers']}
      version = scope['http_version']
      if version not in ('1.0', '1.1') or (
        b'transfer-encoding' in names
        and (b'content-length' in names or version == '1.0')
      ):
        await _closing(_UNCLEAR)(scope, receive, send)
        return
    await self._app(scope, receive, send)


def _only_probes(app):
  """Returns an app that answers 503 to all but probes, and closes."""

  async def answer(scope, receive, send):
    if scope['type'] == 'http' and scope['path'] not in api_keys.OPEN_PATHS:
      await _closing(_TOO_MANY)(scope, receive, send)
      return
    await app(scope, receive, send)

  return answer


def _closing(error: schema.ApiError) -> responses.Response:
  """Returns an answer after which the connection is closed."""
  response = error.response()
  response.headers['connection'] = 'close'
  return response


def _shorten(record: logging.LogRecord) -> bool:
  """Cuts what a client has sent out of a line of the access log."""
  if isinstance(record.args, tuple):
    record.args = tuple(
      schema.printable(each) if isinstance(each, str) else each
      for each in record.args
    )
  return True
