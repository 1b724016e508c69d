"""From a checked request for text to its answer, whole or streamed."""

from collections.abc import AsyncGenerator, Awaitable, Callable
import contextlib
import functools
from typing import Any, Protocol, TypeVar

import fastapi
from fastapi import responses

from inference.requests import requests as requests_lib
from inference.server import service as service_lib
from inference.server.http import streams


class Answer(Protocol):
  """A checked request, and later its answer; see `inference.server.answers`."""

  requests: list[requests_lib.Request]

  @property
  def is_stream(self) -> bool:
    """Whether the client wants chunks."""
    ...

  @property
  def size(self) -> int:
    """Entries of a finished answer."""
    ...

  async def finish(self, updates: streams.Updates) -> None:
    """Waits for an answer that is not streamed."""
    ...

  def whole(self) -> dict[str, Any]:
    """Returns the body of an answer that is finished."""
    ...

  def chunks(self, updates: streams.Updates) -> AsyncGenerator[dict[str, Any]]:
    """Yields the chunks of a stream."""
    ...


_Made = TypeVar('_Made')
# Submits an answer: to the engine, or to a search.
Submit = Callable[[], Awaitable[streams.Updates]]


async def compiled(
  service: service_lib.Service, made: _Made | functools.partial[_Made]
) -> _Made:
  """Returns an answer; if it is not made yet, its grammar is compiled first."""
  if not isinstance(made, functools.partial):
    return made
  return await service.bodies.compiled(made)


async def answered(
  request: fastapi.Request,
  service: service_lib.Service,
  submit: Submit,
  answer: Answer,
) -> responses.Response:
  """Submits the requests of an answer; returns its body, or its stream.

  Raises:
    ApiError: no request is answered; see `ServedModel.submit`.
  """
  if answer.is_stream:
    updates = await submit()
    return streams.EventStream(
      streams.events(answer.chunks(updates)),
      updates,
      ping_seconds=service.config.ping_seconds,
    )
  return await streams.unless_disconnected(
    request, _whole(service, submit, answer)
  )


async def _whole(
  service: service_lib.Service,
  submit: Submit,
  answer: Answer,
) -> responses.Response:
  updates = await submit()
  with contextlib.closing(updates):
    await answer.finish(updates)

  def written() -> responses.Response:
    return streams.written(answer.whole())

  return await service.bodies.in_thread(written, size=answer.size)
