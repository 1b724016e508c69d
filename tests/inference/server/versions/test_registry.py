"""Several versions on one server: found, weighed, drained, really unloaded."""

import concurrent.futures
import gc
import itertools
import logging
import threading

import jax
import pytest

from inference.sampling import settings as settings_lib
from tests.helpers.serving import servers

_MODEL = servers.MODEL
_GREEDY = settings_lib.Settings(temperature=0.0, max_tokens=8)


def _text(answer):
  assert answer.status_code == 200, answer.text
  return answer.json()['choices'][0]['text']


def _bytes():
  gc.collect()
  return sum(each.nbytes for each in jax.live_arrays())


@pytest.mark.slow
def test_a_version_is_loaded_beside_weighed_pinned_and_unloaded(versions):
  before, old = _bytes(), _text(versions.complete())
  second = versions.load('v2')
  assert second == f'{_MODEL}@{versions.digests["v2"][:16]}'
  assert versions.state(second) == 'ready'
  assert _bytes() > before
  # It answers nothing but its own name until it is given a weight.
  assert _text(versions.complete()) == old
  pinned = versions.complete(model=second)
  new = _text(pinned)
  assert new != old
  assert pinned.headers['x-model-version'] == second
  fingerprint = pinned.json()['system_fingerprint']
  assert fingerprint.startswith(versions.digests['v2'][:16])
  versions.send({second: 1})
  assert _text(versions.complete()) == new
  # Rolled back.
  versions.send({versions.first: 1, second: 0})
  assert _text(versions.complete()) == old
  assert versions.complete().json()['system_fingerprint'] != fingerprint
  versions.unload(second)
  gone = versions.complete(model=second)
  assert (gone.status_code, gone.json()['error']['code']) == (
    404,
    'model_not_found',
  )
  # Waits, since other threads of the process run meanwhile.
  servers.until(lambda: _bytes() <= before)
  assert _text(versions.complete()) == old


@pytest.mark.slow
def test_models_lists_all_versions_with_their_lineage(versions):
  (alone,) = versions.http.get('/v1/models').json()['data']
  assert (alone['id'], alone['version']) == (_MODEL, versions.first)
  second = versions.load('v2')
  cards = versions.http.get('/v1/models').json()['data']
  assert [each['id'] for each in cards] == [_MODEL, versions.first, second]
  digests = [each['lineage']['weights_digest'] for each in cards]
  assert digests[2] == versions.digests['v2']
  assert digests[0] == digests[1] != digests[2]
  for each in cards:
    assert versions.http.get(f'/v1/models/{each["id"]}').json() == each
  # What is equal is told apart from what is not.
  one, other = (each['digests'] for each in cards[1:])
  assert one['weights'] != other['weights']
  for part in ('tokenizer', 'config', 'numerics'):
    assert one[part] == other[part]


@pytest.mark.parametrize(
  ('change', 'status'),
  [
    (lambda digest: digest[:8], 200),
    (lambda digest: digest, 200),
    (lambda digest: digest[:16].upper(), 200),
    (lambda digest: digest[:7], 404),
    (lambda digest: '0' * 8, 404),
    (lambda digest: '', 404),
    (lambda digest: digest + '0', 404),
  ],
)
def test_a_digest_answers_or_is_not_found(versions, generator, change, status):
  digest = change(generator.frozen.manifest.weights_digest)
  answer = versions.complete(model=f'{_MODEL}@{digest}')
  assert answer.status_code == status, answer.text


@pytest.mark.slow
def test_requests_in_flight_finish_on_the_weights_they_began_with(versions):
  expected = versions.served.offline(
    ['a'], settings_lib.Settings(temperature=0.0, max_tokens=50)
  )
  second = versions.load('v2')
  held = threading.Event()
  versions.served.engine_loop._inbox.put(lambda: held.wait(30))
  with concurrent.futures.ThreadPoolExecutor(1) as pool:
    asked = pool.submit(versions.complete, 'a', max_tokens=50)
    servers.until(
      lambda: (
        versions.http.get(f'/admin/models/{versions.first}').json()[
          'num_requests'
        ]
        == 1
      )
    )
    versions.send({second: 1})
    answer = versions.http.delete(f'/admin/models/{versions.first}')
    assert (answer.status_code, answer.json()['state']) == (202, 'draining')
    # It drains: new requests go elsewhere, even by its digest.
    assert versions.complete(model=versions.first).status_code == 404
    assert versions.complete().headers['x-model-version'] == second
    assert not asked.done()
    with versions.keeping_the_engine():
      held.set()
      assert _text(asked.result()) == expected[0].text
      servers.until(lambda: versions.state(versions.first) is None)
  assert _text(versions.complete()) == _text(versions.complete(model=second))


def test_a_prefix_cache_belongs_to_one_digest(versions):
  second = versions.load('v2')
  prompt = 'a prefix of more than one page'

  def cached(model):
    usage = versions.complete(prompt, model=model).json()['usage']
    return usage['prompt_tokens_details']['cached_tokens']

  assert cached(versions.first) == 0
  assert cached(versions.first) > 0
  assert cached(second) == 0
  assert cached(second) > 0


