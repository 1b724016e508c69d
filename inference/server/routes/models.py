"""GET /v1/models and /v1/models/{name}: what is served, with its lineage."""

import fastapi

from inference.server import service as service_lib


def add(app: fastapi.FastAPI, service: service_lib.Service) -> None:
  """Adds the routes."""

  @app.get('/v1/models')
  async def models():
    return {'object': 'list', 'data': [service.model.card()]}

  @app.get('/v1/models/{name:path}')
  async def model(name: str):
    return service.find(name).card()
