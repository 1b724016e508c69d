"""Clients that disconnect, engines that fail, servers that stop."""

import concurrent.futures
import contextlib
import copy
import dataclasses
import json
import logging
import socket
import threading
import time

import httpx2
import pytest

from frozen import format as frozen_format
from inference.server import (
  app as app_lib,
  engine_loop as engine_loop_lib,
  service,
)
from tests.helpers.serving import servers

_MODEL = servers.MODEL
_STEP_SECONDS = 0.05
_LONG = {'prompt': 'a', 'model': _MODEL, 'max_tokens': 60, 'ignore_eos': True}


class _Slow:
  """An engine whose steps are slow, and can fail."""

  def __init__(self, engine):
    self._engine = engine
    self.fails = False

  def __getattr__(self, name):
    return getattr(self._engine, name)

  def step(self):
    time.sleep(_STEP_SECONDS)
    if self.fails:
      raise RuntimeError('the device is on fire')
    return self._engine.step()


@pytest.fixture
def slow(generator):
  """Yields a generator with a slow engine; restores the engine afterwards."""
  slow = copy.copy(generator)
  slow.engine = _Slow(generator.engine)
  yield slow
  for request_id in {
    live.request_id for live in generator.engine._live.values()
  }:
    generator.engine.cancel(request_id)
  assert list(generator.engine.run()) == []


def _cancelled(served):
  return served.generator.engine.metrics.value(
    'finished_total', reason='cancelled'
  )


def _as_chat(generator, body):
  """Returns a chat with the same prompt, by a template of the prompt alone."""
  generator.frozen = dataclasses.replace(
    generator.frozen, chat_template='{{ messages[0].content }}'
  )
  messages = [{'role': 'user', 'content': body['prompt']}]
  chat = {**body, 'messages': messages}
  del chat['prompt']
  return chat


def _is_idle(served):
  engine = served.generator.engine
  return not engine.has_work and not engine.manager.gauges().pages_used


@pytest.mark.parametrize('stream', [True, False])
@pytest.mark.parametrize('n', [1, 6])
@pytest.mark.parametrize('path', ['completions', 'chat/completions'])
def test_a_client_that_leaves_frees_its_pages(slow, stream, n, path):
  body = {**_LONG, 'stream': stream, 'n': n}
  if path.startswith('chat'):
    body = _as_chat(slow, body)
  with servers.running(slow) as served:
    engine = slow.engine
    before = _cancelled(served)
    num_steps = engine.metrics.value('engine_steps_total')
    with (
      contextlib.suppress(httpx2.ReadTimeout),
      httpx2.stream(
        'POST', f'{served.url}/v1/{path}', json=body, timeout=0.5
      ) as answer,
    ):
      next(answer.iter_bytes())
    servers.until(lambda: _is_idle(served), seconds=2)
    num_steps = engine.metrics.value('engine_steps_total') - num_steps
    # The request was cancelled: it would have taken at least 60 steps.
    assert 0 < num_steps < 45
    # With n = 6, two sequences still waited for one of four places.
    assert _cancelled(served) == before + n


def test_a_client_that_leaves_disturbs_nobody(slow):
  body = {**_LONG, 'temperature': 0.0, 'max_tokens': 20}
  path, num_live = '/v1/completions', lambda: len(slow.engine._live)
  with (
    servers.running(slow) as served,
    httpx2.Client(base_url=served.url, timeout=30) as http,
    concurrent.futures.ThreadPoolExecutor(1) as pool,
  ):
    alone = http.post(path, json=body).json()
    with http.stream('POST', path, json={**_LONG, 'stream': True}) as leaves:
      arriving = leaves.iter_bytes()  # without this the stream would close
      next(arriving)
      stays = pool.submit(http.post, path, json=body)
      servers.until(lambda: num_live() == 2)
    servers.until(lambda: num_live() == 1)
    assert not stays.done()
    stays = stays.result().json()
  assert stays['choices'][0]['text'] == alone['choices'][0]['text']
  assert stays['choices'][0]['finish_reason'] == 'length'


