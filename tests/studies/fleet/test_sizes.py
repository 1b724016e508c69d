"""The load that fleets carry: the search, the table and the figure."""

import math
import types

import numpy as np
import pytest

from studies import serving_fleet
from studies.fleet import fleet, sizes, traffic


def _summary(first):
  return fleet.Summary(
    requests_per_s=1.0, tokens_per_s=1000.0, to_last_mean=1.0,
    to_first_p50=first / 2, to_first_p99=first, per_token_p50=0.005,
    per_token_p99=0.01, cached=0.5, busy=0.5,
  )  # fmt: skip


@pytest.mark.parametrize('most', [0.02, 0.3, 0.99, 1.0, 1.2, 5.0, 40.0])
def test_the_largest_load_is_found_in_few_tries(most):
  asked = []

  def run(load):
    asked.append(load)
    return _summary(load)

  load, found = sizes.largest(run, lambda x: x.to_first_p99 <= most, 1.0)
  assert most / sizes.STEP < load <= most * (1 + 1e-9)
  assert found.to_first_p99 == load
  # Strides grow: a load far away costs about as many tries as its logarithm.
  steps = abs(math.log(most, sizes.STEP))
  assert len(asked) <= 3 + 2 * math.log2(steps + 2)
  assert len(set(asked)) == len(asked)


def test_a_fleet_that_is_never_fast_enough_carries_nothing():
  load, _ = sizes.largest(_summary, lambda _: False, 1.0)
  assert load == 0.0


def _carried(placements=('affinity', 'least_busy')):
  """Returns fleets of which a replica carries more beside others."""
  return [
    each
    for placement in placements
    for each in sizes.carried(
      lambda placement, num, load: _summary(load / num**1.2),
      lambda x: x.to_first_p99 <= 1.0,
      replicas=[4, 1, 2],
      placement=placement,
      tensor=2,
      first=0.5,
    )
  ]


def test_each_number_of_replicas_has_its_load():
  found = _carried(['affinity'])
  assert [each.num_replicas for each in found] == [1, 2, 4]
  assert [each.num_devices for each in found] == [2, 4, 8]
  for each in found:
    most = each.num_replicas**1.2
    assert most / sizes.STEP < each.load <= most * (1 + 1e-9)
  row = sizes.table(found, None).splitlines()[-1]
  assert row.startswith(f'| 4 | affinity | {found[-1].load:.3g}/s |')


def test_a_figure_has_axes_with_units_and_all_placements(tmp_path):
  pytest.importorskip('matplotlib')
  sizes.draw(str(tmp_path / 'sizes.svg'), _carried())
  text = (tmp_path / 'sizes.svg').read_text()
  for words in (
    'load (requests per second)',
    'requests per second and replica',
    'affinity',
    'least_busy',
  ):
    assert f'>{words}<' in text


def test_numbers_of_replicas_are_numbers():
  assert sizes.counts(['8', '1', '8']) == [1, 8]
  for given in (['0'], ['1', 'x'], ['-2']):
    with pytest.raises(ValueError, match='--replicas: got .* expected numbers'):
      sizes.counts(given)


@pytest.mark.slow
def test_fleets_of_all_sizes_meet_the_same_bursts():
  counts = []
  for rate in (20.0, 200.0):
    like = traffic.Traffic(rate=rate, burst_seconds=10.0)
    # Two cycles of twelve intervals.
    arrivals = [x.arrival for x in traffic.requests(like, int(250 * rate), 3)]
    found = np.bincount((np.array(arrivals) // 10).astype(int))[:24] / rate / 10
    counts.append(found)
  # Poisson noise of 200 to 2000 requests per interval: at most 4 of its sigma.
  assert np.abs(counts[0] - counts[1]).max() < 4 * (3.2 / 200) ** 0.5
  for each in counts:
    assert each.max() > 2.5
    assert each.min() < 0.1
    # A cycle has the mean that was asked for, and so has any other.
    assert each[:12].mean() == pytest.approx(1.0, abs=0.06)
    assert each[12:].mean() == pytest.approx(1.0, abs=0.06)


class _Values(types.SimpleNamespace):
  """Values of flags, as absl has them."""

  def __getitem__(self, name):
    return types.SimpleNamespace(value=getattr(self, name))


def test_simulations_of_other_settings_and_torn_lines_are_not_used(tmp_path):
  path = tmp_path / 'simulated.jsonl'
  sizes.Kept(path, {'a': 1}).get('k', lambda: _summary(1.0))
  path.write_text(path.read_text() + '\n{"settings": {"a"')
  assert sizes.Kept(path, {'a': 1}).get('k', lambda: _summary(2.0)) == (
    _summary(1.0)
  )
  for first in (2.0, 3.0):  # the first one is kept, behind the torn line
    found = sizes.Kept(path, {'a': 2}).get('k', lambda x=first: _summary(x))
    assert found == _summary(2.0)


@pytest.mark.slow
def test_two_replicas_carry_more_than_one(capsys, monkeypatch, tmp_path):
  monkeypatch.setattr(serving_fleet, '_LEAST_REQUESTS', 200)
  values = _Values(
    model=None, config='experiments/pretrain.py:8b', target='h100:2',
    max_sequences=8, efficiency=0.5, host_seconds=0.001, seconds=5.0,
    burstiness=1.0, prefix_share=0.7,
    replicas=['1', '2'], placements=['affinity'],
  )  # fmt: skip
  planned = serving_fleet._plan_of(values)
  buyer = serving_fleet._buyer(planned, values)
  like = traffic.Traffic(
    rate=1.0, prompt_tokens=40, answer_tokens=10, prefix_tokens=100
  )
  wanted = serving_fleet.Wanted(
    to_first_p99=1.0, per_token_p99=0.05, most_replicas=1
  )
  found = serving_fleet._carried(buyer, like, wanted, values, tmp_path)
  one, two = found
  assert one.load * sizes.STEP < two.load
  assert wanted.met_by(one.found)
  assert wanted.met_by(two.found)
  assert '2 replicas, affinity' in capsys.readouterr().out
  # A study that is started again simulates nothing twice.
  first = buyer.capacity(like)
  monkeypatch.setattr(buyer, 'capacity', lambda _: first)
  monkeypatch.setattr(buyer, 'run', None)
  again = serving_fleet._carried(buyer, like, wanted, values, tmp_path)
  assert again == found
