"""The exchange: the request that is being answered, for all code that runs.

    exchange = exchanges.current()
    exchange.at_end(model.release)

It is a context variable, because work for a request starts in many places, and
each must know the sender. Middleware, a route, the threads of `http.bodies` and
the tasks of a route all see the same exchange. It ends when the last byte of
its answer is made, or when its client has left.
"""

from collections.abc import Callable
import contextvars
import threading
from typing import Any
import uuid

from inference.server.access import keys

CONVERSATION = b'x-conversation-id'
_MOST_CHARACTERS = 256  # of a conversation's id; further ones are not read

_current: contextvars.ContextVar['Exchange'] = contextvars.ContextVar(
  'exchange'
)


class Exchange:
  """One request and its answer."""

  def __init__(self, scope: Any):
    """Takes the ASGI scope of the request, or {} outside of any request."""
    self._state = scope.setdefault('state', {})
    self._state.setdefault('request_id', f'req_{uuid.uuid4().hex}')
    self._headers = scope.get('headers', ())
    # Digest of principal, Idempotency-Key and body; '' without that header.
    self.idempotency = ''
    self.answer_headers: dict[bytes, bytes] = {}
    # Headers of the key's limits now. They are not part of an answer that is
    # kept to be sent again.
    self.limit_headers: dict[str, str] = {}
    self.shadows: list[Any] = []  # models that get a copy of the requests
    self._at_end: list[Callable[[], object]] = []
    self._is_over = False
    self._lock = threading.Lock()

  def at_end(self, call: Callable[[], object]) -> None:
    """Registers a call for the end; calls it now if the exchange is over.

    A thread may still work for a client that has left.
    """
    with self._lock:
      if not self._is_over:
        self._at_end.append(call)
        return
    call()

  def end(self) -> None:
    """Calls the functions of `at_end`."""
    with self._lock:
      self._is_over = True
    while self._at_end:
      self._at_end.pop()()

  @property
  def request_id(self) -> str:
    """Its id, the value of the header `x-request-id`."""
    return self._state['request_id']

  @property
  def principal(self) -> str:
    """The sender, known by its key and not by the body; '' without keys."""
    return self._state.get('principal', '')

  @property
  def key(self) -> keys.Key | None:
    """The key of the sender; None without keys."""
    return self._state.get('key')

  @property
  def conversation(self) -> str:
    """The conversation that the client names, or ''."""
    for name, value in self._headers:
      if name == CONVERSATION:
        return value.decode('latin-1')[:_MOST_CHARACTERS]
    return ''

  def answer_id(self, prefix: str) -> str:
    """Returns the id of the answer: the hex digits of the request's id."""
    return f'{prefix}{self.request_id.rpartition("_")[2]}'


def current() -> Exchange:
  """Returns the exchange of the calling code; outside of any, an ended one."""
  found = _current.get(None)
  if found is None:
    found = Exchange({})
    found.end()
  return found


def begin(exchange: Exchange) -> None:
  """Sets the exchange of this task, and of the tasks that it starts."""
  _current.set(exchange)


class Exchanges:
  """ASGI middleware, the outermost: makes the exchange of each request.

  Every answer, also a 401, has the header `x-request-id`, which clients show in
  errors.
  """

  def __init__(self, app):
    self._app = app

  async def __call__(self, scope, receive, send):
    if scope['type'] != 'http':
      await self._app(scope, receive, send)
      return
    exchange = Exchange(scope)
    begin(exchange)

    async def send_with_headers(message):
      if message['type'] == 'http.response.start':
        message['headers'] = [
          *message['headers'],
          (b'x-request-id', exchange.request_id.encode()),
          *(
            (k.encode(), v.encode()) for k, v in exchange.limit_headers.items()
          ),
        ]
      await send(message)

    await self._app(scope, receive, send_with_headers)


class Ends:
  """ASGI middleware, the innermost: ends the exchange of each request.

  It is within `access.idempotency`, whose requests outlive their clients.
  """

  def __init__(self, app):
    self._app = app

  async def __call__(self, scope, receive, send):
    if scope['type'] != 'http':
      await self._app(scope, receive, send)
      return
    exchange = current()

    async def send_with_headers(message):
      if message['type'] == 'http.response.start':
        added = exchange.answer_headers.items()
        message['headers'] = [*message['headers'], *added]
      await send(message)

    try:
      await self._app(scope, receive, send_with_headers)
    finally:
      exchange.end()
