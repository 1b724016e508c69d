"""Hostile bodies: refused by size or at the first error, beside the others."""

import json
import socket
import threading

import pytest

from inference.server.api import (
  completion_schema,
  schema,
  tokenizer_schema,
)
from tests.helpers.serving import servers

_LIMIT = 200_000


@pytest.fixture(scope='module')
def limited(generator):
  with servers.running(
    generator, max_body_bytes=_LIMIT, body_seconds=1.0
  ) as served:
    yield served


def _answer(url, head, body=b''):
  """Sends bytes and returns what arrives until the connection is closed."""
  host, _, port = url.removeprefix('http://').partition(':')
  with socket.create_connection((host, int(port)), timeout=30) as client:
    client.sendall(head + body)
    parts = []
    while part := client.recv(65536):
      parts.append(part)
  return b''.join(parts)


def _head(path, *lines):
  rows = (f'POST {path} HTTP/1.1', 'host: a', *lines, 'connection: close')
  return '\r\n'.join((*rows, 'content-type: application/json', '', '')).encode()


def _chunked(body, size=1000):
  for start in range(0, len(body), size):
    part = body[start : start + size]
    yield b'%x\r\n%s\r\n' % (len(part), part)
  yield b'0\r\n\r\n'


@pytest.mark.parametrize(
  'path', ['/v1/completions', '/tokenize', '/detokenize']
)
def test_a_body_over_the_limit_is_refused_however_it_is_sent(limited, path):
  body = b'{"prompt": "' + b'x' * _LIMIT + b'"}'
  announced = _head(path, 'content-length: 100000000000')
  for head, rest in (
    (announced, b''),  # before the body arrives
    (_head(path, f'content-length: {len(body)}'), body),
    (_head(path, 'transfer-encoding: chunked'), b''.join(_chunked(body))),
  ):
    answer = _answer(limited.url, head, rest)
    assert answer.startswith(b'HTTP/1.1 413 '), answer
    assert b'got more than 200000 bytes, expected' in answer


@pytest.mark.slow
def test_a_body_that_does_not_end_is_given_up(limited):
  head = _head('/v1/completions', 'content-length: 10')
  assert _answer(limited.url, head, b'{').startswith(b'HTTP/1.1 408 ')
  head = _head('/v1/completions', 'transfer-encoding: chunked')
  assert _answer(limited.url, head, b'9\r\n').startswith(b'HTTP/1.1 408 ')


def test_a_body_that_a_web_page_can_send_is_refused(http):
  content = json.dumps({'prompt': 'a', **servers.GREEDY})
  for kind in ('text/plain', 'application/x-www-form-urlencoded', ''):
    answer = http.post(
      '/v1/completions', content=content, headers={'content-type': kind}
    )
    assert answer.status_code == 400
    assert 'expected application/json' in answer.json()['error']['message']


def test_a_prompt_that_cannot_fit_is_refused_unseen(http, served, monkeypatch):
  def encode(*_):
    raise AssertionError('tokenized')

  tokenizer = served.generator.tokenizer
  monkeypatch.setattr(tokenizer, 'encode', encode, raising=False)
  monkeypatch.setattr(tokenizer, 'encode_batch', encode, raising=False)
  for prompt, unit in (
    ('x' * 10**6, 'characters'),
    (['a', 'x' * 65], 'characters'),
    ([1] * 65, 'token ids'),
    ([-1] * 10**4, 'token ids'),
    ([[1] * 65], 'token ids'),
  ):
    body = {**servers.GREEDY, 'prompt': prompt}
    answer = http.post('/v1/completions', json=body)
    assert answer.status_code == 400
    error = answer.json()['error']
    assert error['param'] == 'prompt'
    assert f'{unit}, expected at most 64' in error['message']


def test_a_prompt_is_tokenized_once(http, served, monkeypatch):
  tokenizer, texts = served.generator.tokenizer, []

  def encode_batch(many):
    texts.extend(many)
    return type(tokenizer).encode_batch(tokenizer, many)

  monkeypatch.setattr(tokenizer, 'encode_batch', encode_batch, raising=False)
  body = {**servers.GREEDY, 'prompt': ['ab', 'c'], 'max_tokens': 1}
  assert http.post('/v1/completions', json=body).status_code == 200
  assert texts == ['ab', 'c']


