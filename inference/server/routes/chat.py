"""POST /v1/chat/completions: JSON, or server-sent events."""

import functools

import fastapi

from inference.server import service as service_lib
from inference.server.answers import chat
from inference.server.api import chat_schema, schema
from inference.server.routes import generation
from inference.server.search import running

_Answer = chat.Answer | functools.partial[chat.Answer]


def add(app: fastapi.FastAPI, service: service_lib.Service) -> None:
  """Adds the route."""

  @app.post('/v1/chat/completions')
  async def chat_completions(request: fastapi.Request):
    def prepared(
      raw: bytes,
    ) -> tuple[service_lib.ServedModel, _Answer]:
      body = schema.parsed(
        chat_schema.ChatRequest, raw, context=service.context
      )
      model = service.find(body.model)
      body.check(is_shared=service.has_keys)
      make = functools.partial(
        chat.Answer,
        model.generator(),
        body,
        principal=request.state.principal,
        reply_format=service.config.reply_format,
        efforts=service.config.efforts,
      )
      return model, make if body.is_constrained else make()

    model, answer = await service.bodies.worked(request, prepared)
    answer = await generation.compiled(service, answer)

    def submit():
      if answer.body.is_search:
        return running.begin(service, model, answer)
      return model.submit(answer.requests, is_stream=answer.is_stream)

    return await generation.answered(request, service, submit, answer)
