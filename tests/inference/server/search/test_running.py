"""Chats that say how much to spend: efforts, strategies, budgets, receipts."""

import time

import httpx2
import pytest

from inference.server import app as app_lib
from inference.server.access import keys as keys_lib
from inference.server.api import shapes
from inference.server.records import database
from tests.helpers.serving import scripted_models, servers

_URL = '/v1/chat/completions'
_USER = {'role': 'user', 'content': 'How is it?'}


@pytest.fixture(scope='module')
def ask(http):
  """Returns a function that asks; the answer has the published shape."""

  def ask(status=200, **fields):
    body = {'model': servers.MODEL, 'messages': [_USER], 'max_tokens': 6}
    answer = http.post(_URL, json=body | {'seed': 1} | fields)
    assert answer.status_code == status, answer.text
    found = answer.json()
    if status == 200:
      shapes.Chat.model_validate(found)
    return found

  return ask


@pytest.mark.parametrize(
  'strategy',
  [
    {'name': 'once'},
    {'name': 'best_of_n', 'n': 4},
    {'name': 'self_consistency', 'n': 5},
    {'name': 'beam', 'n': 4},
  ],
)
def test_an_answer_of_a_strategy_has_a_receipt(ask, served, strategy):
  found = ask(strategy=strategy)
  usage = found['usage']
  receipt = usage['receipt']
  made = (
    receipt['reasoning_tokens']
    + receipt['answer_tokens']
    + receipt['discarded_tokens']
  )
  assert usage['completion_tokens'] == made > 0
  assert receipt['num_samples'] >= strategy.get('n', 1)
  assert receipt['flops'] >= receipt['single_flops'] > 0
  assert receipt['ended_by'] in ('done', 'decided')
  assert found['choices'][0]['message']['content'] is not None


def test_a_strategy_of_one_sample_is_the_plain_answer(ask):
  plain, once = ask(), ask(strategy={'name': 'once'})
  assert plain['choices'][0]['message'] == once['choices'][0]['message']
  assert 'receipt' not in plain['usage']


def test_a_budget_holds_and_a_stream_says_the_same(ask, http):
  fields = {
    'strategy': {'name': 'best_of_n', 'n': 8},
    'budget': {'tokens': 13},
  }
  found = ask(**fields)
  assert found['usage']['completion_tokens'] <= 13
  assert found['usage']['receipt']['ended_by'] == 'budget'
  body = {'model': servers.MODEL, 'messages': [_USER], 'max_tokens': 6}
  options = {'stream': True, 'stream_options': {'include_usage': True}}
  answer = http.post(_URL, json=body | {'seed': 1} | fields | options)
  events = servers.events(answer.content)
  text = ''.join(
    choice['delta'].get('content') or ''
    for event in events
    for choice in event['choices']
  )
  assert text == found['choices'][0]['message']['content']
  assert (
    events[-1]['usage']['receipt']['num_samples']
    == (found['usage']['receipt']['num_samples'])
  )


def test_seconds_end_an_answer_where_it_is(ask, served, monkeypatch):
  step = served.generator.engine.step

  def slow_step():
    time.sleep(0.02)  # else a quick step may be the last before the deadline
    return step()

  monkeypatch.setattr(served.generator.engine, 'step', slow_step)
  found = ask(max_tokens=20, ignore_eos=True, budget={'seconds': 1e-4})
  assert found['usage']['receipt']['ended_by'] == 'budget'
  assert found['usage']['completion_tokens'] < 20
  assert found['choices'][0]['finish_reason'] == 'length'


