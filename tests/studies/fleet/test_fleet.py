"""The simulated fleet: the engine's own steps, known queues, traffic."""

import dataclasses

import numpy as np
import pytest

from hardware import peaks
from inference.planning import plan as plan_lib, subject
from inference.scheduling import limits as limits_lib
from studies.fleet import costs, fleet, measured, placing, replica, traffic
from tests.helpers import tiny_models
from tests.helpers.serving import reference_engine

_LIMITS = limits_lib.Limits(
  max_sequences=4,
  chunk_tokens=16,
  max_chunks=2,
  max_mixed_chunks=1,
  stall_context=1000,
  page_size=16,
  aging_steps=64,
)
_SETTINGS = replica.Settings(limits=_LIMITS, num_pages=65)
_TRAFFIC = traffic.Traffic(
  rate=2.0,
  prompt_tokens=20,
  answer_tokens=8,
  most_tokens=128,
  most_answer=24,
  num_prefixes=2,
  prefix_tokens=32,
)


@dataclasses.dataclass(frozen=True)
class _Constant:
  """A step takes a second for each of its decode steps."""

  host_seconds: float = 0.0

  def seconds(self, step):
    return max((each.length for each in step.decodes), default=1)

  def host(self, step):
    del step
    return self.host_seconds


def _request(arrival, num_prompt, num_new):
  return traffic.Request(
    arrival=arrival,
    prompt=tuple(range(num_prompt)),
    num_new=num_new,
    most_new=num_new,
  )


def _ended(requests, settings=_SETTINGS, **costs):
  (one,) = (replica.Replica(settings, _Constant(**costs)),)
  return fleet.simulate([one], requests)


@pytest.mark.slow
@pytest.mark.parametrize('most_steps', [4, 1])
def test_the_simulator_makes_the_steps_of_the_engine(most_steps, monkeypatch):
  engine = reference_engine.engine(
    'llama', max_sequences=4, decode_shapes=(2, 4), page_size=16, num_pages=40,
    chunk_tokens=16, max_chunks=2, max_mixed_chunks=1, stream_seconds=0,
  )  # fmt: skip
  # An engine may make fewer steps per dispatch than its config allows.
  assert engine.config.decode_steps > most_steps
  monkeypatch.setattr(engine._programs, 'decode_steps', most_steps)
  asked = [
    dataclasses.replace(each, arrival=0.0)
    for each in traffic.requests(_TRAFFIC, 30)
  ]
  run = measured.answered(engine, asked)
  shapes = engine.config.step_shapes()
  found = [each.landed for each in run.calls if each.landed]
  engine.manager.clear()
  made = []

  class Noted(_Constant):
    most_steps = costs.fitted(run.calls, shapes).most_steps

    def seconds(self, step):
      made.append(costs.kind_of(step, shapes))
      return super().seconds(step)

  answers = measured.predicted(engine, Noted(), asked)
  # All are there from the beginning: no clock decides what a step does.
  assert made == found
  assert max(each.decode_steps for each in made) == most_steps
  for said, real in zip(answers, run.answers, strict=True):
    assert said.num_made == real.num_made == real.request.num_new
    assert said.num_cached == real.num_cached
  table = measured.table(
    fleet.summary(run.answers, ()), fleet.summary(answers, ())
  )
  assert '| cached |' in table


def test_times_are_those_of_the_steps():
  # A chunk, then 4 decode steps: one while the chunk is in flight, then 3.
  (one,) = _ended([_request(1.0, 10, 5)])
  assert (one.first, one.last, one.num_made) == (2.0, 6.0, 5)
  assert (one.to_first, one.per_token) == (1.0, 1.0)
  # Two chunks of a step are computed together; a third one is not.
  (one,) = _ended([_request(0.0, 33, 1)])
  assert one.first == 2.0
  # The host works while the device computes, or in turn with it.
  (one,) = _ended([_request(0.0, 10, 3)], host_seconds=0.25)
  assert one.last == 3.25
  serial = dataclasses.replace(_SETTINGS, is_serial=True, decode_steps=1)
  (one,) = _ended([_request(0.0, 10, 3)], serial, host_seconds=0.25)
  assert one.last == 3.75


def test_requests_wait_for_a_slot_and_share_prefixes():
  requests = [_request(0.0, 40, 2) for _ in range(5)]
  answers = _ended(requests)
  # Whole pages of the prompt are computed once, when it is known.
  assert [each.num_cached for each in answers[:1]] == [0]
  assert answers[-1].num_cached == 32
  assert answers[-1].first > answers[0].last


