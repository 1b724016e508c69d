"""Limits of a key: exact waits, nothing taken by a refusal, OpenAI's words."""

import contextlib
import math
import threading

import httpx2
from hypothesis import given, strategies
import openai
import pytest

from inference.server import app as app_lib
from inference.server.access import keys, limits
from inference.server.records import database, ledger
from tests.helpers.serving import servers


def _limits(spent=0, **fields):
  key = keys.Key(id='key_a', name='a', **fields)
  return limits.Limits(key, spent=spent, now=0.0)


def _refused(mine, now=0.0, *, tokens=1, nanos=0):
  return mine.refusal(tokens=tokens, nanos=nanos, now=now)


def _take(mine, now=0.0, *, tokens=1, nanos=0):
  assert not _refused(mine, now, tokens=tokens, nanos=nanos)
  mine.take(tokens=tokens, nanos=nanos, now=now)


@given(
  strategies.integers(1, 1000),
  strategies.lists(
    strategies.tuples(
      strategies.integers(1, 400), strategies.floats(0, 30, allow_nan=False)
    ),
    max_size=30,
  ),
)
def test_the_wait_is_exact(per_minute, asked):
  bucket = limits.Bucket(per_minute, 0.0)
  now, taken = 0.0, 0
  for num, pause in asked:
    now += pause
    wait = bucket.wait(num, now)
    if num > per_minute:
      assert math.isinf(wait)
      continue
    if wait:
      assert bucket.wait(num, now + 0.999 * wait) > 0
      now += wait
      assert bucket.wait(num, now) < 1e-6  # seconds: rounding of floats
      now += 1e-6
    bucket.take(num, now)
    taken += num
    # Never more than a full bucket, and what has flown in.
    assert taken <= per_minute * (1 + now / 60) + 1e-6


def test_a_refusal_takes_nothing():
  mine = _limits(requests_per_minute=2, tokens_per_minute=100)
  _take(mine, tokens=90)
  for _ in range(5):
    assert _refused(mine, tokens=11).kind == 'tokens'
  _take(mine, tokens=10)
  refusal = _refused(mine, tokens=1)
  assert refusal.kind == 'requests'
  assert refusal.headers == {'retry-after': '30', 'retry-after-ms': '30000'}
  assert _refused(mine, 29.99, tokens=1)
  assert not _refused(mine, 30.0, tokens=1)


def test_a_change_of_limits_keeps_what_was_used():
  mine = _limits(tokens_per_minute=100, max_concurrent=1)
  _take(mine, tokens=90)
  assert _refused(mine).kind == 'concurrency'
  more = keys.Key(id='key_a', name='a', tokens_per_minute=200, budget=1)
  mine.follow(more, 0.0)
  assert _refused(mine, tokens=111).kind == 'tokens'
  _take(mine, tokens=110)
  fewer = keys.Key(id='key_a', name='a', tokens_per_minute=60)
  mine.follow(fewer, 0.0)
  # 200 tokens are taken of 60 per minute: 140 more than a full bucket.
  assert _refused(mine, tokens=1).headers['retry-after'] == '141'
  mine.follow(keys.Key(id='key_a', name='a'), 0.0)
  assert not _refused(mine, tokens=10**6)


def test_tokens_that_were_not_used_are_given_back():
  mine = _limits(tokens_per_minute=100)
  _take(mine, tokens=100, nanos=7)
  assert mine.headers(0.0)['x-ratelimit-remaining-tokens'] == '0'
  mine.settle(reserved=7, spent=3, unused_tokens=60, now=0.0)
  assert mine.headers(0.0) == {
    'x-ratelimit-limit-tokens': '100',
    'x-ratelimit-remaining-tokens': '60',
    'x-ratelimit-reset-tokens': '24s',
  }
  assert (mine.num_open, mine.reserved, mine.spent) == (0, 0, 3)


def test_a_released_reservation_leaves_no_trace():
  mine = _limits(
    requests_per_minute=1, tokens_per_minute=9, max_concurrent=1, budget=1e-9
  )
  _take(mine, tokens=9, nanos=1)
  mine.release(tokens=9, reserved=1, now=0.0)
  _take(mine, tokens=9, nanos=1)


def test_a_request_that_never_fits_is_told_so():
  refusal = _refused(_limits(tokens_per_minute=10), tokens=11)
  assert refusal.headers == {'x-should-retry': 'false'}
  assert 'got 11 more tokens' in str(refusal)
  assert 'can never pass: lower max_tokens' in str(refusal)


def test_a_budget_counts_what_is_spent_and_what_is_reserved():
  mine = _limits(spent=40, budget=100 / ledger.NANOS)
  _take(mine, nanos=50)
  refusal = _refused(mine, nanos=11)  # 40 + 50 + 11
  assert (refusal.kind, refusal.code) == ('budget', 'rate_limit_exceeded')
  assert refusal.headers['retry-after'] == '1'
  mine.settle(reserved=50, spent=50, unused_tokens=0, now=0.0)
  _take(mine, nanos=10)
  mine.settle(reserved=10, spent=10, unused_tokens=0, now=0.0)
  refusal = _refused(mine, nanos=1)
  assert refusal.type == refusal.code == 'insufficient_quota'
  assert 'got a request that may cost 1e-09, expected at most 0' in str(refusal)