def test_probes_answer_while_the_engine_works(slow):
  with (
    servers.running(slow) as served,
    httpx2.stream(
      'POST', f'{served.url}/v1/completions', json={**_LONG, 'stream': True}
    ) as answer,
  ):
    arriving = answer.iter_bytes()  # without this the stream would close
    next(arriving)
    for _ in range(5):
      start = time.monotonic()
      assert httpx2.get(f'{served.url}/health').status_code == 200
      # Far less than the three seconds that the answer takes.
      assert time.monotonic() - start < 1
    assert served.generator.engine.has_work


def test_a_failed_engine_fails_what_is_open_and_is_unhealthy(slow, caplog):
  with (
    servers.running(slow) as served,
    httpx2.Client(base_url=served.url, timeout=30) as http,
    concurrent.futures.ThreadPoolExecutor(3) as pool,
  ):
    whole, stream = (
      pool.submit(
        http.post, '/v1/completions', json={**_LONG, 'stream': stream}
      )
      for stream in (False, True)
    )
    chat = pool.submit(
      http.post,
      '/v1/chat/completions',
      json=_as_chat(slow, {**_LONG, 'stream': True}),
    )
    servers.until(lambda: len(slow.engine._live) == 3)
    slow.engine.fails = True
    whole, stream, chat = whole.result(), stream.result(), chat.result()
    later = http.post('/v1/completions', json=_LONG)
    probes = [http.get(path) for path in ('/health', '/ready')]
  assert whole.status_code == 500
  assert whole.headers['x-request-id']
  assert whole.json()['error']['type'] == 'server_error'
  assert 'on fire' not in whole.text
  for each in (stream, chat):
    *_, error = servers.events(each.content)
    assert 'see the server log' in error['error']['message']
  assert later.status_code == 503
  assert later.json()['error']['code'] == 'not_ready'
  for probe in probes:
    assert (probe.status_code, probe.json()) == (503, {'status': 'failed'})
  assert 'the device is on fire' in caplog.text


def test_until_all_is_compiled_it_is_alive_and_not_ready(generator):
  may_load = threading.Event()

  def load():
    assert may_load.wait(30)
    return generator

  loop = engine_loop_lib.EngineLoop(load)
  model = service.ServedModel(_MODEL, loop, generator.frozen.manifest)
  app = app_lib.create_app([model])
  with (
    servers.running_app(app) as url,
    httpx2.Client(base_url=url, timeout=30) as http,
  ):
    assert http.get('/health').status_code == 200
    answer = http.get('/ready')
    assert (answer.status_code, answer.json()['status']) == (503, 'loading')
    assert http.get('/v1/models').json()['data'][0]['id'] == _MODEL
    for answer in (
      http.get('/metrics'),
      http.get('/tokenizer_info'),
      http.post('/v1/completions', json=_LONG),
    ):
      assert answer.status_code == 503
      assert answer.headers['retry-after']
      assert answer.json()['error']['code'] == 'not_ready'
    may_load.set()
    servers.until(lambda: http.get('/ready').status_code == 200)
    assert http.post('/v1/completions', json=_LONG).status_code == 200


@pytest.mark.slow
def test_a_server_that_stops_finishes_what_was_asked(slow):
  with concurrent.futures.ThreadPoolExecutor(1) as pool:
    with servers.running(slow) as served:
      asked = pool.submit(
        httpx2.post, f'{served.url}/v1/completions', json=_LONG, timeout=30
      )
      servers.until(lambda: slow.engine._live)
    answer = asked.result()
  assert answer.json()['choices'][0]['finish_reason'] == 'length'


