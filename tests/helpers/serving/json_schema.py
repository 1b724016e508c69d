"""The JSON Schema of the OpenAPI document, checked without its writer."""

import re
from typing import Any

_TYPES = {
  'object': dict,
  'array': list,
  'string': str,
  'integer': int,
  'number': (int, float),
  'boolean': bool,
  'null': type(None),
}
# Keywords of a schema that do not limit a value, and keywords that `faults`
# checks.
_NOTES = {'title', 'description', 'default', 'discriminator'}
_BOUNDS = {
  'minimum': lambda value, bound: value >= bound,
  'maximum': lambda value, bound: value <= bound,
  'exclusiveMinimum': lambda value, bound: value > bound,
  'exclusiveMaximum': lambda value, bound: value < bound,
  'minLength': lambda value, bound: len(value) >= bound,
  'maxLength': lambda value, bound: len(value) <= bound,
  'pattern': lambda value, bound: re.search(bound, value) is not None,
}
_CHECKED = {
  *('$ref', 'type', 'anyOf', 'oneOf', 'const', 'enum', 'items', 'properties'),
  *('required', 'additionalProperties', 'maxItems', 'maxProperties'),
  *('propertyNames', *_BOUNDS),
}


def faults(value: Any, schema: dict[str, Any], document: dict) -> list[str]:
  """Returns the ways in which a value is not as a schema says.

  Raises:
    ValueError: the schema has a keyword that is not known here.
  """
  if unknown := schema.keys() - _NOTES - _CHECKED:
    raise ValueError(f'schema: got {unknown}, expected {_CHECKED}')
  if '$ref' in schema:
    name = schema['$ref'].removeprefix('#/components/schemas/')
    return faults(value, document['components']['schemas'][name], document)
  if 'anyOf' in schema:
    found = [faults(value, each, document) for each in schema['anyOf']]
    return [] if [] in found else sum(found, [])
  if 'oneOf' in schema:
    found = [faults(value, each, document) for each in schema['oneOf']]
    return [] if found.count([]) == 1 else [f'{value!r} is not one of them']
  if 'const' in schema and value != schema['const']:
    return [f'{value!r} is not {schema["const"]!r}']
  if 'enum' in schema and value not in schema['enum']:
    return [f'{value!r} is not among {schema["enum"]!r}']
  kind = schema.get('type')
  if kind and (
    not isinstance(value, _TYPES[kind])
    or (isinstance(value, bool) and kind != 'boolean')
  ):
    return [f'{value!r} is no {kind}']
  for name, holds in _BOUNDS.items():
    if kind and name in schema and not holds(value, schema[name]):
      return [f'{value!r} is not within {name} {schema[name]!r}']
  if isinstance(value, list):
    found = [faults(each, schema.get('items', {}), document) for each in value]
    found.append(_too_many(value, schema.get('maxItems')))
    return sum(found, [])
  return _of_fields(value, schema, document) if isinstance(value, dict) else []


def _of_fields(value: dict, schema: dict, document: dict) -> list[str]:
  known = schema.get('properties', {})
  other = schema.get('additionalProperties', True)
  found = [
    f'no {name}' for name in schema.get('required', ()) if name not in value
  ]
  found += _too_many(value, schema.get('maxProperties'))
  for name, each in value.items():
    names = {'type': 'string', **schema.get('propertyNames', {})}
    found += faults(name, names, document)
    of = known.get(name, other)
    if of is False:
      found.append(f'{name} is not described')
    elif of is not True:
      found += [f'{name}: {fault}' for fault in faults(each, of, document)]
  return found


def _too_many(value, most: int | None) -> list[str]:
  return [] if most is None or len(value) <= most else [f'{len(value)} entries']
