"""Idempotency-Key: a request that is sent again is answered, and billed, once.

A POST with this header runs to its end, even if its client leaves: the same
request, sent again, joins it or gets its answer, byte for byte, with the header
`idempotency-replayed: true`. The same key of the same principal with another
body is refused with 409.

Answers with status 200 are kept in memory for a day, or until newer answers
need the room; they are never written to disk. After that, or after a restart,
the request is computed again: the ledger knows it by a digest for a day, and
bills only the amount by which it costs more than before. Other answers are not
kept, so that a client can try again after an error.

Reference: draft-ietf-httpapi-idempotency-key-header; Stripe's API.
"""

import asyncio
import collections
import hashlib
import time

from starlette import datastructures, requests

from checks import expect
from inference.server.api import errors
from inference.server.http import bodies as bodies_lib, exchanges
from inference.server.records import ledger

_MOST_BYTES = 64 * 2**20  # bytes of all answers that are kept
_MOST_NAME = 255  # characters
_OVERHEAD = 1024  # bytes of an answer besides its text
_REPLAYED = (b'idempotency-replayed', b'true')

_Whose = tuple[str, ...]  # principal, path, Idempotency-Key


class _Answer:
  """The messages of an answer, made once and read by several clients."""

  def __init__(self, digest: str):
    self.digest, self.status = digest, 0
    self.num_bytes = _OVERHEAD
    self.ended_at: float | None = None
    self._messages: list[dict] = []
    self._more = asyncio.Event()

  async def take(self, message) -> None:
    """Takes the next message of the app."""
    self.status = message.get('status', self.status)
    self.num_bytes += len(message.get('body', b''))
    self._messages.append(message)
    self._wake()

  def end(self) -> None:
    """Notes that no message follows."""
    self.ended_at = time.monotonic()
    self._wake()

  async def send_to(self, send, *, is_replayed: bool) -> None:
    """Sends all messages: past ones at once, later ones as they arrive."""
    num = 0
    while num < len(self._messages) or self.ended_at is None:
      if num == len(self._messages):
        await self._more.wait()
        continue
      message = self._messages[num]
      num += 1
      if is_replayed and message['type'] == 'http.response.start':
        message = {**message, 'headers': [*message['headers'], _REPLAYED]}
      await send(message)

  def _wake(self) -> None:
    self._more.set()  # wakes all that wait
    self._more = asyncio.Event()


class Idempotency:
  """ASGI middleware: keeps answers, and gives them to repeated requests."""

  def __init__(self, app, bodies: bodies_lib.Bodies):
    self._app, self._bodies = app, bodies
    self._running: dict[_Whose, _Answer] = {}
    self._kept: collections.OrderedDict[_Whose, _Answer] = (
      collections.OrderedDict()  # in the order in which they ended
    )
    self._num_bytes = 0  # of the kept answers
    self._tasks: set[asyncio.Task[None]] = set()  # else nothing refers to them

  async def __call__(self, scope, receive, send):
    name = None
    if scope['type'] == 'http' and scope['method'] == 'POST':
      name = datastructures.Headers(scope=scope).get('idempotency-key')
    if name is None:
      await self._app(scope, receive, send)
      return
    try:
      _check_name(name)
      body = await self._bodies.read(requests.Request(scope, receive))
      whose = scope['state']['principal'], scope['path'], name
      answer, is_new = self._answer(whose, body, scope)
    except errors.ApiError as error:
      await error.response()(scope, receive, send)
      return
    await answer.send_to(send, is_replayed=not is_new)

  def _answer(self, whose: _Whose, body: bytes, scope) -> tuple[_Answer, bool]:
    """Returns the answer to a request, and whether this call begins it."""
    digest = hashlib.sha256('\0'.join([*whose, '']).encode() + body).hexdigest()
    self._forget()
    answer = self._running.get(whose) or self._kept.get(whose)
    if answer is None:
      answer = self._running[whose] = _Answer(digest)
      exchanges.current().idempotency = digest
      task = asyncio.create_task(self._run(whose, answer, scope, body))
      self._tasks.add(task)
      task.add_done_callback(self._tasks.discard)
      return answer, True
    if answer.digest != digest:
      raise _other_body()
    return answer, False

  async def _run(
    self, whose: _Whose, answer: _Answer, scope, body: bytes
  ) -> None:
    parts = [{'type': 'http.request', 'body': body, 'more_body': False}]

    async def receive():
      if parts:
        return parts.pop()
      # A client that leaves does not end the request: another may ask for it.
      return await asyncio.get_running_loop().create_future()

    try:
      await self._app(scope, receive, answer.take)
    except Exception as error:
      if answer.status:
        raise  # in the middle of a body: its clients see that it is cut off
      await errors.failure(error).response()(scope, receive, answer.take)
    finally:
      del self._running[whose]
      if answer.status == 200:
        self._kept[whose] = answer
        self._num_bytes += answer.num_bytes
      answer.end()

  def _forget(self) -> None:
    """Drops answers that are too old, and the oldest beyond `_MOST_BYTES`."""
    least = time.monotonic() - ledger.REMEMBERED_SECONDS
    while self._kept:
      oldest = next(iter(self._kept.values()))
      assert oldest.ended_at is not None
      if oldest.ended_at >= least and self._num_bytes <= _MOST_BYTES:
        return
      self._kept.popitem(last=False)
      self._num_bytes -= oldest.num_bytes


def _check_name(name: str) -> None:
  if not 0 < len(name) <= _MOST_NAME or not name.isprintable():
    raise errors.ApiError(
      400,
      f'idempotency-key: got {expect.shown(name)}, expected 1 to {_MOST_NAME}'
      ' printable characters; a random UUID is a good key',
      param=None,
      code=None,
    )


def _other_body() -> errors.ApiError:
  error = errors.ApiError(
    409,
    'idempotency-key: got a key that was used with another body, expected a new'
    ' key for each request; send this request with another key',
    param=None,
    code='idempotency_key_reused',
  )
  error.headers['x-should-retry'] = 'false'  # OpenAI's clients retry a 409
  return error
