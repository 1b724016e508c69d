"""The bill: prices, costs by hand, crossing points, and the command."""

import dataclasses
import json
import pathlib
import types

import pytest

from inference.server.access import keys
from inference.server.records import database, ledger
from models import flops, model_config
from studies import economics, prices
from tests.helpers import frozen_dirs

PRICE = pathlib.Path(prices.__file__).parents[1] / (
  'experiments/prices/h100_rented.json'
)


@pytest.fixture(scope='module')
def frozen(tmp_path_factory):
  place = tmp_path_factory.mktemp('bill') / 'frozen'
  frozen_dirs.write(place)
  return place


def costs(**changes):
  return economics.Costs(
    price=prices.read(PRICE), rates=economics.Rates(**changes)
  )


def test_a_request_costs_its_products_and_its_bytes(frozen):
  del frozen
  config = model_config.ModelConfig(
    vocab_size=50_000, num_layers=24, model_width=2048, num_heads=16,
    num_kv_heads=16, head_width=128, mlp_width=8192, max_length=2048,
  )  # fmt: skip
  params = flops.num_matmul_params(config)
  prompt = economics.Request(prompt=1000.0, answer=0.0)
  # 989.4 TFLOP/s and 3.35 TB/s of an H100, half and six tenths of them.
  seconds = 1000 * 2 * params / (989.4e12 * 0.5)
  assert costs().request(config, prompt) == pytest.approx(
    seconds / 3600 * 2.69, rel=1e-6
  )
  answer = economics.Request(prompt=0.0, answer=100.0)
  cache = 50 * 24 * 32 * 128 * 2
  seconds = 100 * (params * 2 / 16 + cache) / (3.35e12 * 0.6)
  assert costs().request(config, answer) == pytest.approx(
    seconds / 3600 * 2.69, rel=1e-6
  )
  measured = costs(prompt_tokens_per_s=500.0, answer_tokens_per_s=50.0)
  assert measured.request(config, prompt) == pytest.approx(2 / 3600 * 2.69)
  assert measured.request(config, answer) == pytest.approx(2 / 3600 * 2.69)
  # Four bits read fewer bytes, measured or not, and change no product.
  for each in (costs(), measured):
    small = each.request(config, answer, weight_bytes=0.5625)
    assert small < each.request(config, answer)
    same = each.request(config, prompt, weight_bytes=0.5625)
    assert same == each.request(config, prompt)


def test_bills_are_equal_where_they_cross():
  first, second = (
    economics.Bill(name='', once=once, per_request=each, loss=None)
    for once, each in ((10.0, 3.0), (30.0, 1.0))
  )
  requests = economics.crossing(first, second)
  assert requests == 10.0
  assert first.total(requests) == second.total(requests)
  worse = economics.Bill(name='', once=20.0, per_request=4.0, loss=None)
  assert economics.crossing(first, worse) is None
  assert economics.crossing(first, first) is None


def values(frozen, **changes):
  """Returns the values of the flags: their defaults, but for `changes`."""
  given = {
    'model': str(frozen), 'prices': str(PRICE), 'records': '',
    'tokens_in': 500.0, 'tokens_out': 200.0, 'requests_per_day': 1e5,
    'requests': 0.0,
  }  # fmt: skip
  for kind in (economics.Rates, economics.Options):
    given |= dataclasses.asdict(kind())
  return types.SimpleNamespace(**(given | changes))


def test_the_command_has_both_tables_and_a_figure(frozen, tmp_path):
  path = tmp_path / 'bill.svg'
  out = economics.run(values(frozen, requests=1e6), str(path))
  assert out.startswith('H100 80 GB SXM, rented by the hour: 2.69 USD per hour')
  assert '2026-11-29' in out.splitlines()[0]
  for way in ('as it is', 'quantise', 'distil', 'think 4 x', 'train 4 x'):
    assert f'| {way}' in out
  assert 'training and inference, USD' in path.read_text()


def test_the_ledger_gives_the_mean_request_and_those_of_a_day(tmp_path):
  path = str(tmp_path / 'records.sqlite')
  records = database.Database(path, tables=[keys.TABLES, ledger.TABLES])

  def insert(connection):
    for i, (prompt, answer) in enumerate([(100, 10), (300, 30), (9, 9)]):
      connection.execute(
        'INSERT INTO ledger (id, request_id, idempotency, key_id, principal,'
        ' model, weights_digest, opened_at, reserved_tokens, reserved_nanos,'
        " outcome, prompt_tokens, completion_tokens) VALUES (?, '', '', '', '',"
        " '', '', ?, 0, 0, ?, ?, ?)",
        # Two days apart; the last one is still open.
        (str(i), i * 172_800.0, None if i == 2 else 'finished', prompt, answer),
      )

  records.submit(insert).result()
  records.close()
  request, per_day = economics.used(path)
  assert (request.prompt, request.answer, per_day) == (200.0, 20.0, 1.0)


@pytest.mark.parametrize(
  ('changes', 'words'),
  [
    ({'batch': 0}, '--batch: got 0, expected at least 1'),
    ({'answer_share': 1.5}, '--answer_share: got 1.5, expected more than 0'),
    ({'distil_share': 1.0}, '--distil_share: got 1.0, expected a share'),
    ({'think_factor': 1.0}, '--think_factor: got 1.0, expected a number ab'),
    ({'tokens_in': 0.0}, '--tokens_in: got 0.0, expected more than 0'),
    ({'records': 'none.sqlite'}, '--records: got none.sqlite, which does not'),
    ({'prices': 'none.json'}, 'none.json'),
  ],
)
def test_wrong_values_are_refused(frozen, changes, words):
  with pytest.raises((ValueError, OSError), match=words):
    economics.run(values(frozen, **changes))


@pytest.mark.parametrize(
  ('changes', 'words'),
  [
    ({'date': 'May'}, "date = 'May' in .*, expected YYYY-MM-DD"),
    ({'device_hour': 0}, 'device_hour = 0 in .*, expected a price above 0'),
    ({'source': ''}, "source = '' in .*, expected a text"),
    ({'device': 'abacus'}, "device: got 'abacus', expected one of"),
    ({'color': 1}, 'expected currency, date, device'),
  ],
)
def test_a_price_without_date_or_source_is_refused(tmp_path, changes, words):
  path = tmp_path / 'price.json'
  path.write_text(json.dumps(json.loads(PRICE.read_text()) | changes))
  with pytest.raises(ValueError, match=words):
    prices.read(path)
