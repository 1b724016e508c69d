"""An Idempotency-Key: answered again, joined, billed once, refused."""

import concurrent.futures
import contextlib
import json
import time

import httpx2
import pytest

from inference.server import app as app_lib
from inference.server.access import api_keys, idempotency
from inference.server.records import database
from tests.helpers.serving import servers

_BODY = {**servers.GREEDY, 'prompt': 'hello', 'temperature': 1.0}
_JSON = {'content-type': 'application/json'}


@pytest.fixture(scope='module')
def records():
  return database.Database(None, tables=app_lib.TABLES)


@pytest.fixture(scope='module')
def served(generator, records):
  with servers.running(generator, records=records) as served:
    yield served


@pytest.fixture(scope='module')
def http(served):
  with httpx2.Client(base_url=served.url, timeout=60) as http:
    yield http


@pytest.fixture
def rows(records):
  """Returns a function that returns the rows that the test has added."""

  def all_rows(connection):
    return list(map(dict, connection.execute('SELECT * FROM ledger')))

  before = {row['id'] for row in records.submit(all_rows).result()}
  return lambda: [
    row for row in records.submit(all_rows).result() if row['id'] not in before
  ]


def _post(http, name, body=_BODY, **options):
  return http.post(
    '/v1/completions', json=body, headers={'idempotency-key': name}, **options
  )


@pytest.mark.parametrize('stream', [False, True])
def test_the_same_request_has_the_same_answer_and_one_bill(http, rows, stream):
  body = {**_BODY, 'stream': stream}
  name = f'again-{stream}'
  first, second, third = (_post(http, name, body) for _ in range(3))
  assert first.status_code == 200
  # The seed is random: another computation would have another text.
  assert first.content == second.content == third.content
  assert 'idempotency-replayed' not in first.headers
  assert second.headers['idempotency-replayed'] == 'true'
  assert second.headers['content-type'] == first.headers['content-type']
  assert len({each.headers['x-request-id'] for each in (first, second)}) == 2
  (row,) = rows()
  assert row['request_id'] == first.headers['x-request-id']
  assert _post(http, f'other-{name}', body).content != first.content
  assert len(rows()) == 2


@pytest.mark.parametrize('stream', [False, True])
def test_requests_at_once_join_one_computation(http, rows, stream):
  body = {**_BODY, 'stream': stream, 'max_tokens': 40, 'ignore_eos': True}
  with concurrent.futures.ThreadPoolExecutor(6) as pool:
    answers = list(
      pool.map(lambda _: _post(http, f'join-{stream}', body), range(6))
    )
  assert {each.status_code for each in answers} == {200}
  assert len({each.content for each in answers}) == 1
  replayed = [each.headers.get('idempotency-replayed') for each in answers]
  assert replayed.count(None) == 1
  (row,) = rows()
  assert row['completion_tokens'] == 40


def test_who_loses_the_connection_gets_the_answer_later(served, http, rows):
  body = {**_BODY, 'stream': True, 'max_tokens': 50, 'ignore_eos': True}
  with contextlib.ExitStack() as stack:
    left = stack.enter_context(
      http.stream(
        'POST',
        '/v1/completions',
        json=body,
        headers={'idempotency-key': 'left'},
      )
    )
    begin = next(left.iter_bytes())
  answer = _post(http, 'left', body)
  assert answer.content.startswith(begin[:20])
  events = servers.events(answer.content)
  assert events[-1]['choices'][0]['finish_reason'] == 'length'
  (row,) = rows()
  assert (row['outcome'], row['completion_tokens']) == ('finished', 50)


def test_another_body_is_refused_and_not_retried(http, rows):
  assert _post(http, 'mine').status_code == 200
  answer = _post(http, 'mine', {**_BODY, 'prompt': 'other'})
  assert answer.status_code == 409
  assert answer.json()['error']['code'] == 'idempotency_key_reused'
  assert answer.headers['x-should-retry'] == 'false'
  assert len(rows()) == 1


def test_errors_are_not_kept(http, rows):
  wrong = {**_BODY, 'max_tokens': -1}
  for _ in range(2):
    answer = _post(http, 'wrong', wrong)
    assert answer.status_code == 400
    assert 'idempotency-replayed' not in answer.headers
  assert _post(http, 'wrong').status_code == 200
  assert len(rows()) == 1


@pytest.mark.parametrize('name', ['', 'x' * 256])
def test_a_bad_key_is_refused(http, rows, name):
  answer = _post(http, name)
  assert answer.status_code == 400
  assert 'idempotency-key: got' in answer.json()['error']['message']
  assert rows() == []


def test_other_methods_ignore_it(http):
  headers = {'idempotency-key': ''}
  assert http.get('/v1/models', headers=headers).status_code == 200


def test_two_principals_have_two_answers(generator, tmp_path):
  (tmp_path / 'keys').write_text('a:key-a\nb:key-b')
  with servers.running(generator, api_keys.read(tmp_path / 'keys')) as served:
    texts = [
      httpx2.post(
        f'{served.url}/v1/completions',
        json=_BODY,
        headers={'authorization': f'Bearer {key}', 'idempotency-key': 'same'},
        timeout=60,
      ).content
      for key in ('key-a', 'key-b', 'key-a')
    ]
  assert texts[0] == texts[2] != texts[1]


def test_limits_of_a_body_hold_with_it_too(generator):
  with servers.running(generator, max_body_bytes=100) as served:
    answer = httpx2.post(
      f'{served.url}/v1/completions',
      content=b' ' * 101,
      headers={**_JSON, 'idempotency-key': 'long'},
    )
    assert answer.status_code == 413


def test_what_is_kept_has_a_limit_and_an_end(http, rows, monkeypatch):
  first = _post(http, 'kept').content
  monkeypatch.setattr(idempotency, '_MOST_BYTES', 3 * len(first) + 3000)
  for number in range(5):
    _post(http, f'newer-{number}')
  assert _post(http, 'newer-4').headers['idempotency-replayed']
  assert 'idempotency-replayed' not in _post(http, 'kept').headers
  assert len(rows()) == 7
  monkeypatch.undo()
  clock = time.monotonic
  monkeypatch.setattr(
    idempotency.time, 'monotonic', lambda: clock() + 25 * 3600
  )
  assert 'idempotency-replayed' not in _post(http, 'newer-4').headers


def test_an_answer_that_is_lost_is_computed_again_and_not_billed_again(
  generator, tmp_path
):
  path = tmp_path / 'records'
  prices = []
  for _ in range(2):  # a restart between them loses the answer
    records = database.Database(path, tables=app_lib.TABLES)
    with servers.running(
      generator, records=records, price_prompt=1.0, price_completion=2.0
    ) as served:
      answer = httpx2.post(
        f'{served.url}/v1/completions',
        json={**_BODY, 'ignore_eos': True},
        headers={'idempotency-key': 'once'},
        timeout=60,
      )
      assert answer.status_code == 200
      request_id = answer.headers['x-request-id']
      prices.append(
        records.submit(
          lambda c, name: c.execute(
            'SELECT price_nanos FROM ledger WHERE request_id = ?', (name,)
          ).fetchone()[0],
          request_id,
        ).result()
      )
  tokens = json.loads(answer.content)['usage']
  assert prices[0] > 1000 * tokens['prompt_tokens']
  # The prompt may be cached now: the second answer costs less, and is paid for.
  assert prices[1] == 0
