"""The HTTP surface: OpenAI's own client, raw bytes, and everything refused."""

import contextlib
import json
import logging
import threading
import time
from typing import Any

from fastapi import testclient
import httpx2
import openai
import pytest
import uvicorn

from frozen import format as frozen_format
from inference import generate, settings as settings_lib
from inference.server import app as app_lib

_MODEL = 'tiny'
_GREEDY = {'model': _MODEL, 'temperature': 0.0, 'max_tokens': 8}


@contextlib.contextmanager
def _running(generator: Any):
  """Serves on a free loopback port; yields the base URL."""
  config = uvicorn.Config(
    app_lib.create_app(generator, _MODEL),
    host='127.0.0.1',
    port=0,
    log_config=None,
  )
  server = uvicorn.Server(config)
  thread = threading.Thread(target=server.run)
  thread.start()
  try:
    _until(lambda: server.started)
    port = server.servers[0].sockets[0].getsockname()[1]
    yield f'http://127.0.0.1:{port}'
  finally:
    server.should_exit = True
    thread.join(timeout=30)
  assert not thread.is_alive()


def _until(condition, seconds=20):
  deadline = time.monotonic() + seconds
  while not condition():
    assert time.monotonic() < deadline, 'gave up waiting'
    time.sleep(0.01)


@pytest.fixture(scope='module')
def url(generator):
  with _running(generator) as url:
    yield url


@pytest.fixture(scope='module')
def client(url):
  with openai.OpenAI(base_url=f'{url}/v1', api_key='none') as client:
    yield client


@pytest.fixture(scope='module')
def http(generator):
  with testclient.TestClient(app_lib.create_app(generator, _MODEL)) as http:
    yield http


@pytest.fixture(scope='module')
def expected(generator):
  settings = settings_lib.Settings(temperature=0.0, max_tokens=8)
  return generator.generate(['hello'], settings)[0]


def test_health(http):
  answer = http.get('/health')
  assert (answer.status_code, answer.json()) == (200, {'status': 'ok'})


def test_models_tell_their_lineage(client, generator):
  (card,) = client.models.list().data
  assert card == client.models.retrieve(_MODEL)
  assert (card.id, card.object) == (_MODEL, 'model')
  manifest = generator.frozen.manifest
  lineage = card.model_dump()['lineage']
  assert lineage['weights_digest'] == manifest.weights_digest
  assert lineage['step'] == 7
  assert lineage['code_commit'] == 'c0ffee'
  assert lineage['parents'] == manifest.lineage
  with pytest.raises(openai.NotFoundError, match="got 'gpt-4', expected"):
    client.models.retrieve('gpt-4')


def test_a_completion_is_the_generators(client, expected):
  answer = client.completions.create(prompt='hello', **_GREEDY)
  (choice,) = answer.choices
  assert choice.text == expected.text
  assert (choice.index, choice.finish_reason) == (0, 'length')
  assert answer.object == 'text_completion'
  assert answer.id.startswith('cmpl-')
  assert answer.usage.prompt_tokens == 6
  assert answer.usage.completion_tokens == 8
  assert answer.usage.total_tokens == 14


def test_a_stream_joins_to_the_completion(client, expected):
  chunks = list(
    client.completions.create(
      prompt='hello',
      stream=True,
      stream_options={'include_usage': True},
      **_GREEDY,
    )
  )
  *body, last = chunks
  assert ''.join(chunk.choices[0].text for chunk in body) == expected.text
  reasons = [chunk.choices[0].finish_reason for chunk in body]
  assert reasons == [None] * (len(body) - 1) + ['length']
  assert all(chunk.usage is None for chunk in body)
  assert (last.choices, last.usage.completion_tokens) == ([], 8)
  assert len({chunk.id for chunk in chunks}) == 1


def test_the_bytes_of_a_stream(http):
  answer = http.post(
    '/v1/completions', json={'prompt': 'hello', 'stream': True, **_GREEDY}
  )
  assert answer.headers['content-type'].startswith('text/event-stream')
  assert b'\r' not in answer.content
  *events, done, rest = answer.content.split(b'\n\n')
  assert (done, rest) == (b'data: [DONE]', b'')
  for event in events:
    assert event.startswith(b'data: {')
    assert b'\n' not in event
    assert 'usage' not in json.loads(event.removeprefix(b'data: '))


