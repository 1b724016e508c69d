"""/v1/capabilities lists what the server takes, and no value out of range."""

import dataclasses

import pytest

from inference.sampling import settings as settings_lib
from inference.server.api import openapi, shapes
from tests.helpers.serving import json_schema, servers


@pytest.fixture(scope='module')
def capabilities(http):
  return http.get('/v1/capabilities').json()


@pytest.fixture(scope='module')
def document(http):
  return http.get('/openapi.json').json()


def _routes(capabilities):
  return {
    (each['method'].lower(), each['path']): each
    for each in capabilities['routes']
  }


def _of(capabilities, path, method='post'):
  parameters = _routes(capabilities)[method, path]['parameters']
  return {each['name']: each for each in parameters}


def test_every_route_and_every_field_is_listed(capabilities, document):
  shapes.Capabilities.model_validate(capabilities)
  operations = {
    (method, path): operation
    for path, methods in document['paths'].items()
    for method, operation in methods.items()
  }
  routes = _routes(capabilities)
  assert routes.keys() == operations.keys()
  for key, operation in operations.items():
    names = {each['name'] for each in operation.get('parameters', ())}
    if 'requestBody' in operation:
      content = operation['requestBody']['content']['application/json']
      name = content['schema']['$ref'].rpartition('/')[2]
      fields = openapi.bodies()[name].model_fields
      assert fields
      names |= fields.keys()
    assert {each['name'] for each in routes[key]['parameters']} == names


def test_a_parameter_without_support_says_what_it_may_be(capabilities, http):
  found = _of(capabilities, '/v1/completions')
  assert found['best_of']['supported'] is False
  assert found['best_of']['accepted'] == [None, 1]
  assert found['suffix']['accepted'] == [None]
  assert found['temperature']['supported'] is True
  assert found['prompt']['required'] is True
  num = 0
  for (method, path), route in _routes(capabilities).items():
    for each in route['parameters']:
      if each['supported']:
        continue
      num += 1
      assert each['description']
      answer = http.request(method, path, json={each['name']: 'other'})
      assert answer.status_code == 400  # fields that are missing come first
  assert num


def test_a_new_route_reads_its_stream(capabilities):
  answers = _routes(capabilities)['post', '/v1/completions']['answers']
  assert answers == ['application/json', 'text/event-stream']


_BELOW = {
  'minimum': lambda x: x - 1,
  'maximum': lambda x: x + 1,
  'exclusiveMinimum': lambda x: x,
  'exclusiveMaximum': lambda x: x,
}


def _bounds(values):
  for each in values.get('anyOf', [values]):
    for name in _BELOW.keys() & each.keys():
      yield name, each[name]


def _bounded():
  names = {
    field.metadata.get('api_name', field.name)
    for field in dataclasses.fields(settings_lib.Settings)
    if field.metadata.get('limits')
  }
  return sorted(names - {'logit_bias', 'stop', 'stop_token_ids'})


# The other settings with which a value at its bound makes sense.
_WITH = {
  'max_tokens': {'echo': True},
  'n': {'max_tokens': 1},
  'min_tokens': {'max_tokens': None},
}
# Values within the range of the type that do not fit into the tiny context.
_TOO_LARGE_HERE = {'max_tokens', 'min_tokens'}


@pytest.mark.parametrize('name', _bounded())
def test_a_bound_is_the_bound(capabilities, http, name):
  """The value at a bound is taken, and that behind it refused."""
  found = _of(capabilities, '/v1/completions')[name]
  bounds = dict(_bounds(found['values']))
  assert bounds
  base = {'prompt': 'a', **servers.GREEDY, **_WITH.get(name, {})}
  for kind, bound in bounds.items():
    answer = http.post(
      '/v1/completions', json={**base, name: _BELOW[kind](bound)}
    )
    assert answer.status_code == 400, (kind, answer.text)
    assert answer.json()['error']['param'] == name
    if not kind.startswith('exclusive') and name not in _TOO_LARGE_HERE:
      answer = http.post('/v1/completions', json={**base, name: bound})
      assert answer.status_code == 200, (kind, answer.text)


@pytest.mark.parametrize(
  ('name', 'wrong', 'right'),
  [
    ('stop', '', 'x'),
    ('stop', ['x'] * 257, ['x'] * 256),
    ('stop', 'x' * 1025, 'x' * 1024),
    ('stop_token_ids', [-1], [1]),
    ('stop_token_ids', [1] * 17, [1] * 16),
    ('logit_bias', {'5': 101}, {'5': 100}),
    ('logit_bias', {'a': 1}, {'5': 1}),
    ('best_of', 2, 1),
  ],
)
def test_a_limit_of_a_text_or_a_list_is_the_limit(
  capabilities, document, http, name, wrong, right
):
  values = _of(capabilities, '/v1/completions')[name].get('values')
  if values is None:
    values = {'enum': _of(capabilities, '/v1/completions')[name]['accepted']}
  for value, is_right in ((wrong, False), (right, True)):
    assert (not json_schema.faults(value, values, document)) == is_right
    body = {'prompt': 'a', **servers.GREEDY, name: value}
    answer = http.post('/v1/completions', json=body)
    assert (answer.status_code == 200) == is_right, answer.text
