"""The ledger: one row per request, whatever ended it; nothing stays open."""

import asyncio
import contextlib
import copy
import datetime
import sqlite3
import time

import httpx2
import pytest

from inference.server import app as app_lib, usage
from inference.server.records import database, ledger as ledger_lib
from tests.helpers import commands
from tests.helpers.serving import servers

_LONG = {
  'prompt': 'hello',
  'model': servers.MODEL,
  'max_tokens': 55,
  'ignore_eos': True,
}


def _about(**fields):
  return ledger_lib.About(
    **{
      'request_id': 'req_1',
      'idempotency': '',
      'key_id': 'key_1',
      'principal': 'alice',
      'model': 'tiny',
      'weights_digest': 'd1',
      'reserved_tokens': 10,
      'reserved_nanos': 100,
      **fields,
    }
  )


def _rows(records):
  return records.submit(
    lambda c: list(map(dict, c.execute('SELECT * FROM ledger')))
  ).result()


@pytest.fixture
def records(tmp_path):
  records = database.Database(tmp_path / 'records', tables=app_lib.TABLES)
  yield records
  records.close()


@pytest.fixture
def ledger(records):
  ledger = ledger_lib.Ledger(records)
  yield ledger
  ledger.close()


def test_an_entry_is_open_and_then_settled(ledger, records):
  async def use():
    entry = ledger.reserve(_about())
    assert ledger.metrics.registry.get_sample_value('ledger_reservations_open')
    await entry.open()
    (row,) = _rows(records)
    assert (row['outcome'], row['price_nanos']) == (None, 0)
    used = ledger_lib.Used(prompt_tokens=6, completion_tokens=3, price_nanos=42)
    assert await entry.settle(used, ledger_lib.FINISHED) == 42

  asyncio.run(use())
  (row,) = _rows(records)
  assert row['outcome'] == 'finished'
  assert (row['prompt_tokens'], row['completion_tokens']) == (6, 3)
  assert row['opened_at'] <= row['settled_at'] <= time.time()
  value = ledger.metrics.registry.get_sample_value
  assert value('ledger_reservations_open') == 0
  assert value('ledger_rows_total', {'outcome': 'finished'}) == 1
  assert ledger.spent() == {'key_1': 42}


@pytest.mark.parametrize(
  ('first', 'second'),
  [
    ('settle', 'settle'),
    ('settle', 'open'),
    ('settle', 'release'),
    ('release', 'settle'),
    ('release', 'release'),
    ('release', 'open'),
    ('open', 'open'),
    ('open', 'release'),
  ],
)
def test_no_other_step_is_possible(ledger, records, first, second):
  steps = {
    'open': lambda entry: entry.open(),
    'settle': lambda entry: entry.settle(ledger_lib.Used(), ledger_lib.ERROR),
    'release': lambda entry: entry.release(),
  }

  async def use():
    entry = ledger.reserve(_about())
    if (written := steps[first](entry)) is not None:
      await written
    with pytest.raises(RuntimeError, match='report this as a bug'):
      steps[second](entry)

  asyncio.run(use())
  assert len(_rows(records)) == (first != 'release')


def test_orphans_are_settled_at_the_next_start(tmp_path, caplog):
  records = database.Database(tmp_path / 'r', tables=app_lib.TABLES)
  ledger = ledger_lib.Ledger(records)

  async def use():
    for number in range(3):
      await ledger.reserve(_about(request_id=f'req_{number}')).open()

  asyncio.run(use())
  records.close()
  ledger.close()
  records = database.Database(tmp_path / 'r', tables=app_lib.TABLES)
  for _ in range(2):
    again = ledger_lib.Ledger(records)
    again.close()
    rows = _rows(records)
    assert {row['outcome'] for row in rows} == {'orphaned'}
    assert {row['price_nanos'] for row in rows} == {0}
    assert len(rows) == 3
  assert caplog.text.count('settled 3 requests') == 1
  records.close()


