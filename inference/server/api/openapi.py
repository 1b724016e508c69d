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
from inference.server.api import (
  admin_schema,
  chat_schema,
  completion_schema,
  embedding_schema,
  errors,
  feedback_schema,
  response_schema,
  response_shapes,
  shapes,
  tokenizer_schema,
)

_REF = '#/components/schemas/{model}'
_JSON = 'application/json'
_EVENTS = 'text/event-stream'
_DONE = '[DONE]'  # the data of a stream's last event
_MEANINGS = {
  400: 'The request is wrong; `param` names the field.',
  401: 'The key is missing or unknown.',
  403: 'The key may not do this, or no model may be loaded.',
  404: 'There is no such model, or nothing of this id.',
  408: 'The body did not arrive in time.',
  409: 'The Idempotency-Key was used with another body, or a version is there'
  ' already, not ready, or still needed.',
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
  chunk: type[pydantic.BaseModel] | None = None  # data of an event of a stream
  query: tuple[dict[str, Any], ...] = ()  # parameters, without `in`
  status: int = 200  # of the answer


_POSTED = 400, 404, 408, 409, 413, 503
_ADMIN = 401, 403, 503
# By path; by METHOD and path where a path has several methods.
_ROUTES = {
  '/health': _Route(answer=shapes.Status),
  '/ready': _Route(answer=shapes.Status),
  '/metrics': _Route(),
  '/version': _Route(answer=shapes.Version),
  '/v1/capabilities': _Route(answer=shapes.Capabilities),
  '/v1/models': _Route(answer=shapes.ModelList),
  '/v1/models/{name}': _Route(answer=shapes.Model, errors=(404, 503)),
  '/v1/completions': _Route(
    answer=shapes.Completion,
    body=completion_schema.CompletionRequest,
    errors=(*_POSTED, 429, 500),
    chunk=shapes.CompletionChunk,
  ),
  '/v1/chat/completions': _Route(
    answer=shapes.Chat,
    body=chat_schema.ChatRequest,
    errors=(*_POSTED, 429, 500),
    chunk=shapes.ChatChunk,
  ),
  '/v1/embeddings': _Route(
    answer=shapes.EmbeddingList,
    body=embedding_schema.EmbeddingRequest,
    errors=(*_POSTED, 429, 500),
  ),
  '/v1/responses': _Route(
    answer=response_shapes.Response,
    body=response_schema.ResponseRequest,
    errors=(*_POSTED, 429, 500),
    chunk=response_shapes.ResponseEvent,
  ),
  'GET /v1/responses/{response_id}': _Route(
    answer=response_shapes.Response, errors=(400, 404, 503)
  ),
  'DELETE /v1/responses/{response_id}': _Route(
    answer=response_shapes.DeletedResponse, errors=(400, 404, 503)
  ),
  '/v1/responses/{response_id}/input_items': _Route(
    answer=response_shapes.ItemList,
    errors=(400, 404, 503),
    query=(
      {
        'name': 'after',
        'description': 'The id of the item before the page.',
        'schema': {'type': 'string'},
      },
      {
        'name': 'limit',
        'description': 'Most items of the page; 20 if not given.',
        'schema': {'type': 'integer', 'minimum': 1, 'maximum': 100},
      },
      {
        'name': 'order',
        'description': 'Oldest (asc) or newest first; desc if not given.',
        'schema': {'type': 'string', 'enum': ['asc', 'desc']},
      },
    ),
  ),
  '/v1/prices': _Route(answer=shapes.Prices),
  'POST /v1/feedback': _Route(
    answer=shapes.Feedback,
    body=feedback_schema.FeedbackRequest,
    errors=(*_POSTED, 403),
  ),
  'DELETE /v1/feedback': _Route(answer=shapes.DeletedFeedback),
  '/v1/feedback/{name}': _Route(
    answer=shapes.DeletedFeedback, errors=(404, 503)
  ),
  '/tokenizer_info': _Route(answer=shapes.TokenizerInfo),
  '/tokenize': _Route(
    answer=shapes.Tokens, body=tokenizer_schema.TokenizeRequest, errors=_POSTED
  ),
  '/detokenize': _Route(
    answer=shapes.Text, body=tokenizer_schema.DetokenizeRequest, errors=_POSTED
  ),
  'GET /admin/models': _Route(answer=shapes.VersionList, errors=_ADMIN),
  'POST /admin/models': _Route(
    answer=shapes.ModelVersion,
    body=admin_schema.LoadRequest,
    errors=(*_POSTED, 401, 403),
    status=202,
  ),
  'GET /admin/models/{version}': _Route(
    answer=shapes.ModelVersion, errors=(404, *_ADMIN)
  ),
  'DELETE /admin/models/{version}': _Route(
    answer=shapes.ModelVersion, errors=(404, 409, *_ADMIN), status=202
  ),
  'GET /admin/traffic': _Route(answer=shapes.TrafficList, errors=_ADMIN),
  'POST /admin/traffic': _Route(
    answer=shapes.TrafficList,
    body=admin_schema.TrafficRequest,
    errors=(*_POSTED, 401, 403),
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
      paths.setdefault(route.path_format, {})[method.lower()] = operation
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


def bodies() -> dict[str, type[pydantic.BaseModel]]:
  """Returns the types of bodies of requests, by their names."""
  found = [route.body for route in _ROUTES.values() if route.body]
  return {each.__name__: each for each in found}


def _operation(
  route: routing.APIRoute, *, has_keys: bool, needs_key: bool
) -> dict[str, Any]:
  path = route.path_format
  (method,) = route.methods or {'get'}
  described = _ROUTES.get(f'{method} {path}') or _ROUTES[path]
  operation: dict[str, Any] = {
    'operationId': route.name,
    'responses': {str(described.status): _answer(described)},
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
  parameters += [{'in': 'query', **each} for each in described.query]
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
  if described.chunk:
    content[_EVENTS] = {'itemSchema': _event(described.chunk)}
  return {'description': 'The answer.', 'content': content}


def _event(chunk: type[pydantic.BaseModel]) -> dict[str, Any]:
  """Returns the schema of one event, as OpenAPI 3.2 and FastAPI write it."""
  data = [
    {
      'type': 'string',
      'contentMediaType': _JSON,
      'contentSchema': _reference(each)['schema'],
    }
    for each in (chunk, shapes.Error)
  ]
  return {
    'type': 'object',
    'description': 'With stream: true. An error ends a stream early.',
    'properties': {'data': {'anyOf': [{'const': _DONE}, *data]}},
    'required': ['data'],
  }


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
    (shapes.Error, 'validation')
  ]
  for route in _ROUTES.values():
    for model in (route.answer, route.body, route.chunk):
      if model:
        models.append((model, 'validation'))
  _, found = json_schema.models_json_schema(models, ref_template=_REF)
  return found['$defs']
