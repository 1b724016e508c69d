"""A newcomer beside a client that holds as many requests open as it can."""

import contextlib
import dataclasses
import json
import socket
import time

import httpx2
import pytest

from inference import generate
from inference.server.access import api_keys
from tests.helpers.serving import servers
from tests.inference import conftest

_STEP_SECONDS = 0.01
_MAX_WAITING = 64
_LONG = {'prompt': 'a', 'model': servers.MODEL, 'max_tokens': 50}


@pytest.fixture
def keyed(frozen_dir, tmp_path, monkeypatch):
  """A server with a short queue, two keys, and steps that take a while."""
  config = dataclasses.replace(conftest.ENGINE, max_waiting=_MAX_WAITING)
  generator = generate.load(frozen_dir, config)
  step = generator.engine.step

  def slow_step():
    time.sleep(_STEP_SECONDS)
    return step()

  monkeypatch.setattr(generator.engine, 'step', slow_step)
  (tmp_path / 'keys').write_text('many:many-key\nnew:new-key')
  keys = api_keys.read(tmp_path / 'keys')
  with servers.running(generator, keys) as served:
    yield served


def _asked(url, key, stack):
  """Sends a long request, and returns its connection."""
  body = json.dumps({**_LONG, 'ignore_eos': True}).encode()
  port = httpx2.URL(url).port
  client = stack.enter_context(socket.create_connection(('127.0.0.1', port)))
  client.sendall(
    b'POST /v1/completions HTTP/1.1\r\nhost: a\r\ncontent-type:'
    b' application/json\r\nauthorization: Bearer %s\r\ncontent-length:'
    b' %d\r\n\r\n%s' % (key, len(body), body)
  )
  return client


@pytest.mark.slow
def test_a_newcomer_does_not_wait_for_the_many(keyed):
  engine = keyed.generator.engine
  refused = engine.metrics.refused.labels('overloaded')
  num_many = 2 * _MAX_WAITING
  headers = {'authorization': 'Bearer new-key'}
  with contextlib.ExitStack() as stack:
    for _ in range(num_many):
      _asked(keyed.url, b'many-key', stack)
    # Its share of the queue is taken, and all slots; the rest has got a 429.
    servers.until(lambda: refused._value.get() >= num_many // 4)
    servers.until(lambda: engine.num_waiting > _MAX_WAITING // 2)
    for _ in range(3):
      before = engine.metrics.value('engine_steps_total')
      answer = httpx2.post(
        f'{keyed.url}/v1/completions',
        json={**servers.GREEDY, 'prompt': 'b'},
        headers=headers,
        timeout=60,
      )
      assert answer.status_code == 200, answer.text
      took = engine.metrics.value('engine_steps_total') - before
      # Eight tokens and a prompt; the queue ahead is hundreds of steps.
      assert took < 40
      (choice,) = answer.json()['choices']
      assert choice['accounting']['preemptions'] == 0
    assert engine.num_waiting > 8  # it was full all the time
