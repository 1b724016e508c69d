"""The OpenAPI document: every route with its body, answers, errors and key.

FastAPI would describe only what it validates itself. Bodies are parsed, and
answers written, by this package, so this module describes them.
"""

from collections.abc import Collection
import dataclasses
from typing import Any

import fastapi
from fastapi import routing
import pydantic
from pydantic import json_schema

from inference.server.access import api_keys
from inference.server.api import errors, schema, shapes

_REF = '#/components/schemas/{model}'
_JSON = 'application/json'
_EVENTS = (
  'Server-sent events, with stream: true. Each is `data: ` and a'
  ' CompletionChunk as JSON, or an Error if the generation fails. The last is'
  ' `data: [DONE]`.'
)
_MEANINGS = {
  400: 'The request is wrong; `param` names the field.',
  401: 'The key is missing or unknown.',
  403: 'The key is not that of an admin.',
  404: 'There is no such model.',
  408: 'The body did not arrive in time.',
  409: 'The Idempotency-Key was used with another body.',
  413: 'The body is too large.',
  429: 'Too many requests wait, or the key has reached a limit, or its budget'
  ' (code insufficient_quota); try again after `retry-after` seconds.',
  500: 'The generation failed.',
  503: 'The server is loading, stopping or full.',
}


@dataclasses.dataclass(frozen=True, kw_only=True)
class _Route:
  answer: type[pydantic.BaseModel] | None = None  # None: text
  body: type[pydantic.BaseModel] | None = None
  errors: tuple[int, ...] = (503,)
  has_stream: bool = False


_POSTED = 400, 404, 408, 409, 413, 503
_ROUTES = {
  '/health': _Route(answer=shapes.Status),
  '/ready': _Route(answer=shapes.Status),
  '/metrics': _Route(),
  '/v1/models': _Route(answer=shapes.ModelList),
  '/v1/models/{name}': _Route(answer=shapes.Model, errors=(404, 503)),
  '/v1/completions': _Route(
    answer=shapes.Completion,
    body=schema.CompletionRequest,
    errors=(*_POSTED, 429, 500),
    has_stream=True,
  ),
  '/tokenizer_info': _Route(answer=shapes.TokenizerInfo),
  '/tokenize': _Route(
    answer=shapes.Tokens, body=schema.TokenizeRequest, errors=_POSTED
  ),
  '/detokenize': _Route(
    answer=shapes.Text, body=schema.DetokenizeRequest, errors=_POSTED
  ),
}


def document(
  app: fastapi.FastAPI, *, has_keys: bool, open_paths: Collection[str]
) -> dict[str, Any]:
  """Returns the OpenAPI document of an app.

  Args:
    app: has the routes.
    has_keys: whether requests need a key.
    open_paths: that need none.
  """
  paths: dict[str, Any] = {}
  for route in app.routes:
    if isinstance(route, routing.APIRoute):
      method = min(route.methods or {'get'})  # each has one
      needs_key = has_keys and route.path not in open_paths
      operation = _operation(route, has_keys=has_keys, needs_key=needs_key)
      paths[route.path_format] = {method.lower(): operation}
  components: dict[str, Any] = {'schemas': _schemas()}
  if has_keys:
    components['securitySchemes'] = {
      'key': {'type': 'http', 'scheme': 'bearer'}
    }
  return {
    'openapi': '3.1.0',
    'info': {'title': app.title, 'version': app.version},
    'paths': paths,
    'components': components,
  }


def _operation(
  route: routing.APIRoute, *, has_keys: bool, needs_key: bool
) -> dict[str, Any]:
  described = _ROUTES[route.path_format]
  operation: dict[str, Any] = {
    'operationId': route.name,
    'responses': {'200': _answer(described)},
  }
  errors = {*described.errors, *([401] if needs_key else [])}
  parameters = [
    _parameter(name, 'path', is_required=True)
    for name in route.param_convertors
  ]
  is_probe = route.path in api_keys.OPEN_PATHS
  for status in sorted(errors):
    model = shapes.Status if is_probe else shapes.Error
    operation['responses'][str(status)] = _error(status, model)
  if described.body:
    once = _parameter('Idempotency-Key', 'header')
    once['description'] = 'Sent again with it, a request is billed once.'
    parameters.append(once)
    operation['requestBody'] = {
      'required': True,
      'content': {_JSON: _reference(described.body)},
    }
  if parameters:
    operation['parameters'] = parameters
  if has_keys:
    operation['security'] = [{'key': []}] if needs_key else []
  return operation


def _parameter(
  name: str, place: str, *, is_required: bool = False
) -> dict[str, Any]:
  return {
    'name': name,
    'in': place,
    'required': is_required,
    'schema': {'type': 'string', 'minLength': 1},
  }


def _answer(described: _Route) -> dict[str, Any]:
  content: dict[str, Any] = {}
  if described.answer is None:
    content['text/plain'] = {'schema': {'type': 'string'}}
  else:
    content[_JSON] = _reference(described.answer)
  if described.has_stream:
    content['text/event-stream'] = {
      'schema': {'type': 'string', 'description': _EVENTS}
    }
  return {'description': 'The answer.', 'content': content}


def _error(status: int, model: type[pydantic.BaseModel]) -> dict[str, Any]:
  error: dict[str, Any] = {
    'description': _MEANINGS[status],
    'content': {_JSON: _reference(model)},
  }
  if status in errors.RETRIED and model is shapes.Error:
    error['headers'] = {
      'retry-after': {
        'description': 'Seconds to wait.',
        'schema': {'type': 'integer'},
      }
    }
  return error


def _reference(model: type[pydantic.BaseModel]) -> dict[str, Any]:
  return {'schema': {'$ref': _REF.format(model=model.__name__)}}


def _schemas() -> dict[str, Any]:
  models: list[tuple[type[pydantic.BaseModel], json_schema.JsonSchemaMode]] = [
    (shapes.Error, 'validation'),
    (shapes.CompletionChunk, 'validation'),
  ]
  for route in _ROUTES.values():
    for model in (route.answer, route.body):
      if model:
        models.append((model, 'validation'))
  _, found = json_schema.models_json_schema(models, ref_template=_REF)
  return found['$defs']
