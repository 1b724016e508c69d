"""GET /v1/capabilities: every parameter of every route, and what it may be.

Made of the OpenAPI document, which is made of the bodies' schemas: a parameter
that a schema has is listed here, and one that it refuses is listed as refused.
Every other parameter is refused, too.
"""

from collections.abc import Iterator
from typing import Any

import pydantic

from inference.server.api import schema as schema_lib

_NOTE = (
  'A parameter that is not listed, or not supported, is refused with status 400'
  ' and the code unsupported_parameter. A parameter that is not supported may'
  ' have one of the values in `accepted`, which change nothing.'
)


def describe(
  document: dict[str, Any], bodies: dict[str, type[pydantic.BaseModel]]
) -> dict[str, Any]:
  """Returns the body of the answer.

  Args:
    document: the OpenAPI document.
    bodies: the types of bodies, by their names in the document.
  """
  routes = []
  for path, operations in document['paths'].items():
    for method, operation in operations.items():
      content = operation['responses']['200']['content']
      routes.append(
        {
          'method': method.upper(),
          'path': path,
          'answers': list(content),
          'parameters': [
            *map(_of_url, operation.get('parameters', ())),
            *_of_body(operation, document, bodies),
          ],
        }
      )
  return {'object': 'capabilities', 'note': _NOTE, 'routes': routes}


def _of_url(parameter: dict[str, Any]) -> dict[str, Any]:
  return {
    'name': parameter['name'],
    'in': parameter['in'],
    'supported': True,
    'required': parameter.get('required', False),
    'description': parameter.get('description', ''),
    'values': parameter['schema'],
  }


def _of_body(
  operation: dict[str, Any],
  document: dict[str, Any],
  bodies: dict[str, type[pydantic.BaseModel]],
) -> Iterator[dict[str, Any]]:
  if 'requestBody' not in operation:
    return
  (content,) = operation['requestBody']['content'].values()
  name = content['schema']['$ref'].rpartition('/')[2]
  found = document['components']['schemas'][name]
  body = bodies[name]
  refused = body.unsupported() if issubclass(body, schema_lib.Body) else {}
  for field, values in found['properties'].items():
    entry = {
      'name': field,
      'in': 'body',
      'supported': field not in refused,
      'required': field in found.get('required', ()),
      'description': values.get('description', ''),
    }
    if field in refused:
      yield {**entry, 'accepted': [None, *refused[field].neutral]}
    else:
      yield {**entry, 'values': _inlined(values, document)}


def _inlined(schema: Any, document: dict[str, Any]) -> Any:
  """Returns a schema without references and texts of its own."""
  if isinstance(schema, list):
    return [_inlined(each, document) for each in schema]
  if not isinstance(schema, dict):
    return schema
  if isinstance(reference := schema.get('$ref'), str):
    name = reference.rpartition('/')[2]
    return _inlined(document['components']['schemas'][name], document)
  return {
    key: _inlined(value, document)
    for key, value in schema.items()
    if key != 'title' or not isinstance(value, str)
  }
