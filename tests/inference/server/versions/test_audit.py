"""The self-audit: silent while all is well, loud where an answer is wrong."""

import copy
import logging
import threading
import types

import httpx2
import jax
import numpy as np
import pytest

from inference import full_forward
from inference.requests import requests as requests_lib
from inference.sampling import logprobs as logprobs_lib
from inference.server import server_config
from inference.server.versions import audit
from tests.helpers.serving import servers

_BODY = {
  'model': servers.MODEL,
  'prompt': 'to be audited',
  'max_tokens': 20,
  'temperature': 1.0,
  'seed': 3,
  'ignore_eos': True,
}


def _metric(url, name, **labels):
  return servers.metric(httpx2.get(f'{url}/metrics').text, name, **labels)


def _ask(url, **fields):
  answer = httpx2.post(
    f'{url}/v1/completions', json={**_BODY, **fields}, timeout=60
  )
  assert answer.status_code == 200, answer.text
  return answer


@pytest.mark.slow
def test_sound_answers_are_scored_again_and_raise_no_alarm(generator, caplog):
  with servers.running(generator, audit_share=1.0) as served:
    for fields in ({}, {'n': 2}, {'logprobs': 3}, {'stream': True}):
      answer = _ask(served.url, **fields)
    # A client that asked for no log-probabilities gets none.
    assert b'"logprobs": null' in answer.content
    servers.until(
      lambda: _metric(served.url, 'audited_sequences_total') == 5, 60
    )
    assert _metric(served.url, 'audited_tokens_total') == 100
    assert _metric(served.url, 'audit_alarms_total') == 0
    largest = _metric(served.url, 'audit_largest_difference')
    assert 0 < largest < full_forward.tolerance('float32')
  assert 'self-audit' not in caplog.text


def _damaging(generator, damage):
  """Returns a generator whose engine is damaged after the first step."""

  class Damaged:
    def __init__(self, engine):
      self._engine, self.num_steps = engine, 0

    def __getattr__(self, name):
      return getattr(self._engine, name)

    @property
    def has_work(self):
      return self._engine.has_work

    def step(self):
      updates = self._engine.step()
      self.num_steps += 1
      if self.num_steps == 2:
        damage(self._engine)
      return updates

  damaged = copy.copy(generator)
  damaged.engine = Damaged(generator.engine)
  return damaged


def _pages(engine):
  """Exchanges the pages of the KV cache, as of another conversation."""
  # By NumPy: the engine's thread is to compile nothing.
  engine._state = engine._state._replace(
    kv_cache=jax.tree.map(
      lambda x: jax.device_put(np.array(x)[::-1].copy()),
      engine._state.kv_cache,
    )
  )


def test_a_wrong_page_raises_the_alarm(generator, caplog):
  damaged = _damaging(generator, _pages)
  with servers.running(damaged, audit_share=1.0) as served:
    answer = _ask(served.url)
    servers.until(lambda: _metric(served.url, 'audit_alarms_total') == 1, 60)
    assert _metric(served.url, 'audit_largest_difference') > 0.1
  generator.engine.manager.clear()  # its prefixes are in the wrong pages
  (record,) = (r for r in caplog.records if 'self-audit' in r.getMessage())
  assert record.levelno == logging.ERROR
  message = record.getMessage()
  assert answer.headers['x-request-id'] in message
  assert 'to be audited' not in message


def test_altered_weights_on_one_path_raise_the_alarm(generator, monkeypatch):
  """The programs compute with weights that the engine does not have."""
  engine = generator.engine
  original = engine._programs.step

  altered = jax.tree.map(lambda x: x * 1.02, engine.params)

  def step(shape, params, state, flat_I):
    return original(shape, altered, state, flat_I)

  monkeypatch.setattr(engine._programs, 'step', step)
  with servers.running(generator, audit_share=1.0) as served:
    _ask(served.url, prompt='altered')
    servers.until(lambda: _metric(served.url, 'audit_alarms_total') == 1, 60)
  engine.manager.clear()


def test_a_threshold_decides_what_is_an_alarm(generator):
  with servers.running(
    generator, audit_share=1.0, audit_threshold=1e-9
  ) as served:
    _ask(served.url)
    servers.until(lambda: _metric(served.url, 'audit_alarms_total') == 1, 60)


def test_it_waits_until_no_request_is_open(generator):
  with servers.running(generator, audit_share=1.0) as served:
    _ask(served.url)
    servers.until(
      lambda: _metric(served.url, 'audited_sequences_total') == 1, 60
    )
    held, is_held = threading.Event(), threading.Event()

    def hold():
      is_held.set()
      held.wait(30)

    served.engine_loop._inbox.put(hold)
    assert is_held.wait(30)
    # Its inbox is not empty: the engine counts as busy.
    served.engine_loop._inbox.put(lambda: None)
    app = served.app
    (auditor,) = app.state.versions._observers
    assert not auditor._may_work()
    held.set()
    servers.until(auditor._may_work)


def _item(auditor, num_prompt=4, num_new=2):
  request = requests_lib.Request(prompt_ids=(1,) * num_prompt)
  loop = types.SimpleNamespace(audit=lambda _: False)  # weights are here
  model = types.SimpleNamespace(hold=lambda: None, engine_loop=loop)
  keep = auditor.observe(model, [request])
  assert keep
  keep(
    0,
    0,
    requests_lib.Completion(
      text='',
      token_ids=[1] * num_new,
      num_text_ids=0,
      finish_reason='length',
      stop_reason=None,
      num_prompt_tokens=num_prompt,
      seed=0,
      logprobs=[logprobs_lib.TokenLogprobs(-1.0, (), ())] * num_new,
      prompt_logprobs=None,
      usage=requests_lib.Usage(),
    ),
  )


def test_its_memory_is_bounded():
  auditor = audit.Auditor(1.0)

  def skipped(reason):
    registry = auditor.metrics.registry
    return registry.get_sample_value('audit_skipped_total', {'reason': reason})

  for _ in range(audit._MOST_WAITING + 3):
    _item(auditor)
  assert len(auditor._waiting) == audit._MOST_WAITING
  assert skipped('busy') == 3
  _item(auditor, num_prompt=audit._MOST_TOKENS)
  assert skipped('too_long') == 1


def test_a_share_of_the_requests_is_audited():
  auditor = audit.Auditor(0.25)
  auditor._random.seed(0)
  found = [auditor.observe(None, []) is not None for _ in range(2000)]
  # Five standard deviations around 500.
  assert 400 < sum(found) < 600
  none = audit.Auditor(0.0)
  none.start()
  assert not none._thread.is_alive()
  assert none.observe(None, []) is None


@pytest.mark.parametrize(
  ('fields', 'message'),
  [
    ({'audit_share': 1.5}, 'server.audit_share: got 1.5, expected 0 to 1'),
    ({'audit_share': float('nan')}, 'server.audit_share: got nan'),
    ({'audit_threshold': -1.0}, 'server.audit_threshold: got -1.0'),
  ],
)
def test_a_wrong_setting_is_refused(fields, message):
  with pytest.raises(ValueError, match=message):
    server_config.ServerConfig(**fields)
