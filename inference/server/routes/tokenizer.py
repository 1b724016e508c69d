"""GET /tokenizer_info, POST /tokenize and POST /detokenize."""

from collections.abc import Callable
from typing import Any, TypeVar

import fastapi
from fastapi import responses

from inference import generate
from inference.server import service as service_lib
from inference.server.answers import tokenization
from inference.server.api import schema, tokenizer_schema
from inference.server.http import streams

_Request = TypeVar(
  '_Request',
  tokenizer_schema.TokenizeRequest,
  tokenizer_schema.DetokenizeRequest,
)


def add(app: fastapi.FastAPI, service: service_lib.Service) -> None:
  """Adds the routes."""

  def answered(
    kind: type[_Request],
    answer: Callable[[generate.Generator, _Request], dict[str, Any]],
  ) -> Callable[[bytes], responses.Response]:
    generator = service.model.generator()

    def work(raw: bytes) -> responses.Response:
      body = schema.parsed(kind, raw, context=generator.engine.context)
      service.find(body.model or service.model.name)
      return streams.written(answer(generator, body))

    return work

  @app.get('/tokenizer_info')
  async def tokenizer_info():
    return tokenization.info(service.model.generator())

  @app.post('/tokenize')
  async def tokenize(request: fastapi.Request):
    work = answered(tokenizer_schema.TokenizeRequest, tokenization.tokenize)
    return await service.bodies.worked(request, work)

  @app.post('/detokenize')
  async def detokenize(request: fastapi.Request):
    work = answered(tokenizer_schema.DetokenizeRequest, tokenization.detokenize)
    return await service.bodies.worked(request, work)