@pytest.mark.parametrize(
  ('prompt', 'texts'),
  [
    ('ab', ['ab']),
    (['ab', 'xyz'], ['ab', 'xyz']),
    ([256, 97, 98], ['ab']),
    ([[256, 97, 98], [256, 120, 121, 122]], ['ab', 'xyz']),
    ('', ['']),
  ],
)
def test_every_form_of_prompt(client, generator, prompt, texts):
  answer = client.completions.create(prompt=prompt, echo=True, **_GREEDY)
  settings = settings_lib.Settings(temperature=0.0, max_tokens=8)
  completions = generator.generate(texts, settings)
  assert [choice.text for choice in answer.choices] == [
    text + completion.text
    for text, completion in zip(texts, completions, strict=True)
  ]
  assert [choice.index for choice in answer.choices] == [*range(len(texts))]


def test_choices_have_seeds_of_their_own_that_reproduce_them(client):
  sampled = {'model': _MODEL, 'max_tokens': 8, 'temperature': 1.0}
  answer = client.completions.create(prompt=['ab', 'c'], n=2, seed=5, **sampled)
  assert [choice.index for choice in answer.choices] == [0, 1, 2, 3]
  assert [choice.seed for choice in answer.choices] == [5, 6, 5, 6]
  assert answer.choices[0].text != answer.choices[1].text
  # BOS + 'ab' and BOS + 'c', each read once.
  assert answer.usage.prompt_tokens == 5
  again = client.completions.create(prompt='ab', seed=6, **sampled)
  assert again.choices[0].text == answer.choices[1].text


def test_several_choices_are_streamed_by_index(http):
  body = {'prompt': ['ab', 'c'], 'echo': True, **_GREEDY}
  whole = http.post('/v1/completions', json=body).json()
  answer = http.post('/v1/completions', json={**body, 'stream': True})
  texts = ['', '']
  for event in answer.content.split(b'\n\n')[:-2]:
    (choice,) = json.loads(event.removeprefix(b'data: '))['choices']
    texts[choice['index']] += choice['text']
  assert texts == [choice['text'] for choice in whole['choices']]


def test_stop_as_a_string_or_a_list(client, expected):
  stop = expected.text[3]
  for form in (stop, [stop], ['nowhere', 'x' * 30, 'y', 'z', stop]):
    answer = client.completions.create(prompt='hello', stop=form, **_GREEDY)
    assert answer.choices[0].text == expected.text[: expected.text.index(stop)]
    assert answer.choices[0].finish_reason == 'stop'


def test_what_is_neutral_or_null_is_accepted(http, expected):
  neutral = {
    'best_of': 1,
    'echo': False,
    'frequency_penalty': 0.0,
    'ignore_eos': False,
    'logit_bias': {},
    'logprobs': None,
    'min_p': 0.0,
    'min_tokens': 0,
    'n': 1,
    'presence_penalty': 0,
    'repetition_penalty': 1.0,
    'seed': None,
    'stop': None,
    'stream': False,
    'stream_options': None,
    'suffix': None,
    'top_k': 0,
    'top_p': 1,
    'user': 'somebody',
  }
  answer = http.post(
    '/v1/completions', json={'prompt': 'hello', **_GREEDY, **neutral}
  )
  assert answer.status_code == 200
  assert answer.json()['choices'][0]['text'] == expected.text


