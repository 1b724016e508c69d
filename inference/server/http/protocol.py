"""HTTP/1.1 connections with time limits, which no client can exceed.

`make_protocol` adds to uvicorn's h11 protocol the limits that it lacks: the
time for the head of a request, for the rest of a body after its answer, and
for a client to read its answer; and a number of connections that leaves room
for probes. `Framing` refuses a request if two readers could disagree about its
end (request smuggling, RFC 9112 section 6.3).
"""

import asyncio
from collections.abc import Callable
import functools
import heapq
import json
import logging
import time
from typing import Any

from fastapi import responses
import h11
from uvicorn.protocols.http import h11_impl

from inference.server import server_config
from inference.server.access import api_keys
from inference.server.api import errors

# Connections beyond the limit, so that a probe is answered at the limit too.
_NUM_SPARE = 32
_REPLACED_SHARE = 64  # one in 64 connections is replaced at once
# A client that reads less than this in `write_seconds` is not reading.
_LEAST_READ = 4096
_MOST_HEAD = 16 * 1024  # bytes; h11 takes 5 ms for 64 KiB of short headers
# h11 takes 25 us for a chunk of any length. After this many short chunks, the
# average chunk must have at least `_CHUNK_BYTES`.
_SHORT_CHUNKS = 256
_CHUNK_BYTES = 64
_TURN_CHUNKS = 16  # in one turn of the event loop
# Bytes of answers that clients have not read, of all connections.
_MOST_UNREAD = 64 * 2**20
_LINGER_SECONDS = 2.0
# Pause between two reads of dropped bytes: 30 MB/s over all connections.
_DRAIN_SECONDS = 0.002

_UNCLEAR = errors.ApiError(
  400,
  'transfer-encoding: got it with content-length, or a version other than'
  ' HTTP/1.1, expected one of the two headers and HTTP/1.1',
  param=None,
  code=None,
)
_TOO_MANY = errors.ApiError(
  503,
  'connection: got one more than this server takes, expected fewer; try again',
  param=None,
  code='too_many_connections',
)


def make_protocol(config: server_config.ServerConfig) -> Any:
  """Returns the class of connections, for `uvicorn.Config(http=...)`."""
  logger = logging.getLogger('uvicorn.access')
  logger.addFilter(_shorten)  # once, however often it is called
  return functools.partial(_Protocol, limits=config, drain=_Drain())


class _Drain:
  """Reads bytes that clients send after their answer, one connection at a time.

  The event loop waits for Python's lock at each read, and reads 32 times per
  turn from a client that sends fast: the others would wait.
  """

  def __init__(self):
    self._waiting: dict[_Protocol, None] = {}  # in the order of arrival
    self._timer: asyncio.TimerHandle | None = None

  def add(self, connection: '_Protocol') -> None:
    """Stops reading from a connection until its turn."""
    connection.flow.pause_reading()
    self._waiting[connection] = None
    self._wait(connection.loop)

  def _wait(self, loop: asyncio.AbstractEventLoop) -> None:
    if self._timer is None and self._waiting:
      self._timer = loop.call_later(_DRAIN_SECONDS, self._read, loop)

  def _read(self, loop: asyncio.AbstractEventLoop) -> None:
    self._timer = None
    connection = next(iter(self._waiting))
    del self._waiting[connection]
    if connection in connection.connections:
      connection.flow.resume_reading()
    self._wait(loop)


class _Connection(h11.Connection):
  """Counts chunks: chunks of one byte would take 25 s of CPU per MiB."""

  def __init__(self):
    super().__init__(h11.SERVER, _MOST_HEAD)
    self._num_chunks = self._num_bytes = 0  # of the body
    self.num_left = _TURN_CHUNKS

  def next_event(self) -> Any:
    """Returns the next part of a request, or NEED_DATA at the turn's end.

    Raises:
      h11.RemoteProtocolError: the request is not HTTP, or its chunks are too
        many for their length.
    """
    if not self.num_left:
      return h11.NEED_DATA
    try:
      event = super().next_event()
    except h11.RemoteProtocolError as error:
      # The frames of h11 hold the error, and it holds them with all that was
      # parsed: memory that only a full collection frees.
      error.__traceback__ = None
      raise h11.RemoteProtocolError(str(error)) from None
    if isinstance(event, h11.Request):
      self._num_chunks = self._num_bytes = 0
    elif isinstance(event, h11.Data) and event.chunk_start:
      self.num_left -= 1
      self._num_chunks += 1
      self._num_bytes += len(event.data)
      if self._num_chunks > _SHORT_CHUNKS + self._num_bytes // _CHUNK_BYTES:
        raise h11.RemoteProtocolError('too many short chunks')
    return event


