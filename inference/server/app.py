"""The HTTP server of life two, in the shapes of OpenAI's API.

    GET  /                  the page: chat and status
    GET  /health            200 while the process can answer, 503 if it failed
    GET  /ready             503 until every program is compiled
    GET  /metrics           counters of the engine, as Prometheus collects them
    GET  /v1/models         names and versions, with the lineage of weights
    GET  /v1/models/{id}
    POST /v1/responses      items in, items out; stored, to be continued
    GET, DELETE /v1/responses/{id}, GET /v1/responses/{id}/input_items
    GET  /v1/capabilities   every parameter of every route
    GET  /v1/prices         prices of tokens
    POST /v1/completions    JSON, or server-sent events with "stream": true
    POST /v1/chat/completions    a conversation, by the model's chat template
    POST /v1/embeddings     a vector per input
    POST /v1/feedback       a rating of an answer, where it may be stored
    DELETE /v1/feedback[/{id}]
    GET  /tokenizer_info, POST /tokenize, POST /detokenize
    GET  /version           versions of the program, its libraries and device
    /admin/models, /admin/traffic    versions: load, weigh, shadow, unload

    http/      bytes: connections, bodies within limits, streams that can end
    access/    the sender of a request, and the sender's limits
    api/       the schema: bodies, errors, shapes of answers, OpenAPI document
    versions/  several models: which answers, how they load and unload
    routes/    a file per group of routes, which reads bodies and submits
    answers/   from a checked body to the requests of the engine, and back
    records/   the SQLite file, for all that outlives a request

A request is checked completely before the first byte of its answer, since the
status 200 of a stream cannot be taken back. A client that disconnects cancels
its request, unless it has an Idempotency-Key. Bodies are parsed, and text is
tokenized, in the threads of `http.bodies`. On a server with keys, every route
needs one except /health, /ready and the files of the page; routes below /admin
always need one. All generation passes through `ServedModel.submit`, which
admits and bills it. When the server stops, the digest of the weights is
computed again and compared with the digest in the manifest.

A new route is a function in `routes/`, and its lines in `api/openapi.py`.
"""

import asyncio
from collections.abc import Awaitable, Callable, Mapping, Sequence
import contextlib
import functools
import logging
from typing import Any

import fastapi
from fastapi import responses
from starlette import (
  exceptions as starlette_exceptions,
  requests as starlette_requests,
  routing,
)

from inference.search.routing import router as router_lib
from inference.server import server_config, service as service_lib
from inference.server.access import (
  admission as admission_lib,
  api_keys,
  idempotency,
  keys as keys_lib,
)
from inference.server.api import errors, openapi
from inference.server.http import (
  bodies as bodies_lib,
  draining as draining_lib,
  exchanges,
  page_files,
  protocol,
  streams,
  turns,
)
from inference.server.receipts import receipts
from inference.server.records import (
  database,
  feedback as feedback_records,
  ledger as ledger_lib,
  responses as responses_store,
)
from inference.server.routes import (
  admin as admin_routes,
  capabilities,
  chat,
  completions,
  embeddings,
  feedback,
  models as models_routes,
  prices,
  probes,
  responses as responses_routes,
  tokenizer,
)
from inference.server.search import scoring
from inference.server.versions import audit, registry

_LOG = logging.getLogger('uvicorn.error')
# Of every module that keeps records.
TABLES: tuple[str, ...] = (
  keys_lib.TABLES,
  ledger_lib.TABLES,
  receipts.TABLES,
  feedback_records.TABLES,
  responses_store.TABLES,
)
_ROUTES = (
  admin_routes,
  probes,
  models_routes,
  tokenizer,
  completions,
  chat,
  embeddings,
  responses_routes,
  feedback,
  prices,
  capabilities,
)


async def _nothing() -> None:
  """Is the end of a server without replicas."""


