"""Scorers that strategies name: reward models, self-verification, verifiers."""

import httpx2
import jax
import numpy as np
import pytest

from evals.verifiers.sandbox import runner
from inference import generate, model_port
from inference.engine import engine_config
from inference.server import (
  app as app_lib,
  engine_loop,
  server_config,
  service,
)
from inference.server.records import database
from inference.server.search import scoring
from models.layers import reward_head
from tests.helpers import frozen_dirs
from tests.helpers.serving import servers

_URL = '/v1/chat/completions'
_CONFIG = frozen_dirs.config(num_layers=1, max_length=192)
_ENGINE = engine_config.EngineConfig(
  max_sequences=4,
  decode_shapes=(4,),
  chunk_tokens=32,
  max_chunks=1,
  max_mixed_chunks=1,
  page_size=8,
)
_ASKED = {
  'model': servers.MODEL,
  'messages': [{'role': 'user', 'content': 'a'}],
  'max_tokens': 6,
  'seed': 3,
}


@pytest.fixture(scope='module')
def records():
  return database.Database(None, tables=app_lib.TABLES)


@pytest.fixture(scope='module')
def reward_model(tmp_path_factory):
  directory = tmp_path_factory.mktemp('judge') / 'reward'
  head = reward_head.init(_CONFIG.model_width, jax.random.key(0))
  frozen_dirs.write(
    directory,
    config=_CONFIG,
    params={**frozen_dirs.params(_CONFIG), 'heads': {'reward': head}},
    chat_template=(
      '{% for m in messages %}<{{ m.role }}>{{ m.content }}</{{ m.role }}>'
      '{% endfor %}'
    ),
  )
  return generate.load(directory, _ENGINE, is_for_rewards=True)


@pytest.fixture(scope='module')
def http(tmp_path_factory, records, reward_model):
  directory = tmp_path_factory.mktemp('long') / 'tiny'
  frozen_dirs.write(directory, config=_CONFIG)
  judge = service.ServedModel(
    'helpful',
    engine_loop.EngineLoop(lambda: reward_model),
    reward_model.frozen.manifest,
  )
  generator = generate.load(directory, _ENGINE)
  with (
    servers.running(
      generator,
      records=records,
      app={'scorers': {'helpful': judge}},
      verifiers='number,unit_tests,column_sum',
    ) as served,
    httpx2.Client(base_url=served.url, timeout=60) as http,
  ):
    servers.until(lambda: judge.state == engine_loop.READY)
    yield http


def _rows(records):
  return records.submit(
    lambda connection: connection.execute(
      'SELECT model, flops, prompt_tokens, completion_tokens FROM ledger'
    ).fetchall()
  ).result()


@pytest.mark.parametrize('scorer', ['helpful', 'self'])
@pytest.mark.parametrize('name', ['best_of_n', 'self_consistency'])
def test_scores_of_models_are_in_receipt_and_bill(http, records, scorer, name):
  before = len(_rows(records))
  strategy = {'name': name, 'n': 3, 'scorer': scorer}
  answer = http.post(_URL, json=_ASKED | {'strategy': strategy})
  assert answer.status_code == 200, answer.text
  usage = answer.json()['usage']
  receipt = usage['receipt']
  rows = _rows(records)[before:]
  assert sum(row[1] for row in rows) == pytest.approx(receipt['flops'])
  assert sum(row[3] for row in rows) == usage['completion_tokens']
  judge = 'helpful' if scorer == 'helpful' else servers.MODEL
  of_scores = [row for row in rows if row[0] == judge and not row[3]]
  assert 1 <= len(of_scores) <= 3
  assert receipt['scored_tokens'] == sum(row[2] for row in of_scores) > 0
  flops = sum(row[1] for row in of_scores)
  assert receipt['score_flops'] == pytest.approx(flops)