class _Protocol(h11_impl.H11Protocol):
  """One connection.

  Two timers run, each only while the client has to act: `_reading` until a head
  has arrived, or the rest of a body whose request is answered; `_writing` until
  the client has read the bytes that were written.
  """

  def __init__(
    self,
    *args,
    limits: server_config.ServerConfig,
    drain: _Drain,
    **kwargs,
  ):
    super().__init__(*args, **kwargs)
    self._limits, self._drain = limits, drain
    self.conn = _Connection()
    self._reading: asyncio.TimerHandle | None = None
    self._writing: asyncio.TimerHandle | None = None
    self._num_unread = 0  # bytes that the client had not read at the last look
    self._unread_since = 0.0
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
    self._lingering = _Lingering(transport, self._linger)
    super().connection_made(self._lingering)  # pyright: ignore[reportArgumentType]
    # Bytes that the kernel does not take at once start the timer of writing.
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
    """Stops the timers, and frees the buffers of the connection."""
    self._lingering.detach()
    self._stop_reading()
    super().connection_lost(exc)  # its `resume_writing` stops the other timer
    self._unset_keepalive_if_required()

  def data_received(self, data: bytes) -> None:
    """Reads a part of a request."""
    # In pieces, since h11 limits a head only while it is incomplete.
    for start in range(0, len(data), _MOST_HEAD):
      if self.transport.is_closing():
        self._drain.add(self)
        return
      if self._reading is None and not self._has_request:
        self._expect_head()  # of a second request, on a connection kept alive
      self.conn.receive_data(data[start : start + _MOST_HEAD])
      self._unset_keepalive_if_required()
      self.handle_events()

  def handle_events(self) -> None:
    """Takes the parts of a request that have arrived, a few chunks per turn."""
    is_unread = self._is_unread
    super().handle_events()
    if self._has_request:
      self._stop_reading()  # `bodies` waits for the body
    elif is_unread and not self._is_unread:
      self._stop_reading()
      self._expect_head()
    if self.transport.is_closing():
      return
    if not self.conn.num_left:
      if self._lingering.hold():
        self.loop.call_soon(self._take_turn)
    elif self._is_unread:
      self._drain.add(self)

  def _take_turn(self) -> None:
    self.conn.num_left = _TURN_CHUNKS
    self._lingering.release(is_paused=self.flow.read_paused)
    if not self.transport.is_closing():
      self.handle_events()

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
    self._unread_since = time.monotonic()
    self._look_later()
    self._free_unread()

  def resume_writing(self) -> None:
    """The client has read all."""
    if self._writing:
      self._writing.cancel()
      self._writing = None
    super().resume_writing()

  def send_400_response(self, msg: str) -> None:
    """Answers a request that is not HTTP, if an answer can still be sent."""
    if self.conn.our_state in (h11.IDLE, h11.SEND_RESPONSE):
      error = errors.ApiError(400, f'request: {msg}', param=None, code=None)
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
    is_body = self.conn.their_state is h11.SEND_BODY
    seconds = self._limits.body_seconds if is_body else _LINGER_SECONDS
    self._reading = self.loop.call_later(seconds, self.abort)
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
    """Closes the connections that have waited longest without a request.

    It closes several at once: finding them takes longer than closing them.
    """
    waiting = [
      each
      for each in self.connections
      if isinstance(each, _Protocol) and each is not self and each.is_waiting
    ]
    num = 1 + self._limits.max_connections // _REPLACED_SHARE
    for oldest in heapq.nsmallest(
      num, waiting, key=lambda each: each.waits_since
    ):
      oldest.abort()

  def _free_unread(self) -> None:
    """Closes the connections that have not read for longest, to free memory.

    It acts when unread answers exceed `_MOST_UNREAD` bytes. A thousand clients
    that ask for long answers and read none would otherwise hold gigabytes until
    `write_seconds` have passed.
    """
    writing = sorted(
      (each for each in self.connections if isinstance(each, _Protocol)),
      key=lambda each: each._unread_since,
    )
    sizes = [each.transport.get_write_buffer_size() for each in writing]
    excess = sum(sizes) - _MOST_UNREAD
    for each, size in zip(writing, sizes, strict=True):
      if excess > 0 and size:
        each.abort()
        excess -= size

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
  """A transport that asks before it closes, and can be held.

  A transport that is held reads nothing, also if uvicorn resumes it.
  """

  def __init__(self, transport: asyncio.Transport, linger: Callable[[], bool]):
    self._transport, self._linger = transport, linger
    self._is_closing = self._is_held = False

  def __getattr__(self, name: str) -> Any:
    return getattr(self._transport, name)

  def detach(self) -> None:
    # As a cycle it would keep all buffers until the next full collection.
    self._linger = bool

  def hold(self) -> bool:
    was_held, self._is_held = self._is_held, True
    self._transport.pause_reading()
    return not was_held

  def release(self, *, is_paused: bool) -> None:
    self._is_held = False
    if not is_paused and not self._transport.is_closing():
      self._transport.resume_reading()

  def resume_reading(self) -> None:
    if not self._is_held:
      self._transport.resume_reading()

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


def _closing(error: errors.ApiError) -> responses.Response:
  """Returns an answer after which the connection is closed."""
  response = error.response()
  response.headers['connection'] = 'close'
  return response


def _shorten(record: logging.LogRecord) -> bool:
  """Shortens the text of a client in a line of the access log."""
  if isinstance(record.args, tuple):
    record.args = tuple(
      errors.printable(each) if isinstance(each, str) else each
      for each in record.args
    )
  return True