@pytest.mark.parametrize(
  ('fields', 'param', 'message'),
  [
    ({'best_of': 2}, 'best_of', 'got 2, expected None or 1'),
    ({'frequency_penalty': 0.1}, 'frequency_penalty', 'got 0.1, expected'),
    ({'ignore_eos': True}, 'ignore_eos', 'got True, expected None or False'),
    ({'logit_bias': {'50256': -100}}, 'logit_bias', 'does not support it'),
    ({'logprobs': 0}, 'logprobs', 'got 0, expected None; this server does not'),
    ({'min_tokens': 1}, 'min_tokens', 'does not support it'),
    ({'presence_penalty': -1}, 'presence_penalty', 'does not support it'),
    ({'repetition_penalty': 1.1}, 'repetition_penalty', 'does not support it'),
    ({'suffix': ')'}, 'suffix', 'does not support it'),
    ({'tempreature': 1}, 'tempreature', 'does not know'),
    (
      {'stream': True, 'stream_options': {'every': 2}},
      'stream_options',
      'stream_options.every: got a parameter that this server does not know',
    ),
  ],
)
def test_what_is_not_supported_is_refused(http, fields, param, message):
  error = _refused(http, {'prompt': 'a', **_GREEDY, **fields})
  assert error['param'] == param
  assert error['code'] == 'unsupported_parameter'
  assert message in error['message']


@pytest.mark.parametrize(
  ('fields', 'param', 'message'),
  [
    ({'temperature': -1}, 'temperature', 'got -1.0, expected a number >= 0'),
    ({'temperature': '1'}, 'temperature', 'should be a valid number'),
    ({'temperature': True}, 'temperature', 'should be a valid number'),
    ({'top_p': 0}, 'top_p', 'got 0.0, expected a number above 0'),
    ({'top_k': -1}, 'top_k', 'got -1, expected an integer from 0'),
    ({'min_p': 1}, 'min_p', 'got 1.0, expected'),
    ({'seed': -1}, 'seed', 'got -1, expected an integer from 0'),
    ({'max_tokens': 0}, 'max_tokens', 'got 0, expected an integer from 1'),
    ({'stop': ['']}, 'stop', "got ('',), expected strings, none of them"),
    ({'stop': 3}, 'stop', 'should be a valid string; or: '),
    ({'n': 0}, 'n', 'got 0, expected at least 1'),
    ({'n': 65}, 'prompt', 'got 65 completions to make (prompts times n)'),
    ({'prompt': []}, 'prompt', 'got 0 completions to make'),
    ({'prompt': [[]]}, 'prompt', 'got no token ids'),
    ({'prompt': [259]}, 'prompt', 'got token id 259, expected 0 <= id < 259'),
    ({'prompt': 'x' * 60}, 'prompt', 'the context of this model'),
    ({'prompt': {'text': 'a'}}, 'prompt', 'should be a valid string; or: '),
  ],
)
@pytest.mark.parametrize('stream', [False, True])
def test_a_bad_value_is_refused(http, fields, param, message, stream):
  # Streamed or not: nothing is sent before the request is checked.
  body = {'prompt': 'a', 'stream': stream, **_GREEDY, **fields}
  error = _refused(http, body)
  assert error['param'] == param
  assert error['code'] is None
  assert message in error['message']


def test_stream_options_need_a_stream(http):
  options = {'stream_options': {'include_usage': True}}
  error = _refused(http, {'prompt': 'a', **_GREEDY, **options})
  assert error['param'] == 'stream_options'
  assert 'got options without stream' in error['message']


def _refused(http, body, status=400):
  answer = http.post('/v1/completions', json=body)
  assert answer.status_code == status
  assert answer.headers['x-request-id'].startswith('req_')
  error = answer.json()['error']
  assert error['type'] == 'invalid_request_error'
  assert '\n' not in error['message']
  return error


def test_a_body_that_is_no_request_is_refused(http):
  assert 'prompt: Field required' in _refused(http, _GREEDY)['message']
  assert 'got no JSON object' in _refused(http, [])['message']
  for content in (b'{', b'', b'{"model": "tiny", "prompt": "\\ud800"}'):
    answer = http.post(
      '/v1/completions',
      content=content,
      headers={'content-type': 'application/json'},
    )
    assert answer.status_code == 400, answer.content
    assert answer.json()['error']['type'] == 'invalid_request_error'


def test_another_model_is_not_found(client, http):
  error = _refused(http, {'prompt': 'a', **_GREEDY, 'model': 'gpt-4'}, 404)
  assert (error['param'], error['code']) == ('model', 'model_not_found')
  with pytest.raises(openai.NotFoundError) as caught:
    client.completions.create(prompt='a', **{**_GREEDY, 'model': 'gpt-4'})
  assert caught.value.code == 'model_not_found'
  assert (caught.value.request_id or '').startswith('req_')


