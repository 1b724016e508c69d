"""Feedback over HTTP: who may store it, who may delete it, what is refused."""

import logging
import sqlite3
import types

import fastapi
from fastapi import testclient
import pytest

from inference.server import server_config, service as service_lib
from inference.server.access import keys as keys_lib
from inference.server.api import errors, feedback_schema, schema, shapes
from inference.server.http import bodies as bodies_lib
from inference.server.records import database, feedback as feedback_records
from inference.server.routes import feedback

SAID = {
  'request_id': 'req_1',
  'model': 'tiny',
  'messages': [{'role': 'user', 'content': 'What is a secret?'}],
  'answer': 'Something hidden.',
  'thumb': 'down',
}
_KEYS = {
  name: keys_lib.Key(id=f'key_{i}', name=name, allows_feedback=i < 2)
  for i, name in enumerate(('alice', 'bob', 'carol'))
}


@pytest.fixture
def records(tmp_path):
  tables = [feedback_records.TABLES]
  records = database.Database(tmp_path / 'records.db', tables=tables)
  yield records
  records.close()


def _found(name):
  if name != 'tiny':
    raise errors.no_model(name, ['tiny'])


@pytest.fixture
def served(records):
  """Returns a function that makes a client of a server, by its setting."""
  bodies = bodies_lib.Bodies(server_config.ServerConfig())

  def start(*, keeps_feedback=False):
    app = fastapi.FastAPI()
    app.add_exception_handler(
      errors.ApiError, lambda _, error: error.response()
    )

    @app.middleware('http')
    async def authenticate(request, call_next):
      name = request.headers.get('authorization', '').removeprefix('Bearer ')
      request.state.key = _KEYS.get(name)
      request.state.principal = name
      return await call_next(request)

    service = service_lib.Service(
      versions=types.SimpleNamespace(find=_found),
      bodies=bodies,
      records=records,
      config=server_config.ServerConfig(feedback=keeps_feedback),
      **dict.fromkeys(('store', 'keyring', 'admission', 'loader', 'draining')),
    )
    feedback.add(app, service)
    return testclient.TestClient(app)

  yield start
  bodies.close()


def _as(name):
  return {'headers': {'authorization': f'Bearer {name}'}}


def _rows(records):
  return records.submit(lambda c: list(feedback_records.rows(c))).result()


def test_it_is_stored_only_where_it_is_allowed(served, records):
  client = served()
  answer = client.post('/v1/feedback', json=SAID)
  assert answer.status_code == 403
  assert '--server.feedback' in answer.json()['error']['message']
  answer = client.post('/v1/feedback', json=SAID, **_as('carol'))
  assert answer.status_code == 403
  assert answer.json()['error']['code'] == 'feedback_not_allowed'
  shapes.Error.model_validate(answer.json())
  assert not _rows(records)
  answer = client.post('/v1/feedback', json=SAID, **_as('alice'))
  assert answer.status_code == 200
  shapes.Feedback.model_validate(answer.json())
  answer = served(keeps_feedback=True).post('/v1/feedback', json=SAID)
  assert answer.status_code == 200
  # The setting is for clients without a key: a key decides for itself.
  client = served(keeps_feedback=True)
  answer = client.post('/v1/feedback', json=SAID, **_as('carol'))
  assert answer.status_code == 403
  assert [(row['principal'], row['key_id']) for row in _rows(records)] == [
    ('alice', 'key_0'),
    ('', ''),
  ]


def test_what_was_sent_is_what_is_stored_once_per_answer(served, records):
  client = served()
  client.post('/v1/feedback', json=SAID, **_as('alice'))
  later = {**SAID, 'thumb': 'up', 'preferred': 'A thing.', 'comment': 'short'}
  client.post('/v1/feedback', json=later, **_as('alice'))
  (row,) = _rows(records)
  assert row.items() >= later.items()


def test_it_is_deleted_by_its_own_principal_and_leaves_the_file(
  served, records, tmp_path
):
  client = served()
  ids = {}
  for name in ('alice', 'bob'):
    for request_id in ('req_1', 'req_2'):
      said = {**SAID, 'request_id': request_id, 'answer': f'I am {name}!'}
      answer = client.post('/v1/feedback', json=said, **_as(name))
      ids[name] = answer.json()['id']
  url = f'/v1/feedback/{ids["alice"]}'
  assert client.delete(url, **_as('bob')).status_code == 404
  answer = client.delete(url, **_as('alice'))
  assert answer.json() == {'object': 'feedback.deleted', 'deleted': 1}
  assert client.delete(url, **_as('alice')).status_code == 404
  answer = client.delete('/v1/feedback', **_as('alice'))
  assert answer.json()['deleted'] == 1
  assert {row['principal'] for row in _rows(records)} == {'bob'}
  # A checkpoint moves the write-ahead log into the file, and empties it.
  with sqlite3.connect(tmp_path / 'records.db') as other:
    other.execute('PRAGMA wal_checkpoint(TRUNCATE)')
  content = b''.join(path.read_bytes() for path in tmp_path.iterdir())
  assert b'I am bob!' in content
  assert b'I am alice!' not in content


