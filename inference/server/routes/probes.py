"""GET /health, /ready and /metrics."""

import fastapi
from fastapi import responses

from inference.server import (
  engine_loop as engine_loop_lib,
  service as service_lib,
)

_METRICS_TYPE = 'text/plain; version=0.0.4; charset=utf-8'


def add(app: fastapi.FastAPI, service: service_lib.Service) -> None:
  """Adds the routes."""
  engine_loop = service.model.engine_loop

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
    text = service.model.generator().engine.metrics.text()
    text += service.admission.ledger.metrics.text()
    return responses.Response(text, media_type=_METRICS_TYPE)
