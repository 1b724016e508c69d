"""Fifty JSON schemas, of the kinds that people send to servers.

The kinds come from JSONSchemaBench (Geng et al. 2025, arXiv:2501.10868):
calls of functions, settings of programs, records, nested and recursive data.
Each schema is written for this list. Texts and lists are short, so that a
model which draws letters at random comes to an end.
"""

from typing import Any

Schema = dict[str, Any]


def _object(required: bool = True, /, **properties: Any) -> Schema:
  return {
    'type': 'object',
    'properties': properties,
    'required': list(properties) if required else [],
    'additionalProperties': False,
  }


def _list(items: Any, least: int = 0, most: int = 3) -> Schema:
  return {
    'type': 'array',
    'items': items,
    'minItems': least,
    'maxItems': most,
  }


def _integer(low: int, high: int) -> Schema:
  return {'type': 'integer', 'minimum': low, 'maximum': high}


_TEXT = {'type': 'string', 'maxLength': 6}
_WORD = {'type': 'string', 'pattern': '^[a-z]{1,5}$'}
_BOOL = {'type': 'boolean'}
_NULL = {'type': 'null'}
_POINT = _object(x=_integer(-99, 99), y=_integer(-99, 99))


def _format(name: str) -> Schema:
  return {'type': 'string', 'format': name}


_PLAIN: list[Schema] = [
  _BOOL,
  _NULL,
  _TEXT,
  _WORD,
  _integer(-1000, 1000),
  {'type': 'integer', 'exclusiveMinimum': 0, 'exclusiveMaximum': 7},
  {'type': 'integer', 'minimum': 0, 'maximum': 90, 'multipleOf': 3},
  {'type': 'number', 'minimum': 0, 'maximum': 1},
  {'type': ['integer', 'null'], 'minimum': 1, 'maximum': 3},
  {'enum': ['red', 5, None, [1], {'a': 'b'}]},
  {'const': {'kind': 'circle', 'r': 1.5}},
  {'type': 'string', 'minLength': 3, 'maxLength': 3},
  {'type': 'string', 'pattern': '^(GET|PUT) /[a-z]{1,4}$'},
  _format('date'),
  _format('time'),
  _format('date-time'),
  _format('uuid'),
  _format('ipv4'),
]
_LISTS: list[Schema] = [
  _list(_BOOL, 1, 4),
  _list(_integer(0, 9), 2, 2),
  _list(_list(_integer(0, 1), 1, 2), 1, 2),
  _list(_POINT),
  _list({'enum': ['n', 'e', 's', 'w']}, 1),
  {'type': 'array', 'prefixItems': [_WORD, _BOOL], 'items': False},
  _list({'anyOf': [_BOOL, _WORD, _NULL]}),
]
_OBJECTS: list[Schema] = [
  _POINT,
  _object(name=_WORD, age=_integer(0, 120), is_member=_BOOL),
  _object(False, a=_BOOL, b=_BOOL, c=_BOOL),
  _object(city=_WORD, unit={'enum': ['C', 'F']}, days=_integer(1, 7)),
  _object(to=_list(_WORD, 1, 2), subject=_TEXT, urgent=_BOOL),
  _object(query=_TEXT, limit=_integer(1, 50), filters=_list(_WORD)),
  _object(host=_format('ipv4'), port=_integer(1, 65535), tls=_BOOL),
  _object(level={'enum': ['debug', 'info']}, sinks=_list(_WORD, 1)),
  _object(when=_format('date'), who=_list(_object(name=_WORD), 1, 2)),
  _object(**{'a key': _BOOL, 'K\u00f6ln': _integer(0, 3), 'a"b': _NULL}),
  _object(box=_object(low=_POINT, high=_POINT), title=_TEXT),
  _object(a=_object(b=_object(c=_object(d=_object(e=_BOOL))))),
  _object(price={'type': 'number', 'minimum': 0, 'maximum': 99}, sku=_WORD),
  _object(**{f'field_{i}': _BOOL for i in range(20)}),
  {
    'type': 'object',
    'additionalProperties': _integer(0, 9),
    'maxProperties': 2,
  },
  {
    'type': 'object',
    'patternProperties': {'^x-[a-z]{1,3}$': _BOOL},
    'additionalProperties': False,
    'maxProperties': 2,
  },
  {'allOf': [_object(a=_integer(0, 9)) | {'additionalProperties': True}]},
]
_CHOICES: list[Schema] = [
  {
    'anyOf': [
      _object(kind={'const': 'circle'}, r=_integer(1, 9)),
      _object(kind={'const': 'box'}, w=_integer(1, 9), h=_integer(1, 9)),
    ]
  },
  {'anyOf': [_POINT, _list(_integer(0, 9), 2, 2), _NULL]},
  _object(result={'anyOf': [_object(ok=_BOOL), _object(error=_TEXT)]}),
  {
    '$ref': '#/$defs/tree',
    '$defs': {
      'tree': _object(
        v=_integer(0, 9), sub=_list({'$ref': '#/$defs/tree'}, 0, 1)
      )
    },
  },
  {
    '$defs': {
      'chain': _object(
        id=_integer(0, 99), next={'anyOf': [_NULL, {'$ref': '#/$defs/chain'}]}
      )
    },
    'type': 'object',
    'properties': {'head': {'$ref': '#/$defs/chain'}},
    'required': ['head'],
    'additionalProperties': False,
  },
  {
    'definitions': {'unit': {'enum': ['kg', 'm']}},
    **_object(value=_integer(0, 99), unit={'$ref': '#/definitions/unit'}),
  },
  _object(
    tool={'enum': ['add', 'sub']}, arguments=_list(_integer(-9, 9), 2, 2)
  ),
  _object(
    thoughts=_list(_TEXT, 1, 2),
    answer={'anyOf': [_integer(0, 999), _WORD]},
    sure={'type': 'number', 'minimum': 0, 'maximum': 1},
  ),
]
ALL = (*_PLAIN, *_LISTS, *_OBJECTS, *_CHOICES)