def test_routes_that_do_not_exist_answer_in_the_same_shape(http):
  for answer in (http.get('/v1/nowhere'), http.get('/v1/completions')):
    assert answer.status_code in (404, 405)
    assert answer.json()['error']['type'] == 'invalid_request_error'


class _Slow:
  """A generator of one token per 20 ms, 500 of them, that can fail."""

  def __init__(self, generator, error_after=None):
    self._error_after = error_after
    self.frozen, self.tokenizer = generator.frozen, generator.tokenizer
    self.settings_for = generator.settings_for
    self.num_steps = 0
    self.num_running = 0
    self.most_running = 0
    self.num_closed = 0

  def updates(self, prompts, settings):
    assert len(prompts) == len(settings) == 1
    return self._updates()

  def _updates(self):
    self.num_running += 1
    self.most_running = max(self.most_running, self.num_running)
    try:
      for step in range(500):
        if step == self._error_after:
          raise RuntimeError('the device is on fire')
        time.sleep(0.02)
        self.num_steps += 1
        yield generate.Update(0, 'x', None)
    finally:
      self.num_running -= 1
      self.num_closed += 1


@pytest.mark.parametrize('stream', [True, False])
def test_a_client_that_leaves_stops_the_generation(generator, stream):
  slow = _Slow(generator)
  body = {'prompt': 'a', 'stream': stream, 'model': _MODEL}
  with _running(slow) as url:
    with (
      contextlib.suppress(httpx2.ReadTimeout),
      httpx2.stream(
        'POST', f'{url}/v1/completions', json=body, timeout=0.5
      ) as answer,
    ):
      next(answer.iter_bytes())
    _until(lambda: slow.num_closed == 1, seconds=5)
  assert 0 < slow.num_steps < 400


def test_health_answers_and_requests_wait_their_turn(generator):
  slow = _Slow(generator)
  body = {'prompt': 'a', 'stream': True, 'model': _MODEL}
  with _running(slow) as url, httpx2.Client(timeout=30) as http:
    with http.stream('POST', f'{url}/v1/completions', json=body) as first:
      next(first.iter_bytes())
      with http.stream('POST', f'{url}/v1/completions', json=body) as second:
        start = time.monotonic()
        assert http.get(f'{url}/health').status_code == 200
        # Far less than the ten seconds that the first one would take.
        assert time.monotonic() - start < 3
        first.close()
        next(second.iter_bytes())
    _until(lambda: slow.num_closed == 2, seconds=5)
  assert slow.most_running == 1


def test_a_fault_of_ours_is_a_500_or_an_event(generator, caplog):
  slow: Any = _Slow(generator, error_after=2)
  body = {'prompt': 'a', 'model': _MODEL}
  with testclient.TestClient(app_lib.create_app(slow, _MODEL)) as http:
    whole = http.post('/v1/completions', json=body)
    stream = http.post('/v1/completions', json={**body, 'stream': True})
  assert whole.status_code == 500
  assert whole.headers['x-request-id']
  assert whole.json()['error']['type'] == 'server_error'
  assert 'on fire' not in whole.text
  *_, event, done, _ = stream.content.split(b'\n\n')
  assert json.loads(event.removeprefix(b'data: '))['error']['message']
  assert done == b'data: [DONE]'
  assert 'the device is on fire' in caplog.text


def test_the_digest_is_compared_when_the_server_stops(
  generator, caplog, monkeypatch
):
  caplog.set_level(logging.INFO, logger='uvicorn.error')
  app = app_lib.create_app(generator, _MODEL)
  with testclient.TestClient(app) as http:
    http.post('/v1/completions', json={'prompt': 'a', **_GREEDY})
  digest = generator.frozen.manifest.weights_digest
  assert f'weights {digest}: unchanged' in caplog.text
  monkeypatch.setattr(frozen_format, 'weights_digest', lambda _: 'other')
  with testclient.TestClient(app_lib.create_app(generator, _MODEL)):
    pass
  assert f'weights other: CHANGED, were {digest}' in caplog.text