def test_a_key_that_no_longer_allows_it_may_still_delete(served, records):
  client = served(keeps_feedback=True)
  records.submit(
    lambda c: feedback_records.add(c, principal='carol', key_id='old', **SAID)
  ).result()
  answer = client.delete('/v1/feedback', **_as('carol'))
  assert answer.json()['deleted'] == 1


def test_an_answer_to_somebody_else_is_refused_where_a_ledger_knows(
  served, records
):
  def make(connection):
    connection.execute('CREATE TABLE ledger (request_id TEXT, principal TEXT)')
    connection.execute("INSERT INTO ledger VALUES ('req_1', 'bob')")

  records.submit(make).result()
  client = served()
  answer = client.post('/v1/feedback', json=SAID, **_as('alice'))
  assert answer.status_code == 404
  assert answer.json()['error']['param'] == 'request_id'
  answer = client.post('/v1/feedback', json=SAID, **_as('bob'))
  assert answer.status_code == 200


def test_the_model_is_one_that_is_served(served):
  body = {**SAID, 'model': 'other'}
  answer = served().post('/v1/feedback', json=body, **_as('alice'))
  assert answer.status_code == 404
  assert answer.json()['error']['code'] == 'model_not_found'


def test_a_principal_has_a_limit_of_rows(served, monkeypatch):
  monkeypatch.setattr(feedback_records, 'MOST_ROWS', 1)
  client = served()
  client.post('/v1/feedback', json=SAID, **_as('alice'))
  other = {**SAID, 'request_id': 'req_2'}
  answer = client.post('/v1/feedback', json=other, **_as('alice'))
  assert answer.status_code == 403
  assert answer.json()['error']['code'] == 'feedback_full'
  # In place of the row that is there, and of another principal: room.
  assert client.post('/v1/feedback', json=SAID, **_as('alice')).is_success
  assert client.post('/v1/feedback', json=other, **_as('bob')).is_success


@pytest.mark.parametrize(
  ('fields', 'param', 'message'),
  [
    ({'thumb': None}, 'thumb', 'got neither thumb nor preferred'),
    ({'thumb': 'sideways'}, 'thumb', "'up' or 'down'"),
    ({'messages': []}, 'messages', 'at least 1 item'),
    ({'messages': [{'role': 'king'}]}, 'messages', "'system'"),
    ({'messages': [{'role': 'user', 'extra': 1}]}, 'messages', 'extra'),
    ({'answer': None}, 'answer', 'string'),
    ({'request_id': 'r' * 201}, 'request_id', 'at most 200'),
    ({'comment': 'c' * 2001}, 'comment', 'at most 2000'),
    ({'preferred': ''}, 'preferred', 'at least 1 character'),
    ({'rating': 5}, 'rating', 'does not know'),
    (
      {'messages': [{'role': 'user', 'content': 'm' * 2**18}]},
      'messages',
      'send the last messages only',
    ),
  ],
)
def test_a_body_that_says_nothing_or_too_much_is_refused(
  served, records, fields, param, message
):
  body = {**SAID, **fields}
  answer = served().post('/v1/feedback', json=body, **_as('alice'))
  assert answer.status_code == 400, answer.text
  error = answer.json()['error']
  assert error['param'] == param
  assert message in error['message']
  assert not _rows(records)


def test_the_largest_body_fits_the_limit_of_the_server(served, monkeypatch):
  """What the fields allow is not refused for its size."""
  message = {'role': 'user', 'content': 'm' * 100}
  body = {
    **SAID,
    'messages': [message] * feedback_schema.MOST_MESSAGES,
    'answer': 'a' * feedback_schema.MOST_TEXT,
    'preferred': 'p' * feedback_schema.MOST_TEXT,
    'comment': 'c' * feedback_schema.MOST_COMMENT,
  }
  answer = served().post('/v1/feedback', json=body, **_as('alice'))
  assert answer.status_code == 200, answer.text
  assert schema.Body.most_lists < feedback_schema.FeedbackRequest.most_lists


def test_the_log_has_nothing_of_the_conversation(served, caplog):
  caplog.set_level(logging.DEBUG)
  said = {**SAID, 'comment': 'a comment', 'preferred': 'a better one'}
  answer = served().post('/v1/feedback', json=said, **_as('alice'))
  assert answer.json()['id'] in caplog.text
  for text in ('secret', 'hidden', 'a comment', 'a better', 'alice'):
    assert text not in caplog.text
