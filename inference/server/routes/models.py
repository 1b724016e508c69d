"""GET /v1/models and /v1/models/{name}: served models with their lineage.

A name is listed with the lineage of the version that answers most requests. If
a name has several versions, each is listed as NAME@DIGEST, too.
"""

import fastapi

from inference.server import service as service_lib


def add(app: fastapi.FastAPI, service: service_lib.Service) -> None:
  """Adds the routes."""

  def cards():
    for name in service.versions.names():
      if model := service.versions.default(name):
        yield model.card()
    models = service.versions.all()
    for model in models:
      if sum(each.name == model.name for each in models) > 1:
        yield {**model.card(), 'id': model.version}

  @app.get('/v1/models')
  async def models():
    return {'object': 'list', 'data': list(cards())}

  @app.get('/v1/models/{name:path}')
  async def model(name: str):
    if found := service.versions.default(name):
      return found.card()
    return {**service.find(name).card(), 'id': name}
