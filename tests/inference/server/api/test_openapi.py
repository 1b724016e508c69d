"""The OpenAPI document says what the server does."""

import json

import httpx2
import pytest

from inference.server.access import api_keys
from inference.server.api import response_shapes, shapes
from tests.helpers.serving import servers
from tests.inference.server.routes import test_feedback


@pytest.fixture(scope='module')
def document(http):
  return http.get('/openapi.json').json()


def _operations(document):
  for path, operations in document['paths'].items():
    for method, operation in operations.items():
      yield path, method, operation


def _references(node):
  if isinstance(node, dict):
    if isinstance(node.get('$ref'), str):
      yield node['$ref']
    for value in node.values():
      yield from _references(value)
  elif isinstance(node, list):
    for value in node:
      yield from _references(value)


def test_every_route_is_described_and_every_reference_leads_somewhere(
  document,
):
  assert document['openapi'].startswith('3.1')
  assert set(document['paths']) == {
    *(
      '/health',
      '/ready',
      '/metrics',
      '/version',
      '/v1/models',
      '/v1/models/{name}',
    ),
    *('/admin/models', '/admin/models/{version}', '/admin/traffic'),
    '/v1/capabilities',
    *(
      '/v1/completions',
      '/v1/chat/completions',
      '/v1/embeddings',
      '/v1/responses',
      '/v1/responses/{response_id}',
      '/v1/responses/{response_id}/input_items',
      '/v1/feedback',
      '/v1/prices',
      '/v1/feedback/{name}',
      '/tokenizer_info',
      '/tokenize',
      '/detokenize',
    ),
  }
  names = [each['operationId'] for _, _, each in _operations(document)]
  assert len(set(names)) == len(names)
  for reference in _references(document):
    node = document
    for part in reference.removeprefix('#/').split('/'):
      node = node[part]


def test_errors_are_those_that_are_sent(document):
  for path, method, operation in _operations(document):
    statuses = set(operation['responses'])
    assert '422' not in statuses
    if method == 'post':
      assert {'400', '404', '408', '413', '503'} <= statuses
      assert 'requestBody' in operation
    for status, answer in operation['responses'].items():
      if int(status) >= 400 and path not in api_keys.OPEN_PATHS:
        (reference,) = _references(answer)
        assert reference.endswith('/Error')
  completions = document['paths']['/v1/completions']['post']['responses']
  assert {'429', '500'} <= set(completions)
  assert 'retry-after' in completions['429']['headers']


def test_each_answer_has_its_type_and_its_shape(document, http):
  body = {'prompt': 'a', **servers.GREEDY, 'logprobs': 2, 'echo': True}
  asked = {
    '/v1/completions': body,
    '/v1/chat/completions': servers.CHAT | {'logprobs': True},
    '/v1/embeddings': {'model': servers.MODEL, 'input': 'a'},
    '/v1/responses': {'model': servers.MODEL, 'input': 'a'},
    '/tokenize': {'prompt': 'a'},
    '/detokenize': {'tokens': [97]},
  }
  stored = http.post('/v1/responses', json=asked['/v1/responses']).json()
  # The ledger knows whose an answer is.
  rated = {
    **test_feedback.SAID,
    'request_id': http.post('/v1/completions', json=body).headers[
      'x-request-id'
    ],
  }
  asked['/v1/feedback'] = rated
  names = {}
  # What is deleted is read first, and one row goes before all others.
  operations = sorted(
    _operations(document),
    key=lambda each: (each[1] == 'delete', '{' not in each[0]),
  )
  for path, method, operation in operations:
    if path.startswith('/admin/'):
      continue  # see tests/inference/server/routes/test_admin.py
    url = path.replace('{name}', names.get(path, servers.MODEL))
    url = url.replace('{response_id}', stored['id'])
    answer = http.request(method.upper(), url, json=asked.get(path))
    assert answer.status_code == 200, answer.text
    if (path, method) == ('/v1/feedback', 'post'):
      names['/v1/feedback/{name}'] = answer.json()['id']
    content = operation['responses']['200']['content']
    kind = answer.headers['content-type'].partition(';')[0]
    assert kind in content
    if kind == 'application/json':
      (reference,) = _references(content[kind])
      name = reference.rpartition('/')[2]
      shape = getattr(shapes, name, None) or getattr(response_shapes, name)
      shape.model_validate(answer.json())
      assert operation['responses'].keys() >= {'200', '503'}
  assert (
    'text/plain'
    in (document['paths']['/metrics']['get']['responses']['200']['content'])
  )


def test_a_stream_is_events_of_chunks(document, http):
  answers = document['paths']['/v1/completions']['post']['responses']
  assert 'text/event-stream' in answers['200']['content']
  body = {
    'prompt': 'a',
    **servers.GREEDY,
    'stream': True,
    'logprobs': 1,
    'stream_options': {'include_usage': True},
  }
  answer = http.post('/v1/completions', json=body)
  for event in servers.events(answer.content):
    shapes.CompletionChunk.model_validate(event)


def test_an_error_has_its_shape(http):
  for answer in (
    http.post('/v1/completions', json={}),
    http.get('/v1/models/other'),
    http.get('/nowhere'),
  ):
    shapes.Error.model_validate(answer.json())


def test_a_method_that_is_not_allowed_is_told_which_is(http):
  for path, method, allowed in (
    ('/v1/completions', 'GET', 'POST'),
    ('/tokenize', 'PUT', 'POST'),
    ('/health', 'POST', 'GET'),
    ('/v1/models/tiny', 'DELETE', 'GET'),
  ):
    answer = http.request(method, path)
    assert answer.status_code == 405
    assert answer.headers['allow'] == allowed
    shapes.Error.model_validate(answer.json())


def test_keys_are_a_security_scheme(document, generator, tmp_path):
  assert 'securitySchemes' not in document['components']
  (tmp_path / 'keys').write_text('alice:key')
  keys = api_keys.read(tmp_path / 'keys')
  with servers.running(generator, keys) as served:
    headers = {'authorization': 'Bearer key'}
    answer = httpx2.get(f'{served.url}/openapi.json', headers=headers)
  keyed = json.loads(answer.content)
  assert keyed['components']['securitySchemes'] == {
    'key': {'type': 'http', 'scheme': 'bearer'}
  }
  for path, _, operation in _operations(keyed):
    is_open = path in api_keys.OPEN_PATHS
    assert operation['security'] == ([] if is_open else [{'key': []}])
    assert ('401' in operation['responses']) == (not is_open)
