"""The fleet to buy: the fewest replicas that are enough, and the table."""

import types

import pytest

from studies import serving_fleet
from studies.fleet import fleet, traffic


def _summary(first, token=0.01):
  return fleet.Summary(
    requests_per_s=1.0, tokens_per_s=1000.0, to_last_mean=1.0,
    to_first_p50=first / 2, to_first_p99=first, per_token_p50=token / 2,
    per_token_p99=token, cached=0.5, busy=0.5,
  )  # fmt: skip


_WANTED = serving_fleet.Wanted(
  to_first_p99=1.0, per_token_p99=0.05, most_replicas=30
)


@pytest.mark.parametrize(
  ('needed', 'first', 'expected'),
  [(1, 0, 1), (3, 1, 3), (10, 8, 10), (20, 16, 20), (99, 10, 30)],
)
def test_the_fewest_replicas_that_are_enough(needed, first, expected):
  asked = []

  def run(num):
    asked.append(num)
    return _summary(0.5 if num >= needed else 2.0)

  num, found = serving_fleet.fewest(run, _WANTED, first)
  assert num == expected == asked[-1]
  assert _WANTED.met_by(found) == (needed <= 30)
  assert asked == sorted(set(asked))


def test_slow_tokens_are_not_enough():
  assert not _WANTED.met_by(_summary(0.5, token=0.06))


def test_a_table_says_what_is_not_enough():
  bought = serving_fleet.Bought(
    load=8.0, placement='affinity', num_replicas=3, num_devices=6,
    found=_summary(0.5), is_enough=True,
  )  # fmt: skip
  row = serving_fleet.table([bought], None).splitlines()[-1]
  assert row.startswith('| 8/s | affinity | 3 | 6 | 0.25 s | 0.5 s | 5 ms |')


def _given(**values):
  return types.SimpleNamespace(
    **{
      'model': None,
      'config': 'experiments/pretrain.py:8b',
      'target': 'h100:1',
    }
    | values
  )


def test_loads_are_numbers():
  assert serving_fleet._loads(['2', '0.5']) == [2.0, 0.5]
  with pytest.raises(ValueError, match='--loads: got 2,x, expected requests'):
    serving_fleet._loads(['2', 'x'])


@pytest.mark.parametrize(
  ('values', 'message'),
  [
    ({'target': 'h100'}, 'expected a number of devices'),
    ({'config': 'experiments/pretrain.py:70b'}, 'which does not hold'),
    ({'config': None}, 'both or none of --model and --config'),
  ],
)
def test_a_replica_that_cannot_be_is_refused(values, message):
  with pytest.raises(ValueError, match=message):
    serving_fleet._plan_of(_given(**values))


def test_a_margin_is_one_of_affinity():
  for good in ('affinity', 'affinity:4', 'least_busy'):
    serving_fleet._check_placement(good)
  for bad in ('affinity:x', 'least_busy:3', 'random'):
    with pytest.raises(ValueError, match='--placements: got'):
      serving_fleet._check_placement(bad)


def test_a_small_fleet_is_bought():
  planned = serving_fleet._plan_of(_given(target='h100:2'))
  assert planned.tensor == 2
  buyer = serving_fleet._buyer(
    planned, _given(max_sequences=8, efficiency=0.5, host_seconds=0.001)
  )
  like = traffic.Traffic(
    rate=1.0, prompt_tokens=40, answer_tokens=10, prefix_tokens=100
  )
  bought = buyer.bought(like, _WANTED, 'affinity', seconds=20)
  assert (bought.num_replicas, bought.num_devices) == (1, 2)
  assert bought.is_enough
  assert bought.found.cached > 0
