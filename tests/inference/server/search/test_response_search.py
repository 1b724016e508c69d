"""Responses that a strategy makes: stored, continued, streamed, left."""

import json
import time

import httpx2
import pytest

from inference.server import app as app_lib
from inference.server.api import response_shapes
from inference.server.records import database
from tests.helpers.serving import servers

_URL = '/v1/responses'
_ASKED = {
  'model': servers.MODEL,
  'input': 'a',
  'max_output_tokens': 6,
  'temperature': 1.0,
  'strategy': {'name': 'best_of_n', 'n': 3},
}


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


def _rows(records) -> list[tuple[str, int]]:
  """Returns outcome and sampled tokens of each row of the ledger."""
  return records.submit(
    lambda connection: connection.execute(
      'SELECT outcome, completion_tokens FROM ledger ORDER BY rowid'
    ).fetchall()
  ).result()


def _events(answer) -> list[dict]:
  lines = answer.text.splitlines()
  data = [x.removeprefix('data: ') for x in lines if x.startswith('data: ')]
  return [json.loads(each) for each in data]


def test_a_response_of_a_strategy_is_stored_and_continued(http):
  answer = http.post(_URL, json=_ASKED)
  assert answer.status_code == 200, answer.text
  response = answer.json()
  response_shapes.Response.model_validate(response)
  usage = response['usage']
  receipt = usage['receipt']
  assert receipt['num_samples'] == 3
  kinds = 'reasoning', 'answer', 'discarded'
  made = sum(receipt[f'{kind}_tokens'] for kind in kinds)
  assert usage['output_tokens'] == made > receipt['answer_tokens']
  stored = http.get(f'{_URL}/{response["id"]}').json()
  assert stored == response
  more = {'previous_response_id': response['id'], 'input': 'b'}
  answer = http.post(_URL, json=_ASKED | more | {'max_output_tokens': 2})
  assert answer.status_code == 200, answer.text
  continued = answer.json()
  assert continued['usage']['receipt']['num_samples'] == 3
  assert continued['usage']['input_tokens'] > usage['input_tokens']


def _said(events) -> str:
  kind = 'response.output_text.delta'
  return ''.join(each['delta'] for each in events if each['type'] == kind)


def test_a_stream_is_the_response_of_the_winner(http):
  answer = http.post(_URL, json=_ASKED | {'stream': True})
  events = _events(answer)
  assert [each['type'] for each in events[:2]] == [
    'response.created',
    'response.in_progress',
  ]
  last = events[-1]['response']
  assert last['usage']['receipt']['num_samples'] == 3
  (message,) = last['output']
  assert _said(events) == message['content'][0]['text']
  assert http.get(f'{_URL}/{last["id"]}').json() == last


def test_one_sample_is_streamed_as_it_comes(http, served, records, monkeypatch):
  step = served.generator.engine.step

  def slow_step():
    time.sleep(0.05)
    return step()

  asked = _ASKED | {'temperature': 0.0, 'max_output_tokens': 20}
  del asked['strategy']
  (message,) = http.post(_URL, json=asked).json()['output']
  monkeypatch.setattr(served.generator.engine, 'step', slow_step)
  asked |= {'strategy': {'name': 'once'}, 'stream': True}
  events, ends = [], []
  with http.stream('POST', _URL, json=asked) as answer:
    for line in answer.iter_lines():
      if not line.startswith('data: '):
        continue
      events.append(json.loads(line.removeprefix('data: ')))
      if events[-1]['type'] == 'response.output_text.delta':
        ends.append(_rows(records)[-1][0])
        monkeypatch.undo()
  assert ends[0] is None  # the sample had not ended
  assert _said(events) == message['content'][0]['text']
  assert events[-1]['response']['usage']['receipt']['num_samples'] == 1


@pytest.mark.parametrize(
  ('fields', 'param'),
  [
    ({'tools': [{'type': 'function', 'name': 'f'}]}, 'tools'),
    ({'include': ['message.output_text.logprobs']}, 'include'),
    ({'strategy': {'name': 'beam', 'n': 3}}, 'strategy.n'),
    ({'budget': {'tokens': -1}}, 'budget'),
    ({'temperature': 0.0}, 'strategy'),
    ({'reasoning': {'effort': 'auto'}}, 'strategy'),
    ({'strategy': None, 'reasoning': {'effort': 'auto'}}, 'reasoning.effort'),
    ({'budget': {'flops': 1.0}, 'stream': True}, 'budget'),
  ],
)
def test_a_parameter_that_does_not_fit_is_refused(http, fields, param):
  answer = http.post(_URL, json=_ASKED | fields)
  assert answer.status_code == 400, answer.text
  assert answer.json()['error']['param'] == param


@pytest.mark.parametrize('url', [_URL, '/v1/chat/completions'])
def test_a_client_that_leaves_a_stream_pays_for_what_was_computed(
  served, http, records, url
):
  num_rows = len(_rows(records))
  messages = {'messages': [{'role': 'user', 'content': 'a'}]}
  asked = _ASKED | {'stream': True, 'strategy': {'name': 'best_of_n', 'n': 64}}
  if url != _URL:
    asked = {k: asked[k] for k in ('model', 'stream', 'strategy')} | messages
  else:
    asked['max_output_tokens'] = 30
  with http.stream('POST', url, json=asked) as answer:
    assert answer.status_code == 200
    next(answer.iter_bytes())  # the head, while samples are computed
  servers.until(
    lambda: (
      all(row[0] for row in _rows(records))
      and not served.generator.engine.has_work
    )
  )
  (row,) = _rows(records)[num_rows:]
  outcome, sampled = row
  assert outcome == 'cancelled'
  assert sampled < 64 * 30
