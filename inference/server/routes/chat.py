"""POST /v1/chat/completions: JSON, or server-sent events."""

import contextlib

import fastapi
from fastapi import responses

from inference.server import service as service_lib
from inference.server.answers import chat
from inference.server.api import chat_schema, schema
from inference.server.http import streams


def add(app: fastapi.FastAPI, service: service_lib.Service) -> None:
  """Adds the route."""

  @app.post('/v1/chat/completions')
  async def chat_completions(request: fastapi.Request):
    generator = service.model.generator()

    def prepared(raw: bytes) -> chat.Answer:
      body = schema.parsed(
        chat_schema.ChatRequest, raw, context=generator.engine.context
      )
      service.find(body.model)
      body.check(is_shared=service.has_keys)
      return chat.Answer(
        generator,
        body,
        principal=request.state.principal,
        reply_format=service.config.reply_format,
      )

    answer = await service.bodies.worked(request, prepared)
    if answer.is_stream:
      updates = await service.model.submit(answer.requests)
      return streams.EventStream(
        streams.events(answer.chunks(updates)),
        updates,
        ping_seconds=service.config.ping_seconds,
      )
    return await streams.unless_disconnected(request, _whole(service, answer))


async def _whole(
  service: service_lib.Service, answer: chat.Answer
) -> responses.Response:
  updates = await service.model.submit(answer.requests)
  with contextlib.closing(updates):
    await answer.finish(updates)

  def written() -> responses.Response:
    return streams.written(answer.whole())

  return await service.bodies.in_thread(written, size=answer.size)