def test_a_file_has_one_server(ledger, records, tmp_path):
  other = database.Database(tmp_path / 'records', tables=app_lib.TABLES)
  with pytest.raises(ValueError, match='--records: got .* another server uses'):
    ledger_lib.Ledger(other)
  ledger.close()
  ledger_lib.Ledger(other).close()
  other.close()


def test_equal_requests_cost_together_what_the_dearest_costs(ledger, records):
  async def use():
    prices = []
    for nanos in (100, 70, 130, 130):
      entry = ledger.reserve(_about(idempotency='same'))
      used = ledger_lib.Used(price_nanos=nanos)
      prices.append(await entry.settle(used, ledger_lib.FINISHED))
    other = ledger.reserve(_about(idempotency='other'))
    used = ledger_lib.Used(price_nanos=5)
    return [*prices, await other.settle(used, ledger_lib.FINISHED)]

  assert asyncio.run(use()) == [100, 0, 30, 0, 5]
  assert len(_rows(records)) == 5


def test_nothing_of_a_prompt_or_an_output_is_kept(generator, tmp_path):
  records = database.Database(tmp_path / 'r', tables=app_lib.TABLES)
  prompt = 'a very private prompt'
  with servers.running(generator, records=records) as served:
    answer = httpx2.post(
      f'{served.url}/v1/completions',
      json={**servers.GREEDY, 'prompt': prompt, 'user': 'a private user'},
      headers={'idempotency-key': 'private-key'},
      timeout=60,
    ).json()
    stored = b''.join(
      each.read_bytes() for each in tmp_path.iterdir() if each.is_file()
    )
  assert b'req_' in stored
  assert b'private' not in stored
  assert answer['choices'][0]['text'].encode() not in stored


# ------------------------------------------------------------------------------
# Every way out


class _Slow:
  """An engine whose steps are slow, and can fail."""

  def __init__(self, engine):
    self._engine = engine
    self.fails, self.seconds = False, 0.01

  def __getattr__(self, name):
    return getattr(self._engine, name)

  def step(self):
    time.sleep(self.seconds)
    if self.fails:
      raise RuntimeError('the device is on fire')
    return self._engine.step()


@pytest.fixture
def slow(generator):
  slow = copy.copy(generator)
  slow.engine = _Slow(generator.engine)
  yield slow
  assert list(generator.engine.run()) == []


@contextlib.contextmanager
def _stream(served, **fields):
  with httpx2.stream(
    'POST',
    f'{served.url}/v1/completions',
    json={**_LONG, 'stream': True, **fields},
    timeout=60,
  ) as answer:
    yield answer


def _settled(records, of=1):
  """Waits for the first settled row, which is one of so many."""
  servers.until(lambda: any(row['outcome'] for row in _rows(records)))
  rows = _rows(records)
  assert len(rows) == of
  return rows


@pytest.mark.parametrize('stream', [False, True])
def test_a_row_is_there_before_the_end_of_the_answer(
  generator, records, stream
):
  with servers.running(
    generator, records=records, price_prompt=1.0, price_completion=3.0
  ) as served:
    body = {**servers.GREEDY, 'prompt': ['hello', 'b'], 'n': 2}
    if stream:
      options = {'stream': True, 'stream_options': {'include_usage': True}}
      with _stream(served, **body, **options) as answer:
        last = [*servers.events(answer.read())][-1]
        (row,) = _rows(records)  # at once: the client has the last byte
    else:
      answer = httpx2.post(
        f'{served.url}/v1/completions', json=body, timeout=60
      )
      last = answer.json()
      (row,) = _rows(records)
  used = last['usage']
  assert row['request_id'] == answer.headers['x-request-id']
  assert row['outcome'] == 'finished'
  assert row['prompt_tokens'] == used['prompt_tokens'] == 8
  assert row['completion_tokens'] == used['completion_tokens']
  details = used['prompt_tokens_details']
  assert row['cached_tokens'] == details['cached_tokens']
  computed = 8 - row['cached_tokens']
  assert row['price_nanos'] == 1000 * computed + 3000 * row['completion_tokens']
  assert row['weights_digest'] == generator.frozen.manifest.weights_digest
  assert row['model'] == servers.MODEL
  assert min(row[name] for name in ('flops', 'kv_byte_seconds')) > 0
  assert min(row['prefill_ms'], row['decode_ms'], row['queue_ms']) > 0