def test_long_texts_wait_for_each_other_and_nothing_else_waits(
  http, served, monkeypatch
):
  """Probes, short texts and streams run while two long texts are encoded."""
  tokenizer = served.generator.tokenizer
  may_end, started = threading.Event(), []

  def encode_batch(texts):
    if len(texts[0]) > 1000:
      started.append(threading.current_thread().name)
      assert may_end.wait(60)
    return type(tokenizer).encode_batch(tokenizer, texts)

  monkeypatch.setattr(tokenizer, 'encode_batch', encode_batch, raising=False)
  long = {'prompt': 'x' * 10**6}
  answers = []
  clients = [
    threading.Thread(
      target=lambda: answers.append(http.post('/tokenize', json=long))
    )
    for _ in range(2)
  ]
  for client in clients:
    client.start()
  servers.until(lambda: started)
  try:
    for _ in range(10):
      assert http.get('/health').status_code == 200
    body = {**servers.GREEDY, 'prompt': 'a', 'stream': True}
    assert http.post('/v1/completions', json=body).status_code == 200
    assert http.post('/tokenize', json={'prompt': 'a'}).status_code == 200
    assert len(started) == 1  # the second waits
    assert not answers
  finally:
    may_end.set()
  for client in clients:
    client.join()
  assert [answer.json()['count'] for answer in answers] == [10**6 + 1] * 2
  assert all(name.startswith('long-text') for name in started)


def test_only_tiny_texts_need_no_thread(http, served, monkeypatch):
  tokenizer, threads = served.generator.tokenizer, []

  def encode_batch(texts):
    threads.append(threading.current_thread().name)
    return type(tokenizer).encode_batch(tokenizer, texts)

  monkeypatch.setattr(tokenizer, 'encode_batch', encode_batch, raising=False)
  for length in (10, 2_000, 100_000):
    answer = http.post('/tokenize', json={'prompt': 'x' * length})
    assert answer.status_code == 200
  tiny, short, long = threads
  assert 'text' not in tiny
  assert short.startswith('text')
  assert long.startswith('long-text')


# A field, its JSON, and the most errors that pydantic may report.
_WRONG = {
  'floats': b'{"prompt":[%s]}' % b','.join([b'1.5'] * 10**5),
  'late': b'{"prompt":[%s,"a"]}' % b','.join([b'1'] * 10**5),
  'lists': b'{"prompt":[%s]}' % b','.join([b'[1.5,2.5]'] * 10**5),
  'empty lists': b'{"prompt":[%s]}' % b','.join([b'[]'] * 10**5),
  'stops': b'{"prompt":"a","stop":[%s]}' % b','.join([b'1'] * 10**5),
  'strings': b'{"prompt":"a","stop":[%s]}' % b','.join([b'"a"'] * 10**5),
  'ids': b'{"prompt":"a","stop_token_ids":[%s]}' % b','.join([b'{}'] * 10**5),
  'biases': b'{"prompt":"a","logit_bias":{%s}}'
  % b','.join(b'"%d":"x"' % i for i in range(5 * 10**4)),
  'many biases': b'{"prompt":"a","logit_bias":{%s}}'
  % b','.join(b'"%d":1' % i for i in range(5 * 10**4)),
  'unknown': b'{"model":"tiny","prompt":"a",%s}'
  % b','.join(b'"k%d":1' % i for i in range(5 * 10**4)),
  'nested': b'{"model":"tiny","prompt":"a","stream_options":{%s}}'
  % b','.join(b'"k%d":1' % i for i in range(5 * 10**4)),
  'deep': b'{"prompt":%s' % (b'[' * 10**5),
  'deep objects': b'{"prompt":%s' % (b'{"a":' * 10**5),
  'digits': b'{"prompt":"a","seed":%s}' % (b'9' * 10**5),
  'surrogate': b'{"prompt":"\\ud800"}',
  'no UTF-8': b'{"prompt":"\xff"}',
}


