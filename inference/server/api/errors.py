"""The errors that clients get, in OpenAI's shape."""

from collections.abc import Sequence
import logging
from typing import Any

from fastapi import responses

from checks import expect
from inference.requests import requests
from inference.server import engine_loop

RETRIED = 429, 503
_RETRY_AFTER_SECONDS = 1
_TYPES = {
  401: 'authentication_error',
  403: 'permission_error',
  429: 'rate_limit_error',
}
# The rest of the body of such a request is not waited for.
_CLOSES = 408, 413
_MOST_MESSAGE = 1000  # characters of an error, whatever it repeats
_LOG = logging.getLogger('uvicorn.error')


class ApiError(Exception):
  """An error that is sent to the client, in OpenAI's shape."""

  def __init__(
    self, status: int, message: str, *, param: str | None, code: str | None
  ):
    super().__init__(printable(message, _MOST_MESSAGE))
    self.status = status
    self.param = param and printable(param)
    self.code = code
    by_status = 'server_error' if status >= 500 else 'invalid_request_error'
    self.type = _TYPES.get(status, by_status)
    self.headers: dict[str, str] = {}  # of the answer
    if status in RETRIED:
      self.headers['retry-after'] = str(_RETRY_AFTER_SECONDS)

  def body(self) -> dict[str, Any]:
    """Returns the JSON body."""
    return {
      'error': {
        'message': str(self),
        'type': self.type,
        'param': self.param,
        'code': self.code,
      }
    }

  def response(self) -> responses.JSONResponse:
    """Returns the answer; its header `retry-after` makes clients retry."""
    headers = dict(self.headers)
    if self.status == 401:
      headers['www-authenticate'] = 'Bearer'
    if self.status in _CLOSES:
      headers['connection'] = 'close'
    return responses.JSONResponse(self.body(), self.status, headers)


def invalid(param: str, message: str) -> ApiError:
  """Returns a 400 about the value of one field."""
  return ApiError(400, f'{param}: {message}', param=param, code=None)


def refused_prompt(error: Exception, param: str = 'prompt') -> ApiError:
  """Returns a 400 about a prompt that the engine could never answer.

  Its code is OpenAI's where the prompt is too long: clients look for it, to
  send less of a conversation.
  """
  found = invalid(param, str(error).removeprefix('prompt: '))
  if isinstance(error, requests.TooLong):
    found.code = 'context_length_exceeded'
  return found


def no_model(name: str, known: Sequence[str]) -> ApiError:
  """Returns a 404 about a name that no model has."""
  return ApiError(
    404,
    f'model: got {expect.shown(name)}, expected'
    f' {" or ".join(map(repr, known)) or "none"}, as GET /v1/models lists',
    param='model',
    code='model_not_found',
  )


def stopping() -> ApiError:
  """Returns a 503 for a request that the server will not finish."""
  return ApiError(
    503, 'the server is stopping; try again', param=None, code='stopped'
  )


def failure(error: Exception) -> ApiError:
  """Logs an error of the server; returns an answer without its details."""
  if isinstance(error, engine_loop.Stopped):
    return stopping()
  if not isinstance(error, engine_loop.Failed):  # logged by the loop
    _LOG.error('generation failed', exc_info=error)
  return ApiError(
    500, 'the generation failed; see the server log', param=None, code=None
  )


def printable(text: str, most: int = expect.MOST_SHOWN) -> str:
  """Returns a text as one line of at most `most` characters."""
  shown = ''.join(
    c if c.isprintable() else repr(c)[1:-1] for c in text[: most + 1]
  )
  return shown if len(shown) <= most else f'{shown[: most - 3]}...'
