"""GET /health, /ready, /metrics and /version."""

import asyncio

import fastapi
from fastapi import responses

from inference.server import (
  engine_loop as engine_loop_lib,
  service as service_lib,
)
from inference.server.versions import about, metrics as metrics_lib

_METRICS_TYPE = 'text/plain; version=0.0.4; charset=utf-8'
# The state of a name is the state of its best version.
_BEST_FIRST = (
  engine_loop_lib.READY,
  engine_loop_lib.LOADING,
  engine_loop_lib.STOPPED,
  engine_loop_lib.FAILED,
)


def health(service: service_lib.Service) -> responses.Response:
  """Returns the answer to GET /health."""
  now = _state(service)
  return _told(now, is_good=now != engine_loop_lib.FAILED)


def add(app: fastapi.FastAPI, service: service_lib.Service) -> None:
  """Adds the routes."""

  @app.get('/health')
  async def get_health():
    # Few probes get here: `http.doorkeeper` answers most.
    return health(service)

  @app.get('/ready')
  async def ready():
    is_stopping = service.draining.is_on
    now = engine_loop_lib.STOPPED if is_stopping else _state(service)
    return _told(now, is_good=now == engine_loop_lib.READY)

  @app.get('/metrics')
  async def metrics():
    if not any(each.generator for each in service.versions.engine_loops()):
      service.model.generator()  # 503: there is nothing to count yet
    loops = service.versions.engine_loops()
    await asyncio.gather(*(each.refresh() for each in loops))
    text = metrics_lib.text(service.registries())
    text += service.admission.ledger.metrics.text()
    return responses.Response(text, media_type=_METRICS_TYPE)

  @app.get('/version')
  def version():  # in a thread: it asks git, and the device for its kind
    loops = service.versions.engine_loops()
    return about.version(loops[0].device() if loops else None)


def _state(service: service_lib.Service) -> str:
  """Returns the worst state of any name."""
  states = service.versions.states().values()
  return max(
    (min(each, key=_BEST_FIRST.index) for each in states),
    key=_BEST_FIRST.index,
    default=engine_loop_lib.STOPPED,
  )


def _told(state: str, *, is_good: bool) -> responses.Response:
  # Probes need no key (`api_keys.OPEN_PATHS`), so they learn only the state.
  status = {'status': 'ok' if is_good else state}
  return responses.JSONResponse(status, 200 if is_good else 503)