@pytest.mark.parametrize('name', _WRONG)
def test_the_first_error_is_reported(name, http, monkeypatch):
  reported = []
  report = schema.from_validation

  def counted(errors):
    reported.append(len(errors))
    return report(errors)

  monkeypatch.setattr(schema, 'from_validation', counted)
  answer = http.post(
    '/v1/completions',
    content=_WRONG[name],
    headers={'content-type': 'application/json'},
  )
  assert answer.status_code == 400, answer.text
  assert len(answer.content) < 2000
  # One per field that is missing, and per alternative of a type. None if the
  # body has too many parts to be parsed.
  assert all(num <= 8 for num in reported)


@pytest.mark.parametrize(
  ('path', 'body', 'message'),
  [
    ('/v1/completions', b'{"prompt":[%s1]}' % (b'1,' * 10**5), '100000 values'),
    ('/v1/completions', b'{"prompt":[%s]}' % (b'[],' * 9000), '9002 lists and'),
    ('/v1/completions', b'{"a":' * 9000, '9000 lists and objects'),
    ('/v1/completions', b'[%s' % (b'"\\\\","\\"",' * 10**4), '20000 strings'),
    ('/tokenize', b'{"prompt":%s' % (b'[' * 10**6), '1000001 lists and'),
    ('/detokenize', b'{"tokens":[%s1]}' % (b'1,' * 10**5), '100000 values'),
    ('/detokenize', b'{%s}' % (b'"a":1,' * 13000), '13000 strings'),
  ],
)
def test_a_body_of_too_many_parts_is_not_parsed(
  http, monkeypatch, path, body, message
):
  """Nothing else runs while a parser makes a million values."""

  def parse(*_):
    raise AssertionError('parsed')

  for kind in (
    completion_schema.CompletionRequest,
    tokenizer_schema.TokenizeRequest,
    tokenizer_schema.DetokenizeRequest,
  ):
    monkeypatch.setattr(kind, 'model_validate_json', parse)
  answer = http.post(
    path, content=body, headers={'content-type': 'application/json'}
  )
  assert answer.status_code == 400
  assert f'body: got {message}' in answer.json()['error']['message']


@pytest.mark.parametrize(
  'text', ['[{,', '\\', '\\"', '"', '\\\\"[,', '\u00e9"']
)
def test_a_text_may_have_what_looks_like_parts(http, text):
  body = {'prompt': text * 30_000}
  answer = http.post('/tokenize', json=body)
  assert answer.json()['count'] == 1 + len(body['prompt'].encode())
  ids = answer.json()['tokens'][1:]
  assert bytes(ids).decode() == body['prompt']


@pytest.mark.parametrize(
  ('fields', 'message'),
  [
    ({'stop': ['a'] * 257}, 'stop: got 257, expected at most 256 strings'),
    ({'stop': 'x' * 1025}, 'stop: got 1025, expected at most 1024 characters'),
    ({'model': 'm' * 10**5}, "model: got 'mmm"),
    ({'suffix': 's' * 10**5}, "suffix: got 'sss"),
    ({'k' * 10**5: 1}, 'kkk'),
    ({'a\nb\x1b[31m': 1}, 'a\\nb\\x1b[31m: got a parameter'),
    ({'logit_bias': {'x' * 10**5: 1}}, "logit_bias: got 'xxx"),
    ({'stop_token_ids': [-1] * 4000}, 'stop_token_ids: got (-1, -1,'),
    ({'n': 10**4000}, 'n: got'),
    ({'seed': 10**4000}, 'seed: got an integer of 13288 bits'),
  ],
)
def test_an_error_repeats_little_of_the_request(http, fields, message):
  body = {'prompt': 'a', **servers.GREEDY, **fields}
  answer = http.post('/v1/completions', json=body)
  assert answer.status_code in (400, 404)
  error = answer.json()['error']
  assert message in error['message']
  assert len(answer.content) < 1500
  assert error['message'].isprintable()


def test_the_log_repeats_little_of_the_request(http, caplog):
  caplog.set_level('INFO')
  user = 'u\n\x1b' * 10**4
  body = {'prompt': 'a', **servers.GREEDY, 'user': user}
  assert http.post('/v1/completions', json=body).status_code == 200
  assert http.get('/' + 'p' * 10**4).status_code == 404
  assert 'cmpl-' in caplog.text
  assert 'GET /ppp' in caplog.text
  for record in caplog.records:
    if not record.name.startswith('uvicorn'):
      continue  # of the client
    assert len(record.getMessage()) < 700
    assert record.getMessage().isprintable()
