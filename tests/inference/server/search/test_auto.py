"""The effort auto: a prefill, a predictor's choice, and their receipt."""

import dataclasses

import httpx2
import pytest

from frozen import effort_predictor
from inference.engine import engine_config
from inference.search.routing import router as router_lib
from inference.server import app as app_lib, server_config, start
from inference.server.records import database
from inference.server.search import scoring
from tests.helpers.serving import effort_predictors, servers

# It keeps the answer whose steps a program finds right.
_HIGH = 'best_of_n:4:column_sum'
_SHORT = [{'role': 'user', 'content': 'hi'}]
_LONG = [{'role': 'user', 'content': 'Tell me of a way there.'}]


@pytest.fixture(scope='module')
def records():
  return database.Database(None, tables=app_lib.TABLES)


@pytest.fixture(scope='module')
def router(generator):
  digest = generator.frozen.manifest.weights_digest
  width = generator.engine.model_config.model_width
  return router_lib.Router(
    effort_predictors.of_length(
      width, digest, least=30, efforts=('once', _HIGH)
    ),
    budget=1e12,
  )


@pytest.fixture(scope='module')
def http(generator, records, router):
  digest = generator.frozen.manifest.weights_digest
  app = {'routers': {digest: router}}
  with (
    servers.running(
      generator, records=records, app=app, verifiers='column_sum'
    ) as served,
    httpx2.Client(base_url=served.url, timeout=60) as http,
  ):
    yield http


def _sums(records) -> tuple[float, int, int]:
  """Returns FLOPs, sampled tokens and prompts' tokens of the ledger."""
  return records.submit(
    lambda connection: connection.execute(
      'SELECT sum(flops), sum(completion_tokens), sum(prompt_tokens)'
      ' FROM ledger'
    ).fetchone()
  ).result()


@pytest.mark.parametrize(
  ('messages', 'effort', 'num_samples'),
  [(_SHORT, 'once', 1), (_LONG, _HIGH, 4)],
)
def test_auto_does_what_is_predicted_and_the_bill_has_the_prefill(
  http, records, router, messages, effort, num_samples
):
  before = _sums(records)
  paid = router.pace.spent
  body = {'model': servers.MODEL, 'messages': messages, 'max_tokens': 6}
  answer = http.post(
    '/v1/chat/completions', json=body | {'reasoning_effort': 'auto', 'seed': 1}
  )
  assert answer.status_code == 200, answer.text
  usage = answer.json()['usage']
  receipt = usage['receipt']
  assert receipt['effort'] == effort
  assert receipt['probabilities'][effort] >= 0.5
  assert receipt['num_samples'] == num_samples
  assert receipt['score_flops'] == 0  # a program scores
  flops, sampled, prompt = (
    now - (then or 0) for now, then in zip(_sums(records), before, strict=True)
  )
  assert flops == pytest.approx(receipt['flops'])
  assert router.pace.spent - paid == pytest.approx(receipt['flops'])
  assert sampled == usage['completion_tokens']
  assert prompt >= 2 * usage['prompt_tokens']  # of the prefill, and of samples


def test_a_budget_limits_the_choice_and_pays_for_the_prefill(http):
  body = {'model': servers.MODEL, 'messages': _LONG, 'max_tokens': 6}
  asked = body | {'reasoning_effort': 'auto', 'seed': 1}
  answer = http.post(
    '/v1/chat/completions', json=asked | {'budget': {'flops': 1e10}}
  )
  receipt = answer.json()['usage']['receipt']
  assert receipt['effort'] == 'once'
  assert receipt['flops'] <= 1e10
  answer = http.post(
    '/v1/chat/completions', json=asked | {'budget': {'flops': 10.0}}
  )
  assert answer.status_code == 400
  assert 'enough for the prompt' in answer.json()['error']['message']


def test_a_predictor_of_other_weights_is_refused_at_the_start(
  frozen_dir, tmp_path
):
  path = tmp_path / 'effort.json'
  effort_predictor.save(path, effort_predictors.of_length(64, 'other', least=9))
  options = start.Options(
    directory=str(frozen_dir),
    name='tiny',
    engine=engine_config.EngineConfig(),
    limits=server_config.ServerConfig(effort_predictor=str(path)),
    host='127.0.0.1',
    port=0,
  )
  with pytest.raises(ValueError, match="predictor of the model 'other'"):
    start.serve(options)
  unknown = dataclasses.replace(
    effort_predictor.read(path), efforts=('low', 'high')
  )
  with pytest.raises(ValueError, match="effort: got 'low', expected a strat"):
    router_lib.Router(unknown)


@pytest.mark.parametrize(
  ('effort', 'words'),
  [
    (_HIGH, 'helpful, number; allow it: --server.verifiers=number,column_sum'),
    ('best_of_n:4:number', 'whose verifier reads a record'),
    ('best_of_n:4:kind', 'helpful, number; start the server with it'),
    ('best_of_n:4:helpful', None),
    ('self_consistency:4:self', None),
    ('best_of_n:4:likelihood+reasoning:8', None),
  ],
)
def test_efforts_have_scorers_that_a_server_has(effort, words):
  predictor = effort_predictors.of_length(
    64, 'digest', least=9, efforts=('once', effort)
  )
  router = router_lib.Router(predictor)
  if words is None:
    scoring.check_efforts([router], ['helpful'], ['number'])
    return
  with pytest.raises(ValueError, match='server.effort_predictor: got') as error:
    scoring.check_efforts([router], ['helpful'], ['number'])
  assert words in str(error.value)


def test_a_server_is_not_started_with_an_effort_that_it_cannot_score(
  generator, router
):
  with (
    pytest.raises(ValueError, match=r'--server\.verifiers=column_sum$'),
    servers.running(generator, app={'routers': {'any': router}}),
  ):
    pass
