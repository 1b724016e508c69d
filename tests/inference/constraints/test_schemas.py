"""Schemas that are refused with their path, and masks that take too long."""

import json

import numpy as np
import pytest

from inference.constraints import (
  constraint as constraint_lib,
  grammars,
  schemas,
)
from text import tokenizer as tokenizer_lib


def _nested(word, num):
  return json.loads(f'{{"{word}":' * num + '{}' + '}' * num)


@pytest.mark.parametrize(
  ('schema', 'words'),
  [
    ({'not': {}}, '#/not: got a keyword that is not supported'),
    ({'properties': {'a/b~': {'if': {}}}}, '#/properties/a~1b~0/if: got'),
    ({'anyOf': [{}, {'uniqueItems': True}]}, '#/anyOf/1/uniqueItems: got'),
    ({'$defs': {'a': 5}}, '#/$defs/a: got 5, expected an object'),
    ({'items': [{}]}, '#/items: got [{}], expected an object'),
    (_nested('items', 60), 'got more nesting, expected at most 48'),
    ({'anyOf': [{}] * 4001}, 'got more than 4000 schemas'),
    ({'enum': list(range(1001))}, '#/enum: got 1001 values'),
    ({'maxLength': 10**6}, '#/maxLength: got 1000000, expected at most 2000'),
    ({'multipleOf': 999983}, '#/multipleOf: got 999983, expected a number'),
    ({'multipleOf': 999.983}, '#/multipleOf: got 999.983'),
    ({'multipleOf': 0}, '#/multipleOf: got 0'),
    (
      {'items': {'multipleOf': 997}, 'anyOf': [{'multipleOf': 991}]},
      '#/anyOf: got schemas that may hold at once, all multiples of 988,027',
    ),
    ({'multipleOf': 1e300}, '#/multipleOf: got 1e+300'),
    ({'properties': dict.fromkeys(map(str, range(401)), {})}, '401 properties'),
    ({'allOf': [{'pattern': 'a'}] * 9}, 'got more than 8 patterns'),
  ],
)
def test_a_schema_that_cannot_be_kept_is_refused_with_its_path(schema, words):
  with pytest.raises(constraint_lib.ConstraintError) as refused:
    schemas.check(schema)
  assert words in str(refused.value)


def test_schemas_that_can_be_kept():
  for schema in (
    True,
    {},
    {'multipleOf': 0.01},
    {'type': 'integer', 'multipleOf': 1000},
    {'items': {'multipleOf': 997}, 'properties': {'a': {'multipleOf': 991}}},
    {'allOf': [{'multipleOf': 0.01}, {'multipleOf': 8}], '$ref': '#/$defs/a'},
    {'title': 'x', 'default': 1, 'anyOf': [{'type': 'null'}, True]},
    {'properties': dict.fromkeys(map(str, range(400)), {})},
  ):
    schemas.check(schema)


def test_schemas_within_lark_are_checked_as_they_are_compiled():
  text = 'start: %json{"title": "x", "minLength": 1} | "%json 5"'
  assert schemas.checked_lark(text) == text
  twice = 'a: %json {"maxLength": 10000, "maxLength": 5, "x-guidance": {}} "b"'
  kept = 'a: %json {"maxLength": 5, "x-guidance": {}} "b"'
  assert schemas.checked_lark(twice) == kept
  for part, words in (
    ('{"maxLength": 10000}', '#/maxLength: got 10000, expected at most 2000'),
    ('{"items": {"not": {}}}', '#/items/not: got a keyword that is not'),
    ('{"items": ', 'got no JSON, expected a schema'),
  ):
    with pytest.raises(constraint_lib.ConstraintError) as refused:
      schemas.checked_lark(f'start: %json {{}} %json {part}')
    assert f'lark: %json, number 2: {words}' in str(refused.value)


@pytest.mark.parametrize('text', ['', 'x' * 100_001])
def test_a_text_of_no_length_or_too_much_is_refused(text):
  with pytest.raises(constraint_lib.ConstraintError, match='characters'):
    constraint_lib.regex(text)


def test_a_sequence_with_slow_masks_ends(monkeypatch):
  pytest.importorskip('llguidance')
  tokenizer = tokenizer_lib.ByteTokenizer()
  grammar = grammars.Grammars(tokenizer).compile(constraint_lib.regex('a+'))
  monkeypatch.setattr(grammars, '_SPARE_SECONDS', -1.0)
  matcher, bits_W = grammar.matcher(), np.zeros(9, np.uint32)
  matcher.fill(bits_W)
  assert 'too long' in matcher.failure
  assert (bits_W == 2**32 - 1).all()