def test_a_client_that_leaves_pays_for_what_was_computed(slow, records):
  with servers.running(slow, records=records) as served:
    before = served.counted('sampled_tokens_total')
    with _stream(served, n=2) as answer:
      next(answer.iter_bytes())
    (row,) = _settled(records)
    made = served.counted('sampled_tokens_total') - before
  assert row['outcome'] == 'cancelled'
  assert row['completion_tokens'] == made
  assert 0 < made < 2 * 55
  assert row['prompt_tokens'] == 6
  assert row['decode_tokens'] > 0


def test_a_client_that_leaves_at_the_end_has_a_finished_answer(
  generator, records
):
  with servers.running(generator, records=records) as served:
    with _stream(served, max_tokens=5) as answer:
      for line in answer.iter_lines():
        if '"finish_reason": "length"' in line:
          break  # without [DONE]
    (row,) = _settled(records)
  assert (row['outcome'], row['completion_tokens']) == ('finished', 5)


def test_a_request_that_never_ran_costs_nothing(slow, records):
  slow.engine.seconds = 0.1
  with (
    servers.running(slow, records=records) as served,
    contextlib.ExitStack() as stack,
  ):
    streams = [
      stack.enter_context(_stream(served)).iter_bytes()
      for _ in range(4)  # every slot
    ]
    for stream in streams:
      next(stream)
    with contextlib.suppress(httpx2.ReadTimeout):
      httpx2.post(f'{served.url}/v1/completions', json=_LONG, timeout=0.2)
    (row,) = [row for row in _settled(records, of=5) if row['outcome']]
  assert (row['outcome'], row['prompt_tokens']) == ('cancelled', 0)
  assert (row['price_nanos'], row['completion_tokens']) == (0, 0)
  assert row['queue_ms'] > 0


def test_a_failed_engine_and_a_stopped_server_settle(slow, records):
  with servers.running(slow, records=records) as served:
    with _stream(served) as answer:
      arrived = answer.iter_bytes()
      next(arrived)
      slow.engine.fails = True
      assert b'the generation failed' in b''.join(arrived)
    _settled(records)
    refused = httpx2.post(f'{served.url}/v1/completions', json=_LONG)
    assert refused.status_code in (500, 503)
  (row,) = _rows_of(records)
  assert row['outcome'] == 'error'
  assert row['completion_tokens'] > 0


def _rows_of(records):
  """Returns the rows after the server has closed the records."""
  with contextlib.closing(sqlite3.connect(records.name)) as connection:
    connection.row_factory = sqlite3.Row
    return list(map(dict, connection.execute('SELECT * FROM ledger')))


def test_a_server_that_stops_settles(slow, records):
  with servers.running(slow, records=records, drain_seconds=0.0) as served:
    slow.engine.seconds = 0.1
    with _stream(served) as answer:
      arrived = answer.iter_bytes()
      next(arrived)
      asyncio.run(_close(served))
      assert b'the server is stopping' in b''.join(arrived)
  (row,) = _rows_of(records)
  assert row['outcome'] == 'stopped'
  assert 0 < row['completion_tokens'] < 55


async def _close(served):
  """Ends the engine's loop as the server does when it drains."""
  done = asyncio.run_coroutine_threadsafe(
    served.engine_loop.close(), served.engine_loop._event_loop
  )
  await asyncio.wrap_future(done)


def test_a_refused_request_has_no_row(generator, records):
  with servers.running(generator, records=records) as served:
    for fields, status in (
      ({'max_tokens': 10**6}, 400),
      ({'n': 129}, 400),
      ({'model': 'x'}, 404),
    ):
      answer = httpx2.post(
        f'{served.url}/v1/completions', json={**_LONG, **fields}, timeout=60
      )
      assert answer.status_code == status
    assert _rows(records) == []
    metrics = httpx2.get(f'{served.url}/metrics').text
  assert 'ledger_reservations_open 0.0' in metrics