@pytest.mark.parametrize(
  ('fields', 'param', 'words'),
  [
    ({'strategy': {'name': 'vote'}}, 'strategy', 'best_of_n'),
    ({'strategy': {'name': 'best_of_n'}}, 'strategy.n', 'n (samples)'),
    ({'strategy': {'name': 'once', 'n': 2}}, 'strategy.n', 'expected none'),
    ({'strategy': {'name': 'beam', 'n': 6}}, 'strategy.n', 'a multiple of 4'),
    ({'strategy': {'name': 'best_of_n', 'n': 999}}, 'strategy.n', '256'),
    (
      {'strategy': {'name': 'best_of_n', 'n': 2}, 'temperature': 0},
      'strategy',
      'all samples would be the same',
    ),
    ({'strategy': {'name': 'once'}, 'n': 2}, 'n', 'one text'),
    ({'budget': {'tokens': 0}}, 'budget', 'got tokens = 0'),
    ({'budget': {'pages': 3}}, 'budget', 'budget.pages: got a parameter'),
    ({'budget': {'money': 1.0}}, 'budget.money', 'all prices of this server'),
    ({'budget': {'flops': 1.0}}, 'budget', 'enough for the prompt'),
    ({'reasoning_effort': 'huge'}, 'reasoning_effort', 'none'),
    ({'reasoning': {'budget': -1}}, 'reasoning.budget', 'got -1'),
    (
      {'reasoning': {'budget': 3}, 'reasoning_effort': 'low'},
      'reasoning.budget',
      'expected one of them',
    ),
    ({'reasoning_effort': 'low'}, 'reasoning_effort', 'marks no reasoning'),
    ({'reasoning_effort': 'auto'}, 'reasoning_effort', 'effort_predictor'),
    ({'reasoning': {'effort': 'auto'}}, 'reasoning.effort', 'no predictor'),
    (
      {'reasoning_effort': 'auto', 'strategy': {'name': 'once'}},
      'strategy',
      'auto chooses the strategy',
    ),
    (
      {'strategy': {'name': 'wait', 'n': 1}},
      'strategy',
      'marks its reasoning',
    ),
  ],
)
def test_bad_values_are_refused(ask, fields, param, words):
  error = ask(status=400, **fields)['error']
  assert error['param'] == param, error
  assert words in error['message']


def test_an_effort_that_limits_nothing_is_taken(ask):
  assert ask(reasoning_effort='none')['choices']


@pytest.mark.slow
def test_reasoning_is_capped_and_an_answer_follows(talker):
  with (
    servers.running(talker) as served,
    httpx2.Client(base_url=served.url, timeout=60) as http,
  ):
    body = {
      'model': servers.MODEL,
      'messages': [_USER],
      'temperature': 0,
      'tools': scripted_models.TOOLS,
      'chat_template_kwargs': {'thinks': True},
    }
    thoughts = []
    for limit in (
      {},
      {'reasoning': {'budget': 1}},
      {'reasoning_effort': 'none'},
    ):
      answer = http.post(_URL, json=body | limit)
      assert answer.status_code == 200, answer.text
      found = answer.json()
      message = found['choices'][0]['message']
      details = found['usage']['completion_tokens_details']
      thoughts.append(
        (message.get('reasoning_content'), details['reasoning_tokens'])
      )
      # The model goes on behind its closing marker, forced or not.
      assert message['tool_calls'][0]['function']['name'] == 'weather'
    assert thoughts == [('I need it.', 2), ('I need ', 1), (None, 0)]
    # Responses have the same limits; here the model opens its reasoning itself.
    asked = {
      'model': servers.MODEL,
      'input': _USER['content'],
      'temperature': 0,
      'tools': [
        {'type': 'function', **tool['function']}
        for tool in scripted_models.TOOLS
      ],
    }
    for limit, thought in (
      ({'effort': 'high'}, 'I need it.'),
      ({'budget': 1}, 'I need '),
    ):
      answer = http.post('/v1/responses', json=asked | {'reasoning': limit})
      assert answer.status_code == 200, answer.text
      found = answer.json()
      assert found['reasoning'] == {'effort': None, 'summary': None} | limit
      reasoning, call = found['output']
      assert reasoning['content'][0]['text'] == thought
      assert call['name'] == 'weather'


def test_a_bill_has_all_samples_and_a_limit_of_the_key_holds(generator):
  records = database.Database(None, tables=app_lib.TABLES)
  made = records.submit(
    lambda connection: keys_lib.create(
      connection, name='user', is_admin=False, tokens_per_minute=400
    )
  )
  _, key = made.result()
  headers = {'authorization': f'Bearer {key}'}
  body = {'model': servers.MODEL, 'messages': [_USER], 'max_tokens': 6}
  asked = body | {'strategy': {'name': 'best_of_n', 'n': 4}, 'seed': 1}
  with (
    servers.running(generator, records=records) as served,
    httpx2.Client(base_url=served.url, timeout=60, headers=headers) as http,
  ):
    usage = http.post(_URL, json=asked).json()['usage']
    receipt = usage['receipt']
    tokens, flops, still_open = records.submit(
      lambda connection: connection.execute(
        'SELECT sum(completion_tokens), sum(flops), sum(outcome IS NULL)'
        ' FROM ledger'
      ).fetchone()
    ).result()
    assert tokens == usage['completion_tokens'] > 6
    assert receipt['discarded_tokens'] > 0
    assert flops == pytest.approx(receipt['flops'])
    assert still_open == 0
    # 64 samples may take more tokens than the key ever has in a minute.
    asked['strategy'] = {'name': 'best_of_n', 'n': 64}
    answer = http.post(_URL, json=asked)
    assert answer.status_code == 429, answer.text
    assert answer.headers['x-should-retry'] == 'false'
