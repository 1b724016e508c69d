"""POST /v1/completions: JSON, or server-sent events with "stream": true."""

import contextlib

import fastapi
from fastapi import responses

from inference.server import service as service_lib
from inference.server.answers import completions
from inference.server.api import schema
from inference.server.http import streams


def add(app: fastapi.FastAPI, service: service_lib.Service) -> None:
  """Adds the route."""

  @app.post('/v1/completions')
  async def complete(request: fastapi.Request):
    generator = service.model.generator()

    def prepared(raw: bytes) -> completions.Answer:
      body = schema.parsed(
        schema.CompletionRequest, raw, context=generator.engine.context
      )
      service.find(body.model)
      body.check(is_shared=service.has_keys)
      return completions.Answer(
        generator, body, principal=request.state.principal
      )

    answer = await service.bodies.worked(request, prepared)
    if answer.is_stream:
      updates = await service.model.submit(answer.requests)
      chunks = answer.chunks(updates)
      return streams.EventStream(
        streams.events(chunks),
        updates,
        ping_seconds=service.config.ping_seconds,
      )
    return await streams.unless_disconnected(request, _whole(service, answer))


async def _whole(
  service: service_lib.Service, answer: completions.Answer
) -> responses.Response:
  updates = await service.model.submit(answer.requests)
  with contextlib.closing(updates):
    await answer.finish(updates)

  def written() -> responses.Response:
    return streams.written(answer.whole())

  return await service.bodies.in_thread(written, size=answer.size)