def test_requests_at_once_are_counted():
  mine = _limits(max_concurrent=2)
  _take(mine)
  _take(mine)
  assert _refused(mine).kind == 'concurrency'
  mine.settle(reserved=0, spent=0, unused_tokens=0, now=0.0)
  _take(mine)


@pytest.mark.parametrize(
  ('seconds', 'text'),
  [
    (0, '0ms'),
    (0.02, '20ms'),
    (1.5, '1.5s'),
    (59.9999, '1m0s'),
    (360, '6m0s'),
    (61.25, '1m1.25s'),
  ],
)
def test_durations_are_written_as_openai_writes_them(seconds, text):
  assert limits.duration(seconds) == text


# ------------------------------------------------------------------------------
# Over HTTP


@pytest.fixture(scope='module')
def served(generator):
  records = database.Database(None, tables=app_lib.TABLES)
  # Before the first key, the server answers everybody.
  records.submit(lambda c: keys.create(c, name='first') and None).result()
  with servers.running(
    generator,
    records=records,
    price_prompt=1e6,
    price_completion=2e6,
    price_cached=0.5e6,
  ) as served:
    served.records = records
    yield served


@pytest.fixture
def client_for(served):
  """Returns a function that makes a key, and a client that sends it."""
  with contextlib.ExitStack() as stack:

    def client_for(**fields):
      _, text = served.records.submit(
        lambda connection: keys.create(connection, name='alice', **fields)
      ).result()
      client = httpx2.Client(
        base_url=served.url,
        timeout=60,
        headers={'authorization': f'Bearer {text}'},
      )
      stack.enter_context(client)
      servers.until(lambda: client.get('/v1/models').status_code == 200)
      return client, text

    yield client_for


def _complete(client, **fields):
  body = {**servers.GREEDY, 'prompt': 'hello', **fields}
  return client.post('/v1/completions', json=body)


@pytest.mark.slow
def test_rates_are_in_the_headers_and_a_refusal_says_when(served, client_for):
  client, text = client_for(requests_per_minute=2, tokens_per_minute=500)
  # 6 tokens of the prompt and 8 of the completion.
  first = _complete(client)
  assert first.status_code == 200
  assert first.headers['x-ratelimit-limit-requests'] == '2'
  assert first.headers['x-ratelimit-remaining-requests'] == '1'
  assert first.headers['x-ratelimit-remaining-tokens'] == '486'
  assert first.headers['x-ratelimit-reset-requests'] == '30s'
  assert _complete(client, stream=True).status_code == 200
  third = _complete(client)
  assert third.status_code == 429
  assert 1 <= int(third.headers['retry-after']) <= 30
  assert third.json()['error']['code'] == 'rate_limit_exceeded'
  metrics = client.get('/metrics').text
  assert 'limit_refused_total{kind="requests"} 1.0' in metrics
  with (
    openai.OpenAI(
      base_url=f'{served.url}/v1', api_key=text, max_retries=0
    ) as other,
    pytest.raises(openai.RateLimitError, match='per minute; wait'),
  ):
    other.completions.create(prompt='a', **servers.GREEDY)


def test_a_budget_ends(served, client_for):
  # A prompt of 6 tokens and 8 new ones cost at most 22, with 5 of them cached
  # less.
  client, text = client_for(budget=30)
  assert _complete(client).status_code == 200
  answer = _complete(client)
  assert answer.status_code == 429
  error = answer.json()['error']
  assert error['type'] == error['code'] == 'insufficient_quota'
  assert _complete(client, max_tokens=1).status_code == 200
  with (
    openai.OpenAI(base_url=f'{served.url}/v1', api_key=text) as other,
    pytest.raises(openai.RateLimitError) as caught,
  ):
    other.completions.create(prompt='hello', **servers.GREEDY)
  assert caught.value.response.headers['x-should-retry'] == 'false'


def test_a_changed_budget_counts_within_a_second(served, client_for):
  client, text = client_for(budget=0)
  assert _complete(client).status_code == 429
  digest = keys.digest(text)
  (found,) = [
    row for row in served.records.submit(keys.rows).result()
    if row['digest'] == digest
  ]  # fmt: skip
  served.records.submit(
    lambda connection: keys.change(connection, found['id'], budget=1000.0)
  ).result()
  servers.until(lambda: _complete(client).status_code == 200, seconds=5)


def test_a_stream_that_is_open_counts_until_it_ends(
  generator, client_for, monkeypatch
):
  step, may_go_on = generator.engine.step, threading.Event()
  begun = []

  def held_step():
    if begun:
      may_go_on.wait(30)
    begun.extend(found := step())
    return found

  monkeypatch.setattr(generator.engine, 'step', held_step)
  client, _ = client_for(max_concurrent=1)
  body = {**servers.GREEDY, 'prompt': 'a', 'stream': True, 'max_tokens': 50}
  with client.stream(
    'POST', '/v1/completions', json={**body, 'ignore_eos': True}
  ) as answer:
    arrived = answer.iter_bytes()
    next(arrived)
    refused = _complete(client)
    may_go_on.set()
  assert refused.status_code == 429
  assert 'of this key are open' in refused.json()['error']['message']
  servers.until(lambda: _complete(client).status_code == 200)


def test_a_key_without_limits_has_no_headers(client_for):
  client, _ = client_for()
  answer = _complete(client)
  assert not [name for name in answer.headers if 'ratelimit' in name]