def test_the_answer_with_the_largest_reward_wins(http, reward_model):
  """The same samples without a scorer are those of n = 4."""
  plain = http.post(_URL, json=_ASKED | {'n': 4}).json()
  texts = [each['message']['content'] for each in plain['choices']]
  best = http.post(
    _URL,
    json=_ASKED
    | {'strategy': {'name': 'best_of_n', 'n': 4, 'scorer': 'helpful'}},
  ).json()['choices'][0]
  # The engine of the reward model belongs to the server's thread meanwhile,
  # which sleeps while nothing is asked.
  score = model_port.rewarder(reward_model)
  ids = [model_port.encode_answer(reward_model, 'a', text) for text in texts]
  assert best['message']['content'] == texts[int(np.argmax(score(ids)))]


def test_a_budget_pays_for_scores(http):
  strategy = {'name': 'best_of_n', 'n': 8, 'scorer': 'helpful'}
  asked = _ASKED | {'strategy': strategy}
  whole = http.post(_URL, json=asked).json()['usage']['receipt']
  budget = {'flops': 0.9 * whole['flops']}
  part = http.post(_URL, json=asked | {'budget': budget}).json()
  receipt = part['usage']['receipt']
  assert receipt['ended_by'] == 'budget'
  assert whole['score_flops'] / 8 < receipt['flops'] <= budget['flops']
  assert receipt['score_flops'] > 0


def test_a_verifier_without_a_record_is_asked_for_none(http):
  strategy = {'name': 'best_of_n', 'n': 2, 'scorer': 'column_sum'}
  answer = http.post(_URL, json=_ASKED | {'strategy': strategy})
  assert answer.status_code == 200, answer.text
  assert answer.json()['usage']['receipt']['num_samples'] == 2


def test_a_verifier_reads_its_record(http):
  strategy = {
    'name': 'best_of_n',
    'n': 2,
    'scorer': 'number',
    'record': {'answer': '42'},
  }
  answer = http.post(_URL, json=_ASKED | {'strategy': strategy})
  assert answer.status_code == 200, answer.text
  assert answer.json()['usage']['receipt']['score_flops'] == 0
  try:
    runner.check()
  except runner.Unavailable:
    return
  tests = {'tests': ['assert add(1, 2) == 3']}
  strategy |= {'scorer': 'unit_tests', 'record': tests}
  answer = http.post(_URL, json=_ASKED | {'strategy': strategy})
  assert answer.status_code == 200, answer.text


@pytest.mark.parametrize(
  ('fields', 'param', 'words'),
  [
    ({'scorer': 'exact'}, 'strategy.scorer', 'helpful, number, unit_tests'),
    ({'scorer': 'number'}, 'strategy.record', 'expected one with a verifier'),
    (
      {'scorer': 'number', 'record': {'answer': 'x'}},
      'strategy.record',
      'answer',
    ),
    ({'record': {'answer': '1'}}, 'strategy.record', 'none without'),
    ({'scorer': 'column_sum', 'record': {}}, 'strategy.record', 'got a record'),
    ({'name': 'once', 'n': None, 'scorer': 'self'}, 'strategy.scorer', 'once'),
    (
      {'name': 'self_consistency', 'scorer': 'likelihood'},
      'strategy.scorer',
      'expected one of self,',
    ),
  ],
)
def test_a_scorer_that_does_not_fit_is_refused(http, fields, param, words):
  strategy = {'name': 'best_of_n', 'n': 2} | fields
  answer = http.post(_URL, json=_ASKED | {'strategy': strategy})
  assert answer.status_code == 400, answer.text
  error = answer.json()['error']
  assert error['param'] == param
  assert words in error['message']


def test_wrong_flags_are_refused():
  with pytest.raises(ValueError, match='server.scorers: got'):
    server_config.ServerConfig(scorers='helpful')
  with pytest.raises(ValueError, match='server.verifiers: got exec'):
    scoring.check_names({}, ('exec',))
  with pytest.raises(ValueError, match='got the name self'):
    scoring.check_names({'self': 'x'}, ())
