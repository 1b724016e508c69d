"""The HTTP server of life two, in the shapes of OpenAI's API.

    GET  /health            200 while the process can answer, 503 if it failed
    GET  /ready             503 until every program is compiled
    GET  /metrics           counters of the engine, as Prometheus collects them
    GET  /v1/models         the one model, with the lineage of its weights
    GET  /v1/models/{id}
    POST /v1/completions    JSON, or server-sent events with "stream": true
    GET  /tokenizer_info, POST /tokenize, POST /detokenize

A request is checked completely before the first byte of its answer, since the
status 200 of a stream cannot be taken back. A client that disconnects cancels
its request. Bodies are parsed, and text is tokenized, in the threads of
`inference.server.bodies`. With API keys, every route but /health and /ready
needs one. When the server stops, the digest of the weights is computed again
and compared with the digest in the manifest.

Chat completions would be another route like `complete`: `text.chat` renders the
messages, and a second form of `completions.Answer` writes the answer.
"""

import asyncio
from collections.abc import AsyncGenerator, Awaitable, Callable, Coroutine
import contextlib
import json
import logging
import time
from typing import Any, TypeVar
import uuid

import fastapi
from fastapi import responses
from starlette import (
  exceptions as starlette_exceptions,
  requests as starlette_requests,
)

from checks import expect
from frozen import manifest as manifest_lib
from inference import generate
from inference.engine import engine
from inference.server import (
  api_keys,
  bodies as bodies_lib,
  completions,
  engine_loop as engine_loop_lib,
  openapi,
  protocol,
  schema,
  server_config,
  tokenization,
  turns,
)

_LOG = logging.getLogger('uvicorn.error')
_CLIENT_CLOSED_REQUEST = 499  # as in nginx's log; the client cannot read it
_TokenizerRequest = TypeVar(
  '_TokenizerRequest', schema.TokenizeRequest, schema.DetokenizeRequest
)
_Result = TypeVar('_Result')
_PIECE = 10_000  # entries of a list that are written at once
# `json.dumps` would make an encoder for each token.
_event_json = json.JSONEncoder(allow_nan=False).encode
_METRICS_TYPE = 'text/plain; version=0.0.4; charset=utf-8'


def create_app(
  engine_loop: engine_loop_lib.EngineLoop,
  manifest: manifest_lib.Manifest,
  model_name: str,
  keys: api_keys.ApiKeys | api_keys.KeysFile | None = None,
  config: server_config.ServerConfig = server_config.ServerConfig(),
  *,
  context: int = 0,
) -> fastapi.FastAPI:
  """Returns the ASGI app that serves one model.

  Args:
    engine_loop: runs the engine; the app starts and closes it.
    manifest: of the model. The weights need not be loaded yet.
    model_name: name of the model in requests.
    keys: the keys of the clients that are answered; None: all clients.
    config: the limits on bodies.
    context: most tokens of a sequence; 0: those of the model.
  """
  bodies = bodies_lib.Bodies(config)

  async def end_requests():
    bodies.stop()
    await engine_loop.close()

  @contextlib.asynccontextmanager
  async def lifespan(_):
    engine_loop.start()
    yield
    await engine_loop.close()
    bodies.close()
    if engine_loop.generator:
      _report_digest(engine_loop.generator)

  app = fastapi.FastAPI(title='Two Lives', lifespan=lifespan)
  app.state.end_requests = end_requests
  app.add_middleware(api_keys.Authentication, keys=keys)
  app.add_middleware(protocol.Framing)
  app.add_middleware(turns.Turns)
  app.add_middleware(_RequestId)  # outermost, so that a 401 has an id too
  app.add_exception_handler(starlette_exceptions.HTTPException, _on_http)
  app.add_exception_handler(schema.ApiError, _on_api_error)
  app.add_exception_handler(starlette_requests.ClientDisconnect, _on_left)
  _add_probes(app, engine_loop)
  _add_models(app, manifest, model_name, context)
  _add_tokenizer(app, engine_loop, model_name, bodies)

  @app.post('/v1/completions')
  async def complete(request: fastapi.Request):
    generator = _generator(engine_loop)

    def prepared(raw: bytes) -> completions.Answer:
      body = schema.parsed(
        schema.CompletionRequest, raw, context=generator.engine.context
      )
      _check_model(body.model, model_name)
      body.check(is_shared=keys is not None)
      return completions.Answer(
        generator, body, principal=request.state.principal
      )

    answer = await bodies.worked(request, prepared)
    if answer.is_stream:
      updates = await _submit(engine_loop, answer)
      return _EventStream(_events(answer.chunks(updates)), updates)
    return await _unless_disconnected(
      request, _whole(engine_loop, answer, bodies)
    )

  described = openapi.document(app, has_keys=keys is not None)
  app.openapi = lambda: described
  return app


