"""Every status of every route in the OpenAPI document is sent, as described."""

import contextlib
import json
import threading

import httpx2
import pytest

from inference.engine import engine as engine_lib
from inference.server import service as service_lib
from inference.server.access import api_keys
from inference.server.routes import feedback
from tests.helpers.serving import json_schema, servers
from tests.inference.server.routes import test_feedback

_MOST = 5000  # bytes of a body
_OPEN = api_keys.OPEN_PATHS
_GOOD = {
  '/v1/chat/completions': servers.CHAT,
  '/v1/completions': {'prompt': 'a', **servers.GREEDY},
  '/v1/embeddings': {'model': servers.MODEL, 'input': 'a'},
  '/v1/responses': {'model': servers.MODEL, 'input': 'a'},
  '/v1/feedback': dict(test_feedback.SAID),
  '/tokenize': {'prompt': 'a'},
  '/detokenize': {'tokens': [97]},
}


class _Answers:
  """The answers of a server to each operation of its document."""

  def __init__(self, url):
    headers = {'authorization': 'Bearer key'}
    self.http = httpx2.Client(base_url=url, headers=headers, timeout=60)
    self.document = self.http.get('/openapi.json').json()
    self.found = {}
    self.response_id = 'resp_none'
    self.expected = {
      (path, method, int(status))
      for path, operations in self.document['paths'].items()
      for method, operation in operations.items()
      for status in operation['responses']
      if not path.startswith(
        '/admin/'
      )  # see tests/inference/server/routes/test_admin.py
    }

  def store(self):
    """Makes a response that can be read."""
    made = self.http.post('/v1/responses', json=_GOOD['/v1/responses'])
    self.response_id = made.json()['id']

  def ask(self, status, path=None, content=None, **options):
    """Asks the operations that have a status, with a body that is right."""
    # What is deleted is read first, and one row goes before all others.
    for each, method, other in sorted(
      self.expected,
      key=lambda key: (key[1] == 'delete', '{' not in key[0], key),
    ):
      if other != status or (path and each != path):
        continue
      if status == 400 and method != 'post':
        options = {'params': {'other': 'x'}}
      body = None if content else _GOOD.get(each)
      url = each.replace('{name}', servers.MODEL)
      url = url.replace('{response_id}', self.response_id)
      if (each, status) == ('/v1/feedback/{name}', 200):
        stored = self.found['/v1/feedback', 'post', 200]
        url = each.replace('{name}', stored['id'])
      with contextlib.suppress(httpx2.HTTPError):
        answer = self.http.request(
          method,
          url,
          content=content and content(),
          **{'json': body, **options},
        )
        self.keep((each, method, status), answer)

  def keep(self, operation, answer):
    path, method, status = operation
    assert answer.status_code == status, (operation, answer.text)
    described = self.document['paths'][path][method]['responses'][str(status)]
    kind = answer.headers['content-type'].partition(';')[0]
    schema = described['content'][kind]['schema']
    value = answer.json() if kind == 'application/json' else answer.text
    assert not json_schema.faults(value, schema, self.document), answer.text
    for name in described.get('headers', {}):
      assert name in answer.headers
    self.found[operation] = value
    if operation == ('/v1/completions', 'post', 200):
      # Feedback is on an answer that the ledger knows.
      _GOOD['/v1/feedback']['request_id'] = answer.headers['x-request-id']


@contextlib.contextmanager
def _served(generator, tmp_path, **limits):
  (tmp_path / 'keys').write_text('alice:key')
  keys = api_keys.read(tmp_path / 'keys')
  with servers.running(generator, keys, **limits) as served:
    answers = _Answers(served.url)
    try:
      yield served, answers
    finally:
      answers.http.close()


