"""The HTTP server of life two, in the shapes of OpenAI's API.

    GET  /health            200 while the process can answer, 503 if it failed
    GET  /ready             503 until every program is compiled
    GET  /metrics           counters of the engine, as Prometheus collects them
    GET  /v1/models         the one model, with the lineage of its weights
    GET  /v1/models/{id}
    POST /v1/completions    JSON, or server-sent events with "stream": true
    GET  /tokenizer_info, POST /tokenize, POST /detokenize

    http/      bytes: connections, bodies within limits, streams that can end
    access/    who sends a request, and what the sender may use
    api/       the words: bodies, errors, shapes of answers, OpenAPI document
    routes/    a file per group of routes, which reads bodies and submits
    answers/   from a checked body to the requests of the engine, and back
    records/   the SQLite file, for all that outlives a request

A request is checked completely before the first byte of its answer, since the
status 200 of a stream cannot be taken back. A client that disconnects cancels
its request, unless it has an Idempotency-Key. Bodies are parsed, and text is
tokenized, in the threads of `http.bodies`. With keys, every route but /health
and /ready needs one; routes below /admin need one in any case. All generation
passes through `ServedModel.submit`, which admits and bills it. When the server
stops, the digest of the weights is computed again and compared with the digest
in the manifest.

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
)

from frozen import manifest as manifest_lib
from inference import generate
from inference.server import (
  engine_loop as engine_loop_lib,
  server_config,
  service as service_lib,
)
from inference.server.access import (
  admission as admission_lib,
  api_keys,
  caller as caller_lib,
  idempotency,
  keys as keys_lib,
)
from inference.server.api import errors, openapi
from inference.server.http import bodies as bodies_lib, protocol, streams, turns
from inference.server.records import database, ledger as ledger_lib
from inference.server.routes import completions, models, probes, tokenizer

_LOG = logging.getLogger('uvicorn.error')
# Of every module that keeps records.
TABLES: tuple[str, ...] = (keys_lib.TABLES, ledger_lib.TABLES)


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
    keys: further keys than those of the records. Without any key, all clients
      are answered.
    config: the limits on bodies.
    context: most tokens of a sequence; 0: those of the model.
    records: opened with `TABLES`, and closed by the app; None: in memory.
  """
  records = records or database.Database(None, tables=TABLES)
  keyring = keys_lib.Keyring(records, keys)
  ledger = ledger_lib.Ledger(records)
  admission = admission_lib.Admission(ledger, admission_lib.prices(config))
  model = service_lib.ServedModel(
    model_name,
    engine_loop,
    manifest,
    context=context or manifest.model['max_length'],
    admission=admission,
  )
  bodies = bodies_lib.Bodies(config)
  service = service_lib.Service(
    model=model,
    bodies=bodies,
    records=records,
    keyring=keyring,
    admission=admission,
  )

  async def end_requests():
    bodies.stop()
    await engine_loop.close()

  @contextlib.asynccontextmanager
  async def lifespan(_):
    engine_loop.start()
    yield
    await engine_loop.close()
    bodies.close()
    records.close()
    ledger.close()
    if engine_loop.generator:
      _report_digest(engine_loop.generator)

  app = fastapi.FastAPI(title='Two Lives', lifespan=lifespan)
  app.state.end_requests = end_requests
  app.state.keyring = keyring
  open_paths = {*api_keys.OPEN_PATHS, *['/metrics'] * config.public_metrics}
  _add_middleware(app, service, open_paths)
  app.add_exception_handler(starlette_exceptions.HTTPException, _on_http)
  app.add_exception_handler(errors.ApiError, _on_api_error)
  app.add_exception_handler(starlette_requests.ClientDisconnect, _on_left)
  for routes in (probes, models, tokenizer, completions):
    routes.add(app, service)
  described = {
    has_keys: openapi.document(app, has_keys=has_keys, open_paths=open_paths)
    for has_keys in (False, True)
  }
  app.openapi = lambda: described[keyring.has_keys]
  return app


def _add_middleware(
  app: fastapi.FastAPI, service: service_lib.Service, open_paths: set[str]
) -> None:
  """Adds what every request passes, the innermost first."""
  app.add_middleware(idempotency.Idempotency, bodies=service.bodies)
  app.add_middleware(
    api_keys.Authentication, keyring=service.keyring, open_paths=open_paths
  )
  app.add_middleware(protocol.Framing)
  app.add_middleware(turns.Turns)
  app.add_middleware(_RequestId)  # outermost, so that a 401 has an id too


def _report_digest(generator: generate.Generator) -> None:
  expected = generator.frozen.manifest.weights_digest
  digest = generator.weights_digest()
  if digest == expected:
    _LOG.info('weights %s: unchanged', digest)
  else:
    _LOG.error('weights %s: CHANGED, were %s', digest, expected)


class _RequestId:
  """ASGI middleware: adds an `x-request-id`, which clients show in errors.

  It is `state.request_id` of the request, and begins the `caller`, whose
  headers it sends.
  """

  def __init__(self, app):
    self._app = app

  async def __call__(self, scope, receive, send):
    if scope['type'] != 'http':
      await self._app(scope, receive, send)
      return
    request_id = f'req_{uuid.uuid4().hex}'
    scope.setdefault('state', {})['request_id'] = request_id
    caller = caller_lib.Caller(request_id=request_id)
    caller_lib.begin(caller)

    async def send_with_id(message):
      if message['type'] == 'http.response.start':
        message['headers'] = [
          *message['headers'],
          (b'x-request-id', request_id.encode()),
          *((k.encode(), v.encode()) for k, v in caller.headers.items()),
        ]
      await send(message)

    await self._app(scope, receive, send_with_id)


async def _on_http(_, error):
  response = errors.ApiError(
    error.status_code, error.detail, param=None, code=None
  ).response()
  response.headers.update(error.headers or {})  # `allow` of a 405
  return response


async def _on_left(*_):
  return responses.Response(status_code=streams.CLIENT_CLOSED_REQUEST)


async def _on_api_error(_, error):
  return error.response()