def test_a_disk_that_is_full_ends_no_answer_unbilled(
  generator, records, monkeypatch, caplog
):
  def fail(*_):
    raise sqlite3.OperationalError('database or disk is full')

  def post():
    return httpx2.post(
      f'{served.url}/v1/completions',
      json={**servers.GREEDY, 'prompt': 'a'},
      timeout=60,
    )

  with servers.running(generator, records=records) as served:
    assert post().status_code == 200
    monkeypatch.setattr(ledger_lib, '_insert', fail)
    assert post().status_code == 500
    steps = served.counted('engine_steps_total')
    answer = post()
    assert answer.status_code == 503
    assert answer.json()['error']['code'] == 'ledger_unavailable'
    assert served.counted('engine_steps_total') == steps
    monkeypatch.undo()
    assert post().status_code == 200  # it is tried again
    text = httpx2.get(f'{served.url}/metrics').text
    assert 'ledger_reservations_open 0.0' in text
    assert len(_rows(records)) >= 2
  assert 'the ledger is not written' in caplog.text


def test_a_scored_prompt_has_no_completion(generator, records):
  with servers.running(generator, records=records) as served:
    body = {**servers.GREEDY, 'prompt': 'hello', 'max_tokens': 0, 'echo': True}
    answer = httpx2.post(f'{served.url}/v1/completions', json=body, timeout=60)
    assert answer.json()['usage']['completion_tokens'] == 0
    (row,) = _rows(records)
  assert (row['prompt_tokens'], row['completion_tokens']) == (6, 0)


# ------------------------------------------------------------------------------
# Usage


def _day(text):
  return datetime.datetime.fromisoformat(f'{text}T12:00+00:00').timestamp()


def test_the_report_sums_and_finds_the_day_that_passed_training(
  ledger, records
):
  async def use():
    for day, principal, flops in (
      ('2026-01-01', 'alice', 4.0),
      ('2026-01-02', 'bob', 5.0),
      ('2026-01-04', 'alice', 1.5),
      ('2026-01-05', 'alice', 9.0),
    ):
      entry = ledger.reserve(_about(principal=principal, key_id=principal))
      entry._head['opened_at'] = _day(day)
      used = ledger_lib.Used(
        prompt_tokens=1000, completion_tokens=7, flops=flops, price_nanos=10**9
      )
      await entry.settle(used, ledger_lib.FINISHED)
    await ledger.reserve(_about()).open()

  asyncio.run(use())
  records.submit(
    lambda c: (
      c.execute("INSERT INTO models VALUES ('d1', 'tiny', 10, 5, 0)") and None
    )
  ).result()
  records.submit(
    lambda c: (
      c.execute("INSERT INTO models VALUES ('d2', 'open', 0, 0, 1)") and None
    )
  ).result()
  (passed, other) = records.submit(usage.passed).result()
  assert (passed['day'], passed['flops']) == ('2026-01-04', 19.5)
  assert (other['day'], other['flops']) == (None, 0)
  text = records.submit(usage.report).result()
  words = [line.split() for line in text.splitlines()]
  assert ['alice', 'alice', '3', '3,000', '0', '21'] in [w[:6] for w in words]
  assert ['2026-01-02', '1', '1,000', '0', '7'] in [w[:5] for w in words]
  assert 'inference passed training on 2026-01-04' in text
  assert 'open (d2): the manifest does not have the cost' in text
  assert '1 requests are open' in text


def test_the_command_prints_the_report_beside_a_server(ledger, records):
  path = records.name
  done = commands.run('inference/server/usage.py', f'--records={path}')
  assert (done.returncode, done.stderr) == (0, '')
  assert done.stdout.startswith(f'{path} at 20')
  done = commands.run('inference/server/usage.py', f'--records={path}x')
  assert done.returncode == 2
  assert 'which does not exist, expected the file that a server' in done.stderr


def test_the_models_that_are_served_are_noted(generator, records):
  with servers.running(generator, records=records):
    (row,) = records.submit(usage.passed).result()
  manifest = generator.frozen.manifest
  assert row['weights_digest'] == manifest.weights_digest
  assert row['training_flops'] == manifest.training_flops