def test_the_choice_can_be_explained_and_a_conversation_sticks(versions):
  second = versions.load('v2')
  versions.send({versions.first: 1, second: 1})

  def answering(headers=None):
    return versions.complete(headers=headers).headers['x-model-version']

  assert {answering() for _ in range(24)} == {versions.first, second}
  names = [f'talk-{i}' for i in range(12)]
  chosen = [answering({'x-conversation-id': name}) for name in names]
  assert set(chosen) == {versions.first, second}
  again = [answering({'x-conversation-id': name}) for name in names]
  assert again == chosen
  versions.send({versions.first: 1, second: 1}, by_principal=True)
  assert len({answering() for _ in range(8)}) == 1


@pytest.mark.slow
def test_load_switch_and_unload_under_load_lose_no_request(versions):
  """Clients that stream and clients that wait, while versions come and go."""
  may_stop, failures, answered = threading.Event(), [], []
  seeds = itertools.count()

  def client(is_stream):
    while not may_stop.is_set():
      fields = {'seed': next(seeds), 'temperature': 1.0, 'max_tokens': 12}
      answer = versions.complete('go', stream=is_stream, **fields)
      is_whole = (
        answer.content.endswith(b'data: [DONE]\n\n')
        and b'"error"' not in answer.content
        if is_stream
        else answer.status_code == 200
      )
      if not is_whole:
        failures.append(answer.text)
      answered.append(answer.headers.get('x-model-version'))

  def answers(least):
    servers.until(lambda: len(answered) >= least or failures, 60)

  with concurrent.futures.ThreadPoolExecutor(8) as pool:
    clients = [pool.submit(client, bool(i % 2)) for i in range(8)]
    try:
      answers(8)
      for name in ('v2', 'v3', 'v2'):
        new = versions.load(name)
        versions.send({versions.first: 1, new: 1}, shadows={new: 0.5})
        answers(len(answered) + 30)
        versions.send({new: 1})
        answers(len(answered) + 10)
        versions.send({versions.first: 1})
        versions.unload(new)
    finally:
      may_stop.set()
    for each in clients:
      each.result()
  assert not failures
  seen = {f'{_MODEL}@{each[:16]}' for each in versions.digests.values()}
  assert set(answered) == seen | {versions.first}


def test_copies_are_answered_apart_and_cost_the_client_nothing(versions):
  second = versions.load('v2')
  alone = versions.complete('copied').json()
  versions.send({versions.first: 1}, shadows={second: 1.0})
  copied = versions.complete('copied').json()
  assert copied['choices'][0]['text'] == alone['choices'][0]['text']

  def value(name, **labels):
    text = versions.http.get('/metrics').text
    return servers.metric(text, name, version=second, **labels)

  servers.until(lambda: value('shadow_requests_total', outcome='finished') == 1)
  assert value('shadow_tokens_total') >= 8
  assert value('shadow_flops_total') == value('flops_total') > 0
  # A request to the version itself is no copy, and is not copied.
  versions.complete('copied', model=second)
  assert value('shadow_requests_total', outcome='finished') == 1
  assert value('flops_total') > value('shadow_flops_total')


def test_a_copy_without_a_place_is_dropped(versions, monkeypatch):
  second = versions.load('v2')
  versions.send({versions.first: 1}, shadows={second: 1.0})
  (model,) = (
    each
    for each in versions.served.app.state.versions.all()
    if each.version == second
  )

  def full(_):
    raise ValueError('it does not fit')

  monkeypatch.setattr(model.engine_loop.generator.engine, 'submit_all', full)
  _text(versions.complete())
  servers.until(
    lambda: (
      servers.metric(
        versions.http.get('/metrics').text,
        'shadow_requests_total',
        version=second,
        outcome='dropped',
      )
      == 1
    )
  )
  servers.until(lambda: not model.num_held)


@pytest.mark.slow
def test_a_version_that_fails_hands_its_share_to_the_others(
  versions, monkeypatch
):
  second = versions.load('v2')
  versions.send({versions.first: 1, second: 1})
  (model,) = (
    each
    for each in versions.served.app.state.versions.all()
    if each.version == second
  )

  def step():
    raise RuntimeError('the device is on fire')

  monkeypatch.setattr(model.engine_loop.generator.engine, 'step', step)
  assert versions.complete(model=second).status_code == 500
  assert versions.state(second) == 'failed'
  for _ in range(12):
    assert versions.complete().headers['x-model-version'] == versions.first
  assert versions.http.get('/health').status_code == 200
  assert versions.http.get('/ready').status_code == 200
  versions.unload(second)


def test_all_versions_finish_what_was_asked_when_the_server_stops(
  versions, caplog
):
  caplog.set_level(logging.INFO, logger='uvicorn.error')
  second = versions.load('v2')
  models = [versions.first, second]
  loops = versions.served.app.state.versions.engine_loops()
  held = threading.Event()
  for loop in loops:
    loop._inbox.put(lambda: held.wait(30))
  with concurrent.futures.ThreadPoolExecutor(2) as pool:
    asked = [
      pool.submit(versions.complete, 'a', model=model, max_tokens=40)
      for model in models
    ]
    draining = versions.served.app.state.draining
    servers.until(lambda: draining.num_open == 2)
    versions.served.stop()
    servers.until(lambda: draining.is_on)
    refused = versions.complete(model=second)
    assert (refused.status_code, refused.json()['error']['code']) == (
      503,
      'stopped',
    )
    held.set()
    assert all(_text(each.result()) for each in asked)
  for digest in (loop.generator.engine.weights_digest for loop in loops):
    servers.until(lambda d=digest: f'weights {d}: unchanged' in caplog.text)
