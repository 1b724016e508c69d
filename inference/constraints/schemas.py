"""The check of JSON schemas: a grammar must be able to enforce all of a schema.

A schema with a keyword that the grammar would not enforce is refused; the error
names the path of the keyword as a JSON pointer. Every answer to a schema that
passes the check is valid JSON of that schema.
"""

from collections.abc import Iterator
import decimal
import json
import math
import re
from typing import Any

from checks import expect
from inference.constraints import constraint

_MOST_DEPTH, _MOST_NODES, _MOST_COUNT = 48, 4000, 2000
# More properties are too many choices for a step of the parser.
_MOST_PROPERTIES = 400
# Patterns that hold at once: 12 of them took 2.6 s to compile, 8 took 5 ms.
_MOST_AT_ONCE = 8
# States of an automaton: 999,983 took 47 s and 324 MB, 1,009 took 25 ms.
_MOST_MULTIPLE = 1000
# The same for schemas that may hold at once: their automata are multiplied.
# Four numbers below 1,000 in `allOf` took .6 s for a mask, and 250 MB.
_MOST_COMMON_MULTIPLE = 10_000
_COMBINING = '$ref', 'allOf', 'anyOf', 'oneOf'
# Keywords whose value is a schema, a list of schemas, or a dict of schemas.
_ONE = 'items', 'additionalProperties'
_LIST = 'anyOf', 'oneOf', 'allOf', 'prefixItems'
_DICT = 'properties', 'patternProperties', '$defs', 'definitions'
_COUNTS = 'minLength', 'maxLength', 'minItems', 'maxItems', 'maxProperties'
_KEPT = (
  *_ONE,
  *_LIST,
  *_DICT,
  *_COUNTS,
  *('$ref', 'type', 'const', 'enum', 'required', 'pattern', 'format'),
  *('minimum', 'maximum', 'exclusiveMinimum', 'exclusiveMaximum'),
  'multipleOf',
)
# Annotations: JSON Schema does not use them to decide whether JSON is valid.
_ANNOTATIONS = (
  *('title', 'description', 'default', 'examples', '$comment', '$schema'),
  *('$id', 'deprecated', 'readOnly', 'writeOnly', 'discriminator'),
)
SUPPORTED = tuple(sorted(_KEPT + _ANNOTATIONS))


def check(schema: Any) -> None:
  """Refuses a schema that a grammar cannot enforce completely.

  Raises:
    ConstraintError: a keyword is not supported, or the schema is too large; the
      message begins with the path in the schema.
  """
  num_nodes = num_at_once = 0
  multiple, combining = 1, ''
  for path, node in _nodes(schema, '#', 0):
    num_nodes += 1
    if num_nodes > _MOST_NODES:
      raise _refused(path, f'more than {_MOST_NODES} schemas', 'fewer')
    if isinstance(node, bool):
      continue
    if not isinstance(node, dict):
      raise _refused(path, expect.shown(node), 'an object or a boolean')
    num_at_once += 'pattern' in node and '/allOf/' in path
    if num_at_once > _MOST_AT_ONCE:
      raise _refused(path, f'more than {_MOST_AT_ONCE} patterns', 'fewer')
    for name, value in node.items():
      where = f'{path}/{_escaped(name)}'
      if name not in SUPPORTED:
        raise _refused(
          where,
          'a keyword that is not supported',
          f'one of {", ".join(SUPPORTED)}',
        )
      if name in _COUNTS and isinstance(value, int) and value > _MOST_COUNT:
        raise _refused(where, value, f'at most {_MOST_COUNT}')
      if name == 'multipleOf':
        if not _digits(value) <= _MOST_MULTIPLE:
          raise _refused(
            where, value, f'a number above 0 of digits up to {_MOST_MULTIPLE}'
          )
        multiple = math.lcm(multiple, int(_digits(value)))
      combining = where if name in _COMBINING else combining
      num = len(value) if isinstance(value, dict) else 0
      if name == 'properties' and num > _MOST_PROPERTIES:
        raise _refused(
          where, f'{num} properties', f'at most {_MOST_PROPERTIES}'
        )
      most = constraint.MOST_CHOICES
      if name == 'enum' and isinstance(value, list) and len(value) > most:
        raise _refused(where, f'{len(value)} values', f'at most {most}')
  if combining and multiple > _MOST_COMMON_MULTIPLE:
    raise _refused(
      combining,
      f'schemas that may hold at once, all multiples of {multiple:,}',
      f'numbers of multipleOf with a multiple up to {_MOST_COMMON_MULTIPLE:,}',
    )


def checked_lark(grammar: str) -> str:
  """Returns a grammar in Lark with its JSON schemas as they were checked.

  Raises:
    ConstraintError: see `check`; the message names the schema by its order.
  """
  parts, end = [], 0
  for index, found in enumerate(re.finditer(r'%json\s*(?={)', grammar), 1):
    if found.start() < end:
      continue  # within a schema
    try:
      schema, stop = json.JSONDecoder().raw_decode(grammar, found.end())
      # Options of the library, which may lie beside the schema.
      check({each: schema[each] for each in schema if each != 'x-guidance'})
    except constraint.ConstraintError as error:
      raise constraint.ConstraintError(
        f'lark: %json, number {index}: {error}'
      ) from None
    except (ValueError, RecursionError):
      raise constraint.ConstraintError(
        f'lark: %json, number {index}: got no JSON, expected a schema'
      ) from None
    parts += grammar[end : found.end()], json.dumps(schema)
    end = stop
  return ''.join((*parts, grammar[end:]))


def _digits(multiple: Any) -> float:
  """Returns the digits of a `multipleOf` as a number; infinity: it is none."""
  if isinstance(multiple, bool) or not isinstance(multiple, int | float):
    return math.inf
  value = decimal.Decimal(repr(multiple))
  if not value.is_finite() or value <= 0:
    return math.inf
  exponent = int(value.as_tuple().exponent)
  return float(value.scaleb(-min(exponent, 0)))


def _nodes(node: Any, path: str, depth: int) -> Iterator[tuple[str, Any]]:
  """Yields all schemas within a schema, with their paths."""
  if depth > _MOST_DEPTH:
    raise _refused(path, 'more nesting', f'at most {_MOST_DEPTH} levels')
  yield path, node
  if not isinstance(node, dict):
    return
  for name in node:
    value, inner = node[name], f'{path}/{_escaped(name)}'
    if name in _ONE:
      yield from _nodes(value, inner, depth + 1)
    elif name in _LIST and isinstance(value, list):
      for index, each in enumerate(value):
        yield from _nodes(each, f'{inner}/{index}', depth + 1)
    elif name in _DICT and isinstance(value, dict):
      for key, each in value.items():
        yield from _nodes(each, f'{inner}/{_escaped(key)}', depth + 1)


def _escaped(name: str) -> str:
  """Returns a part of a JSON pointer (RFC 6901, section 3)."""
  return name[: expect.MOST_SHOWN].replace('~', '~0').replace('/', '~1')


def _refused(path: str, got: Any, expected: str) -> constraint.ConstraintError:
  return constraint.ConstraintError(
    f'{path}: got {got}, expected {expected}; leave it out'
  )
