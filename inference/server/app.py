"""The HTTP server of life two, in the shapes of OpenAI's API.

    GET  /health            200 while the process can answer, 503 if it failed
    GET  /ready             503 until every program is compiled
    GET  /metrics           counters of the engine, as Prometheus collects them
    GET  /v1/models         the one model, with the lineage of its weights
    GET  /v1/models/{id}
    POST /v1/responses      items in, items out; stored, to be continued
    GET, DELETE /v1/responses/{id}, GET /v1/responses/{id}/input_items
    GET  /v1/capabilities   every parameter of every route
    POST /v1/completions    JSON, or server-sent events with "stream": true
    POST /v1/chat/completions    a conversation, by the model's chat template
    POST /v1/embeddings     a vector per input
    GET  /tokenizer_info, POST /tokenize, POST /detokenize

    http/      bytes: connections, bodies within limits, streams that can end
    access/    who sends a request
    api/       the words: bodies, errors, shapes of answers, OpenAPI document
    routes/    a file per group of routes, which reads bodies and submits
    answers/   from a checked body to the requests of the engine, and back
    records/   the SQLite file, for all that outlives a request

A request is checked completely before the first byte of its answer, since the
status 200 of a stream cannot be taken back. A client that disconnects cancels
its request. Bodies are parsed, and text is tokenized, in the threads of
`http.bodies`. With API keys, every route but /health and /ready needs one. When
the server stops, the digest of the weights is computed again and compared with
the digest in the manifest.

A new route is a function in `routes/`, and its lines in `api/openapi.py`.
"""

import contextlib
import logging
import uuid

import fastapi
from fastapi import responses
from starlette import (
  exceptions as starlette_exceptions,
  requests as starlette_requests,
  routing,
)

from frozen import manifest as manifest_lib
from inference import generate
from inference.server import (
  engine_loop as engine_loop_lib,
  server_config,
  service as service_lib,
)
from inference.server.access import api_keys
from inference.server.api import errors, openapi
from inference.server.http import bodies as bodies_lib, protocol, streams, turns
from inference.server.records import database, responses as responses_store
from inference.server.routes import (
  capabilities,
  chat,
  completions,
  embeddings,
  models,
  probes,
  responses as responses_routes,
  tokenizer,
)

_LOG = logging.getLogger('uvicorn.error')
# Of every module that keeps records.
TABLES: tuple[str, ...] = (responses_store.TABLES,)
_ROUTES = (
  probes,
  models,
  tokenizer,
  completions,
  chat,
  embeddings,
  responses_routes,
  capabilities,
)


def create_app(
  engine_loop: engine_loop_lib.EngineLoop,
  manifest: manifest_lib.Manifest,
  model_name: str,
  keys: api_keys.ApiKeys | api_keys.KeysFile | None = None,
  config: server_config.ServerConfig = server_config.ServerConfig(),
  *,
  context: int = 0,
  records: database.Database | None = None,
) -> fastapi.FastAPI:
  """Returns the ASGI app that serves one model.

  Args:
    engine_loop: runs the engine; the app starts and closes it.
    manifest: of the model. The weights need not be loaded yet.
    model_name: name of the model in requests.
    keys: the keys of the clients that are answered; None: all clients.
    config: the limits on bodies.
    context: most tokens of a sequence; 0: those of the model.
    records: opened with `TABLES`, and closed by the app; None: in memory.
  """
  records = records or database.Database(None, tables=TABLES)
  model = service_lib.ServedModel(
    model_name,
    engine_loop,
    manifest,
    context=context or manifest.model['max_length'],
  )
  bodies = bodies_lib.Bodies(config)
  store = responses_store.Store(
    records,
    days=config.store_days,
    most_bytes=config.store_mebibytes * 2**20,
  )
  service = service_lib.Service(
    model=model,
    bodies=bodies,
    records=records,
    store=store,
    config=config,
    has_keys=keys is not None,
  )

  async def end_requests():
    bodies.stop()
    await engine_loop.close()

  @contextlib.asynccontextmanager
  async def lifespan(_):
    engine_loop.start()
    async with store.expiring():
      yield
    await engine_loop.close()
    bodies.close()
    records.close()
    if engine_loop.generator:
      _report_digest(engine_loop.generator)

  app = fastapi.FastAPI(title='Two Lives', lifespan=lifespan)
  app.state.end_requests = end_requests
  app.add_middleware(_Failures)
  app.add_middleware(api_keys.Authentication, keys=keys)
  app.add_middleware(protocol.Framing)
  app.add_middleware(turns.Turns)
  app.add_middleware(_RequestId)  # outermost, so that a 401 has an id too
  app.add_exception_handler(starlette_exceptions.HTTPException, _on_http)
  app.add_exception_handler(errors.ApiError, _on_api_error)
  app.add_exception_handler(starlette_requests.ClientDisconnect, _on_left)
  for routes in _ROUTES:
    routes.add(app, service)
  described = openapi.document(app, has_keys=keys is not None)
  app.openapi = lambda: described
  return app


def _report_digest(generator: generate.Generator) -> None:
  expected = generator.frozen.manifest.weights_digest
  digest = generator.weights_digest()
  if digest == expected:
    _LOG.info('weights %s: unchanged', digest)
  else:
    _LOG.error('weights %s: CHANGED, were %s', digest, expected)


class _Failures:
  """ASGI middleware: answers 500 where a route has an error of its own.

  Starlette's own answer is text, and has no `x-request-id`.
  """

  def __init__(self, app):
    self._app = app

  async def __call__(self, scope, receive, send):
    is_begun = False

    async def send_and_note(message):
      nonlocal is_begun
      is_begun = True
      await send(message)

    try:
      await self._app(scope, receive, send_and_note)
    except Exception as error:
      if is_begun or scope['type'] != 'http':
        raise
      await errors.failure(error).response()(scope, receive, send)


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


async def _on_http(request, error):
  if error.status_code == 404:
    path = errors.printable(request.url.path)
    return errors.ApiError(
      404,
      f'{path}: got a path that this server does not have; GET /v1/capabilities'
      ' lists those that it has',
      param=None,
      code='unknown_path',
    ).response()
  response = errors.ApiError(
    error.status_code, error.detail, param=None, code=None
  ).response()
  response.headers.update(error.headers or {})
  if error.status_code == 405:
    # Starlette names the methods of the first route of the path alone.
    methods = {
      method
      for route in request.app.routes
      if route.matches(request.scope)[0] != routing.Match.NONE
      for method in getattr(route, 'methods', None) or ()
    }
    response.headers['allow'] = ', '.join(sorted(methods))
  return response


async def _on_left(*_):
  return responses.Response(status_code=streams.CLIENT_CLOSED_REQUEST)


async def _on_api_error(_, error):
  return error.response()
