"""Drafts over HTTP: the same answers, and their tokens in every account."""

import dataclasses

import httpx2
import pytest

from inference import generate
from inference.server import app as app_lib, usage
from inference.server.records import database
from tests.helpers.serving import guesses, servers
from tests.inference import conftest as life_two

pytestmark = pytest.mark.slow  # a second engine, with programs that verify
_METRIC = 'speculation_tokens_total'
_ASKED = {**servers.GREEDY, 'prompt': 'to draft', 'max_tokens': 12}


def test_accepted_and_rejected_drafts_are_in_answer_ledger_and_metrics(
  frozen_dir, generator
):
  prompt_ids = generator.prompt_ids(_ASKED['prompt'])
  settings = generator.settings_for(
    prompt_ids, max_tokens=12, temperature=0.0, ignore_eos=True
  )
  (expected,) = generator.generate([_ASKED['prompt']], settings)
  config = dataclasses.replace(
    life_two.ENGINE, speculation='ngram', draft_tokens=3
  )
  drafted = generate.load(frozen_dir, config)
  text = (*prompt_ids, *expected.token_ids)
  guesses.install(drafted.engine, guesses.Guesses([text], wrong=0.3))
  records = database.Database(None, tables=app_lib.TABLES)
  with (
    servers.running(drafted, records=records) as served,
    httpx2.Client(base_url=served.url, timeout=60) as http,
  ):
    answer = http.post('/v1/completions', json={**_ASKED, 'ignore_eos': True})
    metrics = http.get('/metrics').text
    row = records.submit(
      lambda connection: connection.execute('SELECT * FROM ledger').fetchone()
    ).result()
    table = records.submit(usage.report).result()
  (choice,) = answer.json()['choices']
  assert choice['text'] == expected.text
  counts = {
    name: choice['accounting'][f'{name}_tokens']
    for name in ('accepted', 'rejected')
  }
  assert min(counts.values()) > 0
  for name, count in counts.items():
    assert row[f'{name}_tokens'] == count
    assert servers.metric(metrics, _METRIC, kind=name) == count
  assert 'accepted' in table
