"""GET /v1/capabilities: every parameter of every route."""

import fastapi

from inference.server import service as service_lib
from inference.server.api import capabilities, openapi


def add(app: fastapi.FastAPI, service: service_lib.Service) -> None:
  """Adds the route."""
  del service  # the routes of an app are known before its model is loaded
  found = []

  @app.get('/v1/capabilities')
  async def list_capabilities():
    if not found:  # the document is there when all routes are added
      found.append(capabilities.describe(app.openapi(), openapi.bodies()))
    return found[0]