def _add_probes(
  app: fastapi.FastAPI, engine_loop: engine_loop_lib.EngineLoop
) -> None:
  def tell(is_good: bool) -> responses.Response:
    # Probes need no key (`api_keys.OPEN_PATHS`), so they learn only the state.
    status = {'status': 'ok' if is_good else engine_loop.state}
    return responses.JSONResponse(status, 200 if is_good else 503)

  @app.get('/health')
  async def health():
    return tell(engine_loop.state != engine_loop_lib.FAILED)

  @app.get('/ready')
  async def ready():
    return tell(engine_loop.state == engine_loop_lib.READY)

  @app.get('/metrics')
  async def metrics():
    text = _generator(engine_loop).engine.metrics.text()
    return responses.Response(text, media_type=_METRICS_TYPE)


def _add_models(
  app: fastapi.FastAPI,
  manifest: manifest_lib.Manifest,
  model_name: str,
  context: int,
) -> None:
  card = _model_card(manifest, model_name, context)

  @app.get('/v1/models')
  async def models():
    return {'object': 'list', 'data': [card]}

  @app.get('/v1/models/{name:path}')
  async def model(name: str):
    _check_model(name, model_name)
    return card


def _add_tokenizer(
  app: fastapi.FastAPI,
  engine_loop: engine_loop_lib.EngineLoop,
  model_name: str,
  bodies: bodies_lib.Bodies,
) -> None:
  def answered(
    kind: type[_TokenizerRequest],
    answer: Callable[[generate.Generator, _TokenizerRequest], dict[str, Any]],
  ) -> Callable[[bytes], responses.Response]:
    generator = _generator(engine_loop)

    def work(raw: bytes) -> responses.Response:
      body = schema.parsed(kind, raw, context=generator.engine.context)
      _check_model(body.model or model_name, model_name)
      return _written(answer(generator, body))

    return work

  @app.get('/tokenizer_info')
  async def tokenizer_info():
    return tokenization.info(_generator(engine_loop))

  @app.post('/tokenize')
  async def tokenize(request: fastapi.Request):
    work = answered(schema.TokenizeRequest, tokenization.tokenize)
    return await bodies.worked(request, work)

  @app.post('/detokenize')
  async def detokenize(request: fastapi.Request):
    work = answered(schema.DetokenizeRequest, tokenization.detokenize)
    return await bodies.worked(request, work)


def _model_card(
  manifest: manifest_lib.Manifest, model_name: str, context: int
) -> dict[str, Any]:
  return {
    'id': model_name,
    'object': 'model',
    'created': int(time.time()),  # when this server began to load it
    'owned_by': 'two-lives',
    'max_model_len': context or manifest.model['max_length'],
    'lineage': {
      'weights_digest': manifest.weights_digest,
      'num_params': manifest.num_params,
      'dtype': manifest.dtype,
      'experiment': manifest.name,
      'step': manifest.step,
      'tokens_seen': manifest.tokens_seen,
      'code_commit': manifest.code_commit,
      'knowledge_cutoff': manifest.knowledge_cutoff,
      'parents': manifest.lineage,
    },
  }


def _check_model(name: str, model_name: str) -> None:
  if name != model_name:
    raise schema.ApiError(
      404,
      f'model: got {expect.shown(name)}, expected {model_name!r}, the model'
      ' served here',
      param='model',
      code='model_not_found',
    )


def _generator(engine_loop: engine_loop_lib.EngineLoop) -> generate.Generator:
  """Returns the loaded generator.

  Raises:
    ApiError: status 503, the model still loads, or the engine has stopped.
  """
  if engine_loop.state != engine_loop_lib.READY or not engine_loop.generator:
    if engine_loop.state == engine_loop_lib.STOPPED:
      raise schema.stopping()
    raise schema.ApiError(
      503,
      f'the server is not ready: {engine_loop.state}; ask /ready',
      param=None,
      code='not_ready',
    )
  return engine_loop.generator


