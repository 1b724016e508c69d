"""The HTTP face of life two, in the shapes of OpenAI's API.

    GET  /health            200 while the process can answer
    GET  /v1/models         the one model, with the lineage of its weights
    GET  /v1/models/{id}
    POST /v1/completions    JSON, or server-sent events with "stream": true

A request is checked whole before the first byte of an answer: the 200 of a
stream cannot be taken back. The weights' digest is computed again when the
server stops, and has to be the one it started with.
"""

import asyncio
from collections.abc import AsyncGenerator
import contextlib
import json
import logging
import time
from typing import Any
import uuid

import fastapi
from fastapi import exceptions, responses
from starlette import exceptions as starlette_exceptions

from frozen import format as frozen_format
from inference import generate
from inference.server import completions, schema, worker as worker_lib

_LOG = logging.getLogger('uvicorn.error')
_DISCONNECT_POLL_SECONDS = 0.2
_CLIENT_CLOSED_REQUEST = 499  # nginx's; nobody is there to read it


def create_app(
  generator: generate.Generator, model_name: str
) -> fastapi.FastAPI:
  """Returns the ASGI app that answers with `generator` as `model_name`."""
  worker = worker_lib.Worker()
  card = _model_card(generator, model_name)

  @contextlib.asynccontextmanager
  async def lifespan(_):
    yield
    worker.close()
    _report_digest(generator.frozen)

  app = fastapi.FastAPI(title='Two Lives', lifespan=lifespan)
  app.add_middleware(_RequestId)
  app.add_exception_handler(exceptions.RequestValidationError, _on_validation)
  app.add_exception_handler(starlette_exceptions.HTTPException, _on_http)
  app.add_exception_handler(schema.ApiError, _on_api_error)

  def check_model(name: str) -> None:
    if name != model_name:
      raise schema.ApiError(
        404,
        f'model: got {name!r}, expected {model_name!r}, the model served here',
        param='model',
        code='model_not_found',
      )

  @app.get('/health')
  async def health():
    return {'status': 'ok'}

  @app.get('/v1/models')
  async def models():
    return {'object': 'list', 'data': [card]}

  @app.get('/v1/models/{name:path}')
  async def model(name: str):
    check_model(name)
    return card

  @app.post('/v1/completions')
  async def complete(body: schema.CompletionRequest, request: fastapi.Request):
    check_model(body.model)
    body.check()
    answer = completions.Answer(generator, body)
    updates = worker.run(answer.start())
    if body.stream:
      return _EventStream(_events(answer.chunks(updates)))
    return await _unless_disconnected(request, answer.whole(updates))

  return app


def _model_card(
  generator: generate.Generator, model_name: str
) -> dict[str, Any]:
  manifest = generator.frozen.manifest
  return {
    'id': model_name,
    'object': 'model',
    'created': int(time.time()),  # when this server loaded it
    'owned_by': 'two-lives',
    'max_model_len': generator.frozen.config.max_length,
    'lineage': {
      'weights_digest': manifest.weights_digest,
      'num_params': manifest.num_params,
      'dtype': manifest.dtype,
      'experiment': manifest.experiment,
      'step': manifest.step,
      'tokens_seen': manifest.tokens_seen,
      'code_commit': manifest.code_commit,
      'knowledge_cutoff': manifest.knowledge_cutoff,
      'parents': manifest.lineage,
    },
  }


def _report_digest(frozen: frozen_format.Frozen) -> None:
  expected = frozen.manifest.weights_digest
  digest = frozen_format.weights_digest(frozen.params)
  if digest == expected:
    _LOG.info('weights %s: unchanged', digest)
  else:
    _LOG.error('weights %s: CHANGED, were %s', digest, expected)


async def _unless_disconnected(request: fastapi.Request, work):
  """Awaits the body of an answer, but gives up when the client does."""

  async def disconnected():
    while not await request.is_disconnected():
      await asyncio.sleep(_DISCONNECT_POLL_SECONDS)

  working = asyncio.create_task(work)
  watching = asyncio.create_task(disconnected())
  try:
    await asyncio.wait({working, watching}, return_when=asyncio.FIRST_COMPLETED)
    if not working.done():
      return responses.Response(status_code=_CLIENT_CLOSED_REQUEST)
    return responses.JSONResponse(working.result())
  except schema.ApiError:
    raise
  except Exception as error:
    return _error_response(_failure(error))
  finally:
    working.cancel()
    watching.cancel()


async def _events(
  chunks: AsyncGenerator[dict[str, Any]],
) -> AsyncGenerator[str]:
  """Yields server-sent events: LF only, one line of JSON each, then [DONE]."""
  try:
    async with contextlib.aclosing(chunks):
      async for chunk in chunks:
        yield f'data: {json.dumps(chunk)}\n\n'
  except Exception as error:
    # The 200 is out: clients raise on an event with an 'error'.
    yield f'data: {json.dumps(_failure(error).body())}\n\n'
  yield 'data: [DONE]\n\n'


class _EventStream(responses.StreamingResponse):
  """A stream that stops what feeds it as soon as the client is gone."""

  media_type = 'text/event-stream'

  async def __call__(self, scope, receive, send):
    async with contextlib.aclosing(self.body_iterator):  # pyright: ignore
      await super().__call__(scope, receive, send)


class _RequestId:
  """Gives every answer an `x-request-id`, which clients put into errors."""

  def __init__(self, app):
    self._app = app

  async def __call__(self, scope, receive, send):
    name = f'req_{uuid.uuid4().hex}'.encode()

    async def send_with_id(message):
      if message['type'] == 'http.response.start':
        message['headers'] = [*message['headers'], (b'x-request-id', name)]
      await send(message)

    await self._app(scope, receive, send_with_id)


async def _on_validation(_, error):
  return _error_response(schema.from_validation(error.errors()))


async def _on_http(_, error):
  return _error_response(
    schema.ApiError(error.status_code, error.detail, param=None, code=None)
  )


async def _on_api_error(_, error):
  return _error_response(error)


def _failure(error: Exception) -> schema.ApiError:
  """Logs a fault of ours and returns what the client may know of it."""
  _LOG.error('generation failed', exc_info=error)
  return schema.ApiError(
    500, 'the generation failed; see the server log', param=None, code=None
  )


def _error_response(error: schema.ApiError) -> responses.JSONResponse:
  return responses.JSONResponse(error.body(), status_code=error.status)
