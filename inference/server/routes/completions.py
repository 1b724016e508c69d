"""POST /v1/completions: JSON, or server-sent events with "stream": true."""

import functools

import fastapi

from inference.server import service as service_lib
from inference.server.answers import completions
from inference.server.api import completion_schema, schema
from inference.server.routes import generation

_Answer = completions.Answer | functools.partial[completions.Answer]


def add(app: fastapi.FastAPI, service: service_lib.Service) -> None:
  """Adds the route."""

  @app.post('/v1/completions')
  async def complete(request: fastapi.Request):
    def prepared(
      raw: bytes,
    ) -> tuple[service_lib.ServedModel, _Answer]:
      body = schema.parsed(
        completion_schema.CompletionRequest, raw, context=service.context
      )
      model = service.find(body.model)
      generator = model.generator()
      body.check(is_shared=service.has_keys)
      make = functools.partial(
        completions.Answer, generator, body, principal=request.state.principal
      )
      return model, make if body.is_constrained else make()

    model, answer = await service.bodies.worked(request, prepared)
    answer = await generation.compiled(service, answer)
    return await generation.answered(
      request,
      service,
      lambda: model.submit(answer.requests, is_stream=answer.is_stream),
      answer,
    )
