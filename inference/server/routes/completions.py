"""POST /v1/completions: JSON, or server-sent events with "stream": true."""

import fastapi

from inference.server import service as service_lib
from inference.server.answers import completions
from inference.server.api import schema
from inference.server.routes import generation


def add(app: fastapi.FastAPI, service: service_lib.Service) -> None:
  """Adds the route."""

  @app.post('/v1/completions')
  async def complete(request: fastapi.Request):
    def prepared(
      raw: bytes,
    ) -> tuple[service_lib.ServedModel, completions.Answer]:
      body = schema.parsed(
        schema.CompletionRequest, raw, context=service.context
      )
      model = service.find(body.model)
      generator = model.generator()
      body.check(is_shared=service.has_keys)
      return model, completions.Answer(
        generator, body, principal=request.state.principal
      )

    model, answer = await service.bodies.worked(request, prepared)
    return await generation.answered(request, service, model, answer)