def test_a_fleet_answers_faster_and_each_replica_its_share():
  requests = [_request(0.0, 12, 6) for _ in range(16)]
  times = []
  for num in (1, 4):
    fleets = [replica.Replica(_SETTINGS, _Constant(), n) for n in range(num)]
    answers = fleet.simulate(fleets, requests, fleet.least_busy)
    found = fleet.summary(answers, fleets)
    assert 0 < found.busy <= 1
    assert {each.num_served for each in fleets} == {16 // num}
    times.append(max(each.last for each in answers))
  assert times[1] < times[0] / 2


def test_affinity_finds_prefixes_that_turns_do_not():
  like = dataclasses.replace(
    _TRAFFIC, num_prefixes=8, prefix_tokens=64, rate=0.3, prefix_share=1.0
  )
  requests = traffic.requests(like, 120, seed=3)
  settings = dataclasses.replace(_SETTINGS, num_pages=25)
  shares = []
  for place in (fleet.in_turn, placing.Affinity(most_tokens=24 * 16)):
    fleets = [replica.Replica(settings, _Constant(), n) for n in range(4)]
    answers = fleet.simulate(fleets, requests, place)
    shares.append(fleet.summary(answers, fleets).cached)
  assert shares[1] > shares[0] + 0.1


def test_costs_are_fitted_again():
  shapes = ((2, 0), (4, 0), (0, 1), (4, 1))
  rng = np.random.default_rng(0)
  step = dataclasses.make_dataclass('Step', ['seated'])
  lines = {(2, 0): (3.0, 2.0), (4, 0): (4.0, 3.0), (0, 1): (9.0, 0.0)}
  calls = []
  for _ in range(200):
    shape = list(lines)[rng.integers(3)]
    kind = costs.Kind(*shape, 1 if shape[1] else int(rng.integers(1, 9)))
    seated = int(rng.integers(0, 3))
    first, later = lines[shape]
    seconds = 0.5 + 0.25 * seated + first + later * (kind.decode_steps - 1)
    sent, landed = step(range(seated)), kind
    if rng.random() < 0.2:  # the device was idle
      landed, seconds = None, 0.5 + 0.25 * seated
    calls.append(costs.Call(sent, landed, seconds))
  found = costs.fitted(calls, shapes)
  assert found.host_seconds == pytest.approx(0.5)
  assert found.seat_seconds == pytest.approx(0.25)
  for shape, line in lines.items():
    assert found.lines[shape] == pytest.approx(line, abs=1e-9)
  with pytest.raises(ValueError, match='no measured step'):
    costs.fitted([], shapes)


def test_a_roofline_reads_weights_once_and_keys_per_token():
  config = tiny_models.llama_like(max_length=128)
  planned = plan_lib.Plan(
    subject=subject.of_config('tiny', config, 'bfloat16'),
    target='v5e:1x1',
    device_kind='TPU v5 lite',
    peaks=peaks.DATASHEETS['TPU v5e'],
  )
  table = costs.Roofline(plan=planned, efficiency=0.5)
  seen = []

  class Noted(costs.Roofline):
    def seconds(self, step):
      seen.append((step, super().seconds(step)))
      return seen[-1][1]

  noted = Noted(plan=planned, efficiency=0.5)
  settings = dataclasses.replace(_SETTINGS, decode_steps=1)
  fleet.simulate([replica.Replica(settings, noted)], [_request(0.0, 10, 3)])
  decodes = [each for each in seen if each[0].decodes]
  for step, seconds in decodes:
    context = step.decodes[0].start + 1
    assert seconds == pytest.approx(planned.step_seconds(1, context) / 0.5)
  assert table.seconds(seen[0][0]) == seen[0][1]
  with pytest.raises(ValueError, match='--efficiency: got 1.5'):
    costs.Roofline(plan=planned, efficiency=1.5)


def test_traffic_is_as_it_says():
  like = traffic.Traffic(rate=5.0, burstiness=0.0)
  found = traffic.requests(like, 4000, seed=1)
  arrivals = np.array([each.arrival for each in found])
  assert (np.diff(arrivals) >= 0).all()
  assert len(found) / arrivals[-1] == pytest.approx(5.0, rel=0.05)
  assert np.median([each.num_new for each in found]) == pytest.approx(
    130, rel=0.1
  )
  shared = sum(each.prompt[0] >= 0 for each in found) / len(found)
  assert shared == pytest.approx(0.7, abs=0.03)
  bursts = traffic.requests(dataclasses.replace(like, burstiness=2.0), 4000, 1)
  counts = [
    np.bincount((np.array([x.arrival for x in each]) // 10).astype(int))
    for each in (found, bursts)
  ]
  spread = [each.var() / each.mean() for each in counts]
  assert spread[1] > 5 * spread[0]
  own = [each.prompt for each in found if each.prompt[0] < 0]
  assert len({each[0] for each in own}) == len(own)


@pytest.mark.parametrize(
  ('fields', 'message'),
  [
    ({'rate': 0.0}, '--rate: got 0.0, expected a number above 0'),
    ({'prefix_share': 1.5}, '--prefix_share: got 1.5'),
    ({'prefix_tokens': 4000}, '--prefix_tokens: got 4000 with answers of up'),
  ],
)
def test_impossible_traffic_is_refused(fields, message):
  with pytest.raises(ValueError, match=message):
    traffic.Traffic(**({'rate': 1.0} | fields))