def _report_digest(generator: generate.Generator) -> None:
  expected = generator.frozen.manifest.weights_digest
  digest = generator.weights_digest()
  if digest == expected:
    _LOG.info('weights %s: unchanged', digest)
  else:
    _LOG.error('weights %s: CHANGED, were %s', digest, expected)


async def _submit(
  engine_loop: engine_loop_lib.EngineLoop, answer: completions.Answer
) -> engine_loop_lib.Updates:
  try:
    return await engine_loop.submit(answer.requests)
  except engine.Overloaded as error:
    raise schema.ApiError(
      429, str(error), param=None, code='overloaded'
    ) from error
  except ValueError as error:
    raise completions.refused_prompt(error) from error
  except (engine_loop_lib.Failed, engine_loop_lib.Stopped) as error:
    raise _failure(error) from error


async def _whole(
  engine_loop: engine_loop_lib.EngineLoop,
  answer: completions.Answer,
  bodies: bodies_lib.Bodies,
) -> responses.Response:
  updates = await _submit(engine_loop, answer)
  with contextlib.closing(updates):
    await answer.finish(updates)

  def written() -> responses.Response:
    return _written(answer.whole())

  return await bodies.in_thread(written, size=answer.size)


def _written(body: dict[str, Any]) -> responses.Response:
  """Returns a body as JSON; other threads run while a long list is written."""
  parts = []
  for name, value in body.items():
    if isinstance(value, list):
      pieces = (
        _json(value[start : start + _PIECE])[1:-1]
        for start in range(0, len(value), _PIECE)
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


async def _unless_disconnected(
  request: fastapi.Request, work: Coroutine[Any, Any, responses.Response]
) -> responses.Response:
  """Awaits an answer, until the client disconnects."""
  try:
    answer = await _until_left(request.receive, work)
  except schema.ApiError:
    raise
  except Exception as error:
    return _failure(error).response()
  return answer or responses.Response(status_code=_CLIENT_CLOSED_REQUEST)


async def _until_left(
  receive: Callable[[], Awaitable[Any]], work: Coroutine[Any, Any, _Result]
) -> _Result | None:
  """Returns what `work` returns; cancels it if the client disconnects."""

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


async def _events(
  chunks: AsyncGenerator[dict[str, Any]],
) -> AsyncGenerator[str]:
  """Yields server-sent events: one line of JSON each, then [DONE]."""
  try:
    async with contextlib.aclosing(chunks):
      async for chunk in chunks:
        yield f'data: {_event_json(chunk)}\n\n'
  except Exception as error:
    # The status 200 is sent. Clients raise on an event with the key 'error'.
    yield f'data: {_event_json(_failure(error).body())}\n\n'
  yield 'data: [DONE]\n\n'


class _EventStream(responses.StreamingResponse):
  """A stream that cancels its requests as soon as the client disconnects."""

  media_type = 'text/event-stream'

  def __init__(
    self, events: AsyncGenerator[str], updates: engine_loop_lib.Updates
  ):
    super().__init__(events)
    self._updates = updates

  async def __call__(self, scope, receive, send):
    # Closed here too: a generator that never started runs no `finally`.
    with contextlib.closing(self._updates):
      async with contextlib.aclosing(self.body_iterator):  # pyright: ignore
        await _until_left(receive, self.stream_response(send))


class _RequestId:
  """ASGI middleware: adds an `x-request-id`, which clients show in errors."""

  def __init__(self, app):
    self._app = app

  async def __call__(self, scope, receive, send):
    name = f'req_{uuid.uuid4().hex}'.encode()

    async def send_with_id(message):
      if message['type'] == 'http.response.start':
        message['headers'] = [*message['headers'], (b'x-request-id', name)]
      await send(message)

    await self._app(scope, receive, send_with_id)


async def _on_http(_, error):
  response = schema.ApiError(
    error.status_code, error.detail, param=None, code=None
  ).response()
  response.headers.update(error.headers or {})  # `allow` of a 405
  return response


async def _on_left(*_):
  return responses.Response(status_code=_CLIENT_CLOSED_REQUEST)


async def _on_api_error(_, error):
  return error.response()


def _failure(error: Exception) -> schema.ApiError:
  """Logs an error of the server; returns an answer without its details."""
  if isinstance(error, engine_loop_lib.Stopped):
    return schema.stopping()
  if not isinstance(error, engine_loop_lib.Failed):  # logged by the loop
    _LOG.error('generation failed', exc_info=error)
  return schema.ApiError(
    500, 'the generation failed; see the server log', param=None, code=None
  )