@pytest.mark.slow
def test_a_server_that_stops_refuses_what_comes_then(slow):
  with concurrent.futures.ThreadPoolExecutor(1) as pool:
    with servers.running(slow) as served:
      url = served.url
      asked = pool.submit(
        httpx2.post, f'{url}/v1/completions', json=_LONG, timeout=30
      )
      servers.until(lambda: slow.engine._live)
      http = httpx2.Client(base_url=url, timeout=30)
      assert http.get('/v1/models').status_code == 200
      served.stop()
      servers.until(lambda: http.get('/ready').status_code == 503)
      # On a connection that was open before, and on a new one.
      for client in (http, httpx2.Client(base_url=url, timeout=30)):
        answer = client.post('/v1/completions', json=_LONG)
        assert answer.status_code == 503, answer.text
        assert int(answer.headers['retry-after']) > 0
        assert answer.headers['x-request-id']
        assert answer.json()['error']['code'] == 'stopped'
        assert client.get('/health').status_code == 200
        client.close()
    answer = asked.result()
  assert answer.json()['choices'][0]['finish_reason'] == 'length'


@pytest.mark.slow
def test_but_not_for_longer_than_it_may(slow, caplog):
  caplog.set_level(logging.INFO, logger='uvicorn.error')
  with concurrent.futures.ThreadPoolExecutor(2) as pool:
    with servers.running(slow, drain_seconds=0.2) as served:
      url = f'{served.url}/v1/completions'
      whole, stream = (
        pool.submit(
          httpx2.post, url, json={**_LONG, 'stream': stream}, timeout=30
        )
        for stream in (False, True)
      )
      servers.until(lambda: len(slow.engine._live) == 2)
      half = socket.create_connection(('127.0.0.1', httpx2.URL(url).port))
      half.sendall(
        b'POST /tokenize HTTP/1.1\r\nhost: a\r\ncontent-type:'
        b' application/json\r\ncontent-length: 9\r\n\r\n{'
      )
      time.sleep(0.1)  # until the server reads the body
    # Streams that ran to their end would have 60 tokens, of 0.05 s each.
    answer, other = whole.result(), half.recv(65536)
    half.close()
  assert other.startswith(b'HTTP/1.1 503 ')
  assert b'retry-after: ' in other
  assert answer.status_code == 503
  assert int(answer.headers['retry-after']) > 0
  assert answer.json()['error']['code'] == 'stopped'
  *pieces, last = servers.events(stream.result().content)
  assert 0 < len(pieces) < 60
  assert last['error']['code'] == 'stopped'
  assert _is_idle(served)
  assert 'unchanged' in caplog.text
  assert 'Traceback' not in caplog.text
  assert not [each for each in caplog.records if each.levelname == 'ERROR']


@pytest.mark.slow
def test_a_client_that_does_not_read_does_not_hold_the_server(
  generator, caplog
):
  body = json.dumps({'prompt': 'x' * 10**6}).encode()
  with servers.running(generator, drain_seconds=0.1) as served:
    client = socket.create_connection(
      ('127.0.0.1', httpx2.URL(served.url).port)
    )
    client.sendall(
      b'POST /tokenize HTTP/1.1\r\nhost: a\r\ncontent-type: application/json'
      b'\r\ncontent-length: %d\r\n\r\n' % len(body) + body
    )
    assert client.recv(10)
  client.close()
  assert 'Traceback' not in caplog.text


def test_memory_is_said_at_start_and_the_digest_is_compared_at_the_end(
  generator, caplog, monkeypatch
):
  caplog.set_level(logging.INFO, logger='uvicorn.error')
  body = {'prompt': 'a', **servers.GREEDY}
  with servers.running(generator) as served:
    httpx2.post(f'{served.url}/v1/completions', json=body, timeout=30)
  assert f's; {generator.memory_text()}' in caplog.text  # the memory, at start
  digest = generator.frozen.manifest.weights_digest
  assert f'weights {digest}: unchanged' in caplog.text
  monkeypatch.setattr(frozen_format, 'weights_digest', lambda _: 'other')
  with servers.running(generator):
    pass
  assert f'weights other: CHANGED, were {digest}' in caplog.text