def _refusals(served, answers, monkeypatch):
  """Asks what a client can be refused for."""
  json_type = {'content-type': 'application/json'}
  answers.ask(400, content=lambda: b'{}', headers=json_type)
  answers.ask(401, headers={'authorization': 'Bearer other'})
  for other in (200, 409):  # a good body, then another one
    spaces = ' ' * (other == 409)
    for path, body in _GOOD.items():
      answer = answers.http.post(
        path,
        content=json.dumps(body) + spaces,
        headers={**json_type, 'idempotency-key': 'once'},
      )
      answers.keep((path, 'post', other), answer)
  large = b' ' * (_MOST + 1)
  answers.ask(413, content=lambda: large, headers=json_type)
  answers.ask(408, content=_half, headers=json_type)
  for path, body in _GOOD.items():
    answers.ask(404, path, json={**body, 'model': 'other'})
  answer = answers.http.get('/v1/models/other')
  answers.keep(('/v1/models/{name}', 'get', 404), answer)
  answers.response_id = 'resp_none'
  answers.ask(404, '/v1/responses/{response_id}')
  answers.ask(404, '/v1/responses/{response_id}/input_items')
  answer = answers.http.delete('/v1/feedback/other')
  answers.keep(('/v1/feedback/{name}', 'delete', 404), answer)
  with monkeypatch.context() as patched:

    def submit_all(_):
      raise engine_lib.Overloaded('full')

    engine = served.generator.engine
    patched.setattr(engine, 'submit_all', submit_all)
    answers.ask(429)


def _half():
  """Yields a part of a body, and more when it is too late."""
  yield b'{'
  threading.Event().wait(1.0)
  yield b'}'


def _failures(served, answers, monkeypatch):
  """Asks while the server has no place, then while its engine fails."""
  is_held, may_end, protocols = threading.Event(), threading.Event(), []

  def hold():
    is_held.set()
    may_end.wait()

  served.engine_loop._inbox.put(hold)
  assert is_held.wait(60)  # from here on, the inbox has the next request alone
  body = {**_GOOD['/v1/completions'], 'stream': True}
  holder = threading.Thread(
    target=lambda: protocols.append(
      httpx2.post(
        f'{served.url}/v1/completions',
        json=body,
        headers={'authorization': 'Bearer key'},
        timeout=60,
      )
    )
  )
  holder.start()
  servers.until(lambda: served.engine_loop._inbox.qsize())
  answers.http.close()
  answers.http = httpx2.Client(
    base_url=served.url, headers={'authorization': 'Bearer key'}, timeout=60
  )
  for path, _, status in sorted(answers.expected):
    if status == 503 and path not in _OPEN:
      answers.ask(503, path)
  may_end.set()
  holder.join()

  def step():
    raise RuntimeError('the device is on fire')

  async def submit(*_):
    step()

  with monkeypatch.context() as patched:
    patched.setattr(service_lib.ServedModel, 'submit', submit)
    answers.ask(500)
  # The engine fails once: then it is not ready any more.
  monkeypatch.setattr(served.generator.engine, 'step', step)
  answers.ask(500, '/v1/completions')
  for path in _OPEN:
    answers.ask(503, path)


@pytest.mark.slow
def test_every_answer_is_as_described(generator, tmp_path, monkeypatch):
  limits = {'max_body_bytes': _MOST, 'body_seconds': 0.3}
  with _served(generator, tmp_path, **limits) as (served, answers):
    answers.store()
    answers.ask(403)
    monkeypatch.setattr(feedback, 'is_allowed', lambda *_: True)
    answers.ask(200)
    _refusals(served, answers, monkeypatch)
  with _served(generator, tmp_path, max_connections=1) as (served, others):
    _failures(served, others, monkeypatch)
  found = answers.found | others.found
  assert found.keys() == answers.expected
  monkeypatch.undo()
  for live in list(generator.engine._live.values()):
    generator.engine.cancel(live.request_id)
  assert list(generator.engine.run()) == []


