"""POST /v1/embeddings: a vector per input."""

import fastapi
from fastapi import responses

from inference.server import service as service_lib
from inference.server.answers import embeddings
from inference.server.api import embedding_schema, schema
from inference.server.http import streams


def add(app: fastapi.FastAPI, service: service_lib.Service) -> None:
  """Adds the route."""

  @app.post('/v1/embeddings')
  async def embed(request: fastapi.Request):
    generator = service.model.generator()

    def prepared(raw: bytes) -> embeddings.Answer:
      body = schema.parsed(
        embedding_schema.EmbeddingRequest, raw, context=generator.engine.context
      )
      service.find(body.model)
      return embeddings.Answer(
        generator, body, principal=request.state.principal
      )

    answer = await service.bodies.worked(request, prepared)
    return await streams.unless_disconnected(request, _whole(service, answer))


async def _whole(
  service: service_lib.Service, answer: embeddings.Answer
) -> responses.Response:
  await answer.finish(service.model.submit)

  def written() -> responses.Response:
    # One vector at a time: it has as many numbers as the model is wide.
    return streams.written(answer.whole(), piece=1)

  return await service.bodies.in_thread(written, size=answer.size)