def create_app(
  models: Sequence[service_lib.ServedModel],
  keys: keys_lib.Keyring | keys_lib.File | None = None,
  config: server_config.ServerConfig = server_config.ServerConfig(),
  *,
  records: database.Database | None = None,
  loader: service_lib.Loader | None = None,
  observers: Sequence[service_lib.Observer] = (),
  routers: Mapping[str, router_lib.Router] | None = None,
  scorers: Mapping[str, service_lib.ServedModel] | None = None,
  on_end: Callable[[], Awaitable[None]] = _nothing,
) -> fastapi.FastAPI:
  """Returns the ASGI app that serves models.

  Args:
    models: at least one, under different names; adapters behind their bases.
      The app starts and closes their engine loops.
    keys: keys in addition to the records, or a keyring of all keys. Without any
      key, all clients are answered.
    config: the limits on bodies.
    records: opened with `TABLES`, and closed by the app; None: in memory.
    loader: loads further models; None: no model can be loaded.
    observers: observers of the finished answers, such as receipts.
    routers: choose for the effort auto, by the digest of a version.
    scorers: reward models of strategies, by name.
    on_end: called once all engine loops are closed.

  Raises:
    ValueError: an effort of a router needs a scorer that is not here.
  """
  routers, scorers = routers or {}, scorers or {}
  scoring.check_efforts(routers.values(), scorers, config.verifier_names)
  records = records or database.Database(None, tables=TABLES)
  keyring = keys
  if not isinstance(keyring, keys_lib.Keyring):
    keyring = keys_lib.Keyring(records, keyring)
  ledger = ledger_lib.Ledger(records)
  admission = admission_lib.Admission(ledger, admission_lib.prices(config))
  auditor = audit.Auditor(config.audit_share, config.audit_threshold)
  versions = registry.Versions(models, admission, [auditor, *observers])
  auditor.engines = versions.engine_loops
  bodies, draining = bodies_lib.Bodies(config), draining_lib.Draining()
  service = service_lib.Service(
    versions=versions,
    bodies=bodies,
    records=records,
    store=_store(records, config),
    config=config,
    keyring=keyring,
    admission=admission,
    loader=loader,
    draining=draining,
    routers=routers,
    scorers=scorers,
    verifiers=config.verifier_names,
    metrics=[auditor.metrics.registry],
  )
  _admit(service, ledger)

  async def end_requests():
    bodies.stop()
    await versions.close()
    judges = service.scorers.values()
    await asyncio.gather(*(each.engine_loop.close() for each in judges))

  lifespan = _lifespan(service, auditor, end_requests, on_end)
  app = fastapi.FastAPI(title='Two Lives', lifespan=lifespan)
  app.state.end_requests, app.state.versions = end_requests, versions
  app.state.draining, app.state.keyring = draining, keyring
  app.state.engine_loops = service.engine_loops
  app.state.health = functools.partial(probes.health, service)
  open_paths = {*api_keys.OPEN_PATHS, *['/metrics'] * config.public_metrics}
  _add_middleware(app, service, open_paths)
  app.add_exception_handler(starlette_exceptions.HTTPException, _on_http)
  app.add_exception_handler(errors.ApiError, _on_api_error)
  app.add_exception_handler(starlette_requests.ClientDisconnect, _on_left)
  for routes in _ROUTES:
    routes.add(app, service)
  _describe(app, keyring, open_paths)
  return app


def _admit(service: service_lib.Service, ledger: ledger_lib.Ledger) -> None:
  """Lets the reward models of strategies be asked, and billed."""
  for judge in service.scorers.values():
    judge.admission = service.admission
    ledger.note_model(judge.name, judge.digest, judge.origin)


def _lifespan(
  service: service_lib.Service,
  auditor: audit.Auditor,
  end_requests: Callable[[], Awaitable[None]],
  on_end: Callable[[], Awaitable[None]],
) -> Callable[[Any], contextlib.AbstractAsyncContextManager[None]]:
  """Returns what starts the engines of an app, and ends all that it has."""

  @contextlib.asynccontextmanager
  async def lifespan(_):
    service.versions.start()
    for each in service.scorers.values():
      each.start()
    auditor.start()
    async with service.store.expiring():
      yield
    await asyncio.to_thread(auditor.close)
    await end_requests()
    await on_end()
    for each in (service.bodies, service.records, service.admission.ledger):
      each.close()
    _report_digests(service)

  return lifespan


def _describe(
  app: fastapi.FastAPI, keyring: keys_lib.Keyring, open_paths: set[str]
) -> None:
  """Makes the OpenAPI documents of the routes, with keys and without."""
  described = {
    has_keys: openapi.document(app, has_keys=has_keys, open_paths=open_paths)
    for has_keys in (False, True)
  }
  app.openapi = lambda: described[keyring.has_keys]


def _store(
  records: database.Database, config: server_config.ServerConfig
) -> responses_store.Store:
  return responses_store.Store(
    records,
    days=config.store_days,
    most_bytes=config.store_mebibytes * 2**20,
  )


def _add_middleware(
  app: fastapi.FastAPI, service: service_lib.Service, open_paths: set[str]
) -> None:
  """Adds the middleware that every request passes, the innermost first."""
  app.add_middleware(_Failures)
  # A request with an Idempotency-Key outlives its client.
  app.add_middleware(exchanges.Ends)
  app.add_middleware(idempotency.Idempotency, bodies=service.bodies)
  app.add_middleware(
    api_keys.Authentication, keyring=service.keyring, open_paths=open_paths
  )
  app.add_middleware(page_files.PageFiles)  # outside: the page needs no key
  app.add_middleware(protocol.Framing)
  app.add_middleware(turns.Turns)
  app.add_middleware(draining_lib.Refusals, draining=service.draining)
  app.add_middleware(exchanges.Exchanges)  # outermost: a 401 has an id too


def _report_digests(service: service_lib.Service) -> None:
  for model in (*service.versions.all(), *service.scorers.values()):
    if model.base is not None:
      continue
    expected = model.manifest.weights_digest
    for where, digest in model.engine_loop.digests():
      if digest == expected:
        _LOG.info('%sweights %s: unchanged', where, digest)
      else:
        _LOG.error('%sweights %s: CHANGED, were %s', where, digest, expected)


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


async def _on_http(request, error):
  if error.status_code == 404:
    path = errors.printable(request.url.path)
    return errors.ApiError(
      404,
      f'{path}: got a path that this server does not have; GET /v1/capabilities'
      ' lists the paths of this server',
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
