"""Answers that end as soon as the client disconnects, whole or as a stream."""

import asyncio
from collections.abc import (
  AsyncGenerator,
  AsyncIterator,
  Awaitable,
  Callable,
  Coroutine,
)
import contextlib
import json
from typing import Any, Protocol, TypeVar

import fastapi
from fastapi import responses

from inference.server import engine_loop as engine_loop_lib
from inference.server.api import errors

CLIENT_CLOSED_REQUEST = 499  # as in nginx's log; the client cannot read it
# Clients of server-sent events skip a line that begins with a colon.
_PING = {'type': 'http.response.body', 'body': b': ping\n\n', 'more_body': True}
_PIECE = 10_000  # short entries of a list that are written at once
# `json.dumps` would make an encoder for each token.
event_json = json.JSONEncoder(allow_nan=False).encode

_Result = TypeVar('_Result')


class Updates(Protocol):
  """Updates of an answer, of one submission or of a search."""

  def __aiter__(self) -> AsyncIterator[engine_loop_lib.Item]: ...

  async def __anext__(self) -> engine_loop_lib.Item: ...

  def close(self) -> None:
    """Cancels the requests that have not ended."""
    ...


class EventStream(responses.StreamingResponse):
  """A stream that cancels its requests as soon as the client disconnects."""

  media_type = 'text/event-stream'

  def __init__(
    self,
    events: AsyncGenerator[str],
    updates: Updates,
    *,
    ping_seconds: float,
  ):
    """Takes the events to send.

    Args:
      events: events of the stream.
      updates: the updates that the events are made from.
      ping_seconds: after this time without an event, a comment is sent.
    """
    super().__init__(events)
    self._updates, self._ping_seconds = updates, ping_seconds

  async def __call__(self, scope, receive, send):
    # Closed here too: a generator that never started runs no `finally`.
    with contextlib.closing(self._updates):
      async with contextlib.aclosing(self.body_iterator):  # pyright: ignore
        await _until_left(receive, self._with_pings(send))

  async def _with_pings(self, send) -> None:
    """Sends the stream, and a comment whenever it is silent."""
    now = asyncio.get_running_loop().time
    turn, is_open, last = asyncio.Lock(), False, now()

    async def send_in_turn(message) -> None:
      nonlocal is_open, last
      async with turn:
        is_open = message.get('more_body', True)
        await send(message)
        last = now()

    async def ping() -> None:
      while True:
        await asyncio.sleep(last + self._ping_seconds - now())
        if is_open and not turn.locked() and now() >= last + self._ping_seconds:
          await send_in_turn(_PING)
        elif turn.locked():  # a slow reader
          await asyncio.sleep(self._ping_seconds)

    pinging = asyncio.create_task(ping())
    try:
      await self.stream_response(send_in_turn)
    finally:
      pinging.cancel()
      await asyncio.gather(pinging, return_exceptions=True)


async def events(
  chunks: AsyncGenerator[dict[str, Any]],
) -> AsyncGenerator[str]:
  """Yields server-sent events: one line of JSON each, then [DONE]."""
  try:
    async with contextlib.aclosing(chunks):
      async for chunk in chunks:
        yield f'data: {event_json(chunk)}\n\n'
  except Exception as error:
    # The status 200 is sent. Clients raise on an event with the key 'error'.
    yield f'data: {event_json(errors.failure(error).body())}\n\n'
  yield 'data: [DONE]\n\n'


async def unless_disconnected(
  request: fastapi.Request, work: Coroutine[Any, Any, responses.Response]
) -> responses.Response:
  """Awaits an answer, until the client disconnects."""
  try:
    answer = await _until_left(request.receive, work)
  except errors.ApiError:
    raise
  except Exception as error:
    return errors.failure(error).response()
  return answer or responses.Response(status_code=CLIENT_CLOSED_REQUEST)


async def _until_left(
  receive: Callable[[], Awaitable[Any]], work: Coroutine[Any, Any, _Result]
) -> _Result | None:
  """Returns the result of `work`; cancels it if the client disconnects."""

  async def left():
    # The body of the request has been read: the next message is a disconnect.
    while (await receive())['type'] != 'http.disconnect':
      pass

  tasks = working, _ = [asyncio.create_task(each) for each in (work, left())]
  try:
    await asyncio.wait(tasks, return_when=asyncio.FIRST_COMPLETED)
    return working.result() if working.done() else None
  finally:
    for task in tasks:
      task.cancel()
    await asyncio.wait(tasks)
    # An error of `work` holds this frame; the frame must not hold the error.
    del task, tasks, working, _


def written(body: dict[str, Any], *, piece: int = _PIECE) -> responses.Response:
  """Returns a body as JSON; other threads run while a long list is written.

  Args:
    body: the body to write.
    piece: entries of a list that are written at once.
  """
  parts = []
  for name, value in body.items():
    if isinstance(value, list):
      pieces = (
        _json(value[start : start + piece])[1:-1]
        for start in range(0, len(value), piece)
      )
      text = f'[{",".join(pieces)}]'
    else:
      text = _json(value)
    parts.append(f'{_json(name)}:{text}')
  return responses.Response(
    f'{{{",".join(parts)}}}', media_type='application/json'
  )


def _json(value: Any) -> str:
  return json.dumps(
    value, ensure_ascii=False, allow_nan=False, separators=(',', ':')
  )
