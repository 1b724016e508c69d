"""Hands HTTP requests on to a server, and streams its answers back."""

from collections.abc import AsyncIterator, Callable

import fastapi
from fastapi import responses
import httpx2

METHODS = 'GET', 'POST', 'PUT', 'PATCH', 'DELETE', 'HEAD', 'OPTIONS'
# RFC 9110, section 7.6.1: of one connection, not of the message.
_OF_A_CONNECTION = frozenset(
  {
    'connection', 'keep-alive', 'proxy-connection', 'te', 'trailer',
    'transfer-encoding', 'upgrade',
  }
)  # fmt: skip
_OF_THE_LISTENER = frozenset({'date', 'server'})  # the one in front sets them


class Forwarder:
  """Forwards requests to one server, which enforces limits and time-outs."""

  def __init__(self, url: Callable[[], str]):
    """Takes a function that returns the address of the server."""
    self._url = url
    self._client: httpx2.AsyncClient | None = None

  async def forward(self, request: fastapi.Request) -> fastapi.Response:
    """Returns the server's answer to a request; 503 without a server.

    A client that leaves ends the request at the server, too.
    """
    if self._client is None:  # in the event loop that it is used in
      self._client = httpx2.AsyncClient(
        timeout=None, limits=httpx2.Limits(max_connections=None)
      )
    path = request.scope['raw_path'].decode('ascii')
    query = request.scope['query_string'].decode('ascii')
    sent = self._client.build_request(
      request.method,
      f'{self._url()}{path}{"?" * bool(query)}{query}',
      headers=_kept(request.headers.raw),
      content=request.stream() if _has_body(request) else None,
    )
    try:
      answer = await self._client.send(sent, stream=True)
    except httpx2.TransportError:
      return responses.JSONResponse(
        {
          'error': {
            'message': 'the server of this replica does not answer',
            'type': 'service_unavailable_error',
            'param': None,
            'code': None,
          }
        },
        503,
        {'Retry-After': '1'},
      )
    found = responses.StreamingResponse(_body(answer), answer.status_code)
    found.raw_headers = _kept(answer.headers.raw, _OF_THE_LISTENER)
    return found

  async def close(self) -> None:
    """Closes the connections to the server."""
    if self._client:
      await self._client.aclose()


def _has_body(request: fastapi.Request) -> bool:
  names = 'content-length', 'transfer-encoding'
  return any(name in request.headers for name in names)


def _kept(
  headers: list[tuple[bytes, bytes]], others: frozenset[str] = frozenset()
) -> list[tuple[bytes, bytes]]:
  """Returns the headers that belong to a message, without `others`."""
  named = {
    each.strip().lower()
    for name, value in headers
    if name.lower() == b'connection'
    for each in value.decode('latin-1').split(',')
  }
  dropped = _OF_A_CONNECTION | named | others
  return [
    (name, value)
    for name, value in headers
    if name.decode('latin-1').lower() not in dropped
  ]


async def _body(answer: httpx2.Response) -> AsyncIterator[bytes]:
  try:
    async for piece in answer.aiter_raw():
      yield piece
  finally:
    await answer.aclose()
