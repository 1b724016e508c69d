"""JSON is as a schema says; nothing is fetched, and nothing takes for ever."""

import json

import pytest

from evals.verifiers import json_schema

pytest.importorskip('jsonschema', reason='requirements-rewards.txt')

_SCHEMA = {
  'type': 'object',
  'properties': {
    'name': {'type': 'string'},
    'next': {'$ref': '#'},
    'tags': {'$ref': '#/$defs/tags'},
  },
  'required': ['name'],
  '$defs': {'tags': {'type': 'array', 'items': {'enum': ['a', 'b']}}},
}


@pytest.mark.parametrize(
  ('answer', 'reason'),
  [
    ('{"name": "x", "next": {"name": "y"}}', ''),
    ('Here:\n```json\n{"name": "x", "tags": ["a"]}\n```', ''),
    ('{"name": 3}', "$.name: 3 is not of type 'string'"),
    ('{"name": "x", "next": {}}', "$.next: 'name' is a required property"),
    ('{"name": "x", "tags": ["c"]}', "$.tags[0]: 'c' is not one of"),
    ('{"name": NaN}', "got no JSON ('NaN' is no JSON)"),
    ('{"name": "x"} and more', 'got no JSON (Extra data'),
    ('[' * 100_000, 'got no JSON ('),
    ('', 'got no JSON ('),
  ],
)
def test_the_score_of_an_answer(answer, reason):
  rule, record = json_schema.JsonSchema(), {'schema': json.dumps(_SCHEMA)}
  rule.check(record)
  score = rule(answer, record)
  assert score.value == (not reason)
  assert score.reason.startswith(reason)


def test_regular_expressions_of_a_schema_have_a_limit():
  rule = json_schema.JsonSchema(cpu_seconds=1)
  record = {'schema': {'properties': {'a': {'pattern': '^(a+)+$'}}}}
  rule.check(record)
  assert rule('{"a": "aaa"}', record).value == 1
  assert rule('{"a": "b"}', record).value == 0
  score = rule(json.dumps({'a': 'a' * 40 + '!'}), record)
  assert (score.value, score.failure) == (0.0, 'time')


@pytest.mark.parametrize(
  ('schema', 'said'),
  [
    (None, 'schema: got none, expected a JSON Schema'),
    ({'type': 'objekt'}, 'schema: got .*expected a JSON Schema'),
    ({'$ref': 'http://example.com/a'}, r'\$ref: got .*none is fetched'),
    ({'items': {'$ref': 'file:///etc/passwd'}}, 'none is fetched'),
  ],
)
def test_a_wrong_schema_is_refused(schema, said):
  record = {} if schema is None else {'schema': schema}
  with pytest.raises(ValueError, match=said):
    json_schema.JsonSchema().check(record)


def test_a_reference_is_never_fetched():
  schema = {'$id': 'http://example.com/a', '$ref': 'http://example.com/b'}
  with pytest.raises(ValueError, match='schema: got .*expected a place in it'):
    json_schema.fault_of(schema, 1)
  draft = 'https://json-schema.org/draft/2020-12/schema'
  assert json_schema.fault_of({'$ref': draft}, {'type': 'objekt'})