def test_a_body_is_as_described_or_refused(generator, tmp_path):
  """The document refuses no body that the server takes."""
  with _served(generator, tmp_path) as (_, answers):
    schemas = answers.document['components']['schemas']
    schema = schemas['CompletionRequest']
    for fields, is_right in (
      ({}, True),
      ({'prompt': [97]}, True),
      ({'prompt': ['a', 'b'], 'n': 2}, True),
      ({'prompt': [[97], [98]]}, True),
      ({'logit_bias': {'97': 1.5}, 'stop': ['b'], 'seed': 2**64 - 1}, True),
      ({'stop': 'b', 'top_k': -1, 'user': 'u', 'logprobs': 2}, True),
      ({'stream': True, 'stream_options': {'include_usage': True}}, True),
      ({'prompt': 5}, False),
      ({'prompt': [1.5]}, False),
      ({'max_tokens': '5'}, False),
      ({'echo': 1}, False),
      ({'logit_bias': {'97': 'x'}}, False),
      ({'stream_options': {'other': True}, 'stream': True}, False),
      ({'other': 1}, False),
    ):
      body = {**_GOOD['/v1/completions'], **fields}
      faults = json_schema.faults(body, schema, answers.document)
      answer = answers.http.post('/v1/completions', json=body)
      assert (not faults) == is_right, (fields, faults)
      assert (answer.status_code == 200) == is_right, answer.text


@pytest.mark.slow
def test_a_chat_is_as_described_or_refused(generator, tmp_path):
  path, user = '/v1/chat/completions', {'role': 'user', 'content': 'a'}
  function = {'name': 'f', 'arguments': '{}'}
  call = {'id': 'x', 'type': 'function', 'function': function}
  said = {'role': 'assistant', 'content': 'b', 'reasoning_content': 'c'}
  with _served(generator, tmp_path) as (_, answers):
    schemas = answers.document['components']['schemas']
    for fields, is_right in (
      ({}, True),
      ({'messages': [user, said, user]}, True),
      ({'messages': [{**said, 'refusal': None, 'annotations': []}]}, True),
      (
        {'messages': [{**user, 'content': [{'type': 'text', 'text': 'a'}]}]},
        True,
      ),
      ({'logprobs': True, 'top_logprobs': 2, 'n': 2, 'stop': ['x']}, True),
      ({'tool_choice': 'none', 'response_format': {'type': 'text'}}, True),
      ({'store': False, 'metadata': {}, 'modalities': ['text']}, True),
      ({'stream': True, 'stream_options': {'include_usage': True}}, True),
      ({'max_completion_tokens': 2, 'max_tokens': None, 'seed': -1}, True),
      ({'messages': [{**user, 'role': 'critic'}]}, False),
      ({'messages': [{**user, 'content': 5}]}, False),
      ({'messages': [{**said, 'tool_calls': [{**call, 'id': 5}]}]}, False),
      ({'messages': [{**said, 'audio': {'id': 'x'}}]}, False),
      ({'logprobs': 1}, False),
      ({'tool_choice': 'always'}, False),
      ({'response_format': {'type': 'json_object'}}, True),
      ({'response_format': {'type': 'json_schema'}}, False),
      ({'structured_outputs': {'regex': 'a+'}}, True),
      ({'structured_outputs': {'regex': 5}}, False),
      ({'guided_regex': 'a+'}, False),
      ({'store': True}, False),
      ({'metadata': {'a': 'b'}}, False),
      ({'prompt': 'a'}, False),
    ):
      body = {**servers.CHAT, **fields}
      faults = json_schema.faults(
        body, schemas['ChatRequest'], answers.document
      )
      answer = answers.http.post(path, json=body)
      assert (not faults) == is_right, (fields, faults)
      assert (answer.status_code == 200) == is_right, answer.text


def test_the_checker_finds_faults():
  document = {'components': {'schemas': {'A': {'type': 'integer'}}}}
  for value, schema in (
    (True, {'$ref': '#/components/schemas/A'}),
    ({}, {'type': 'object', 'required': ['x']}),
    ({'x': 1}, {'type': 'object', 'additionalProperties': False}),
    (['a'], {'type': 'array', 'items': {'type': 'integer'}}),
    ([1, 2], {'type': 'array', 'maxItems': 1}),
    (None, {'anyOf': [{'type': 'string'}, {'type': 'integer'}]}),
    ('a', {'const': 'b'}),
  ):
    assert json_schema.faults(value, schema, document), (value, schema)
  with pytest.raises(ValueError, match='not'):
    json_schema.faults(1, {'not': {}}, document)
  assert json.dumps(document)  # a document is JSON
