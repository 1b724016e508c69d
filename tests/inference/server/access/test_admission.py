"""Admission: what is reserved, for whom, and with which weight."""

import asyncio

import pytest

from inference.requests import requests
from inference.sampling import settings
from inference.server import app as app_lib, engine_loop
from inference.server.access import admission, keys, limits
from inference.server.http import exchanges
from inference.server.records import database, ledger

_PRICES = admission.Prices(prompt=1.0, cached=0.25, completion=4.0)
_KEY = keys.Key(id='key_a', name='a', weight=3.0, tokens_per_minute=1000)


@pytest.fixture
def admit():
  """Returns a function that admits requests of a key."""
  records = database.Database(None, tables=app_lib.TABLES)
  gate = admission.Admission(ledger.Ledger(records), _PRICES)

  def admit(asked, key=_KEY, end=None):
    async def run():
      state = {'request_id': 'req_1', 'key': key}
      exchanges.begin(exchange := exchanges.Exchange({'state': state}))
      admitted = await gate.admit(asked, model='m', weights_digest='d')
      if end:
        admitted.end(end)
      return admitted, exchange.limit_headers

    return asyncio.run(run())

  yield admit
  records.close()


def _request(length=10, *, room=None, target=None, **fields):
  return requests.Request(
    prompt_ids=(1,) * length,
    settings=settings.Settings(**fields),
    room=room,
    target=target,
  )


@pytest.mark.parametrize(
  ('asked', 'tokens', 'nanos'),
  [
    ([_request(max_tokens=5, room=5)], 15, 10 * 1000 + 5 * 4000),
    ([_request(max_tokens=5, room=5, n=3)], 25, 10 * 1000 + 15 * 4000),
    # Without max_tokens, as many may follow as there is room for.
    ([_request(room=54)], 64, 10 * 1000 + 54 * 4000),
    ([_request(room=1, target=0)], 10, 10 * 1000),
    ([_request(room=2), _request(3, room=4)], 19, 13 * 1000 + 6 * 4000),
  ],
)
def test_prompts_and_the_most_that_may_follow_are_reserved(
  admit, asked, tokens, nanos
):
  admitted, headers = admit(asked)
  about = admitted._entry.about
  assert (about.reserved_tokens, about.reserved_nanos) == (tokens, nanos)
  assert headers['x-ratelimit-remaining-tokens'] == str(1000 - tokens)
  assert (about.key_id, about.principal) == ('key_a', 'a')


def test_what_the_engine_refuses_is_given_back(admit):
  refused = engine_loop.Ended(updates=[], error=ValueError('too long'))
  for _ in range(20):  # 100 tokens each: the eleventh would be refused
    admit([_request(50, room=50)], end=refused)
  with pytest.raises(limits.Refusal, match='can never pass'):
    admit([_request(500, room=501)])


def test_the_weight_of_the_key_reaches_the_engine(admit):
  admitted, _ = admit([_request(room=1)])
  assert [each.weight for each in admitted.requests] == [3.0]
  admitted, headers = admit([_request(room=1)], key=None)
  assert [each.weight for each in admitted.requests] == [1.0]
  assert headers == {}


def test_a_cached_prompt_that_costs_more_is_reserved_at_its_price():
  prices = admission.Prices(prompt=1.0, cached=2.0)
  assert prices.most_nanos(prompt=10, completion=5) == 20_000


@pytest.mark.parametrize('price', [-1.0, float('nan'), float('inf')])
def test_a_wrong_price_is_named(price):
  with pytest.raises(ValueError, match='server.price_prompt: got'):
    admission.Prices(prompt=price)


def test_a_budget_without_prices_is_warned_of(caplog):
  records = database.Database(None, tables=app_lib.TABLES)
  gate = admission.Admission(ledger.Ledger(records))
  gate._limits_of(keys.Key(id='key_b', name='b', budget=5.0))
  assert 'a budget that never ends, since all prices are 0' in caplog.text
  records.close()
