"""More work than memory holds, and cancellation at any moment."""

import dataclasses
import functools
import itertools

import numpy as np
import pytest

from inference.engine import engine as engine_lib
from inference.requests import requests
from inference.sampling import settings
from inference.scheduling import sequence_manager
from tests.helpers.serving import reference_engine, simulated_device


@pytest.fixture
def engine():
  return reference_engine.engine(**reference_engine.TIGHT)


@functools.cache
def _reference():
  return reference_engine.Reference()


@functools.cache
def _requests():
  """Needs three times the pages, for twice the sequences that may run."""
  rng = np.random.default_rng(2)
  return [
    requests.Request(
      prompt_ids=tuple(rng.integers(0, 256, rng.integers(20, 60)).tolist()),
      settings=settings.Settings(
        seed=number,
        temperature=number % 2,
        max_tokens=int(rng.integers(20, 50)),
        logprobs=1,
      ),
      principal=f'{number % 3}',
      priority=number % 2,
    )
    for number in range(16)
  ]


def _is_as_expected(request, completion):
  expected = _reference().answer(request)
  return (
    completion.token_ids == expected.token_ids
    and completion.logprobs == expected.logprobs
  )


def test_more_than_memory_holds_is_finished_by_preemption(engine):
  before = engine.metrics.value('preemptions_total')
  pages = sum(
    -(-(len(each.prompt_ids) + each.settings.max_tokens) // 16)
    for each in _requests()
  )
  assert pages > 3 * engine.config.num_pages
  numbers = {engine.submit(each): n for n, each in enumerate(_requests())}
  done, work = {}, None
  while engine.has_work:
    now = [
      engine.metrics.value(f'{name}_total')
      for name in ('engine_dispatches', 'prefill_tokens', 'sampled_tokens')
    ]
    assert now != work, 'a step without progress'
    work = now
    for update in engine.step():
      if update.completion:
        done[numbers[update.request_id]] = update.completion
    gauges = engine.manager.gauges()
    assert gauges.pages_used + gauges.pages_idle + gauges.pages_free == 20
  assert engine.metrics.value('preemptions_total') > before
  assert sum(each.usage.preemptions for each in done.values()) == (
    engine.metrics.value('preemptions_total') - before
  )
  for number, request in enumerate(_requests()):
    assert _is_as_expected(request, done[number])


def test_a_queue_that_is_full_refuses_and_goes_on(engine, monkeypatch):
  short = dataclasses.replace(engine.config, max_waiting=3)
  monkeypatch.setattr(engine, 'config', short)
  before = engine.metrics.value('refused_total', reason='overloaded')
  for request in _requests()[:3]:
    engine.submit(request)
  with pytest.raises(
    engine_lib.Overloaded,
    match='got 1 more completions to make while 3 wait, expected at most 3 to',
  ):
    engine.submit(_requests()[3])
  after = engine.metrics.value('refused_total', reason='overloaded')
  assert after == before + 1
  engine.step()  # some sequences have entered: the queue has room
  engine.submit(_requests()[3])
  several = dataclasses.replace(_requests()[4].settings, n=4)
  # More than the queue ever holds: trying again is useless.
  with pytest.raises(
    ValueError, match='got 4 completions to make, expected at'
  ):
    engine.submit(dataclasses.replace(_requests()[4], settings=several))
  assert sum(bool(each.completion) for each in engine.run()) == 4


def test_several_requests_are_submitted_all_or_none(engine, monkeypatch):
  short = dataclasses.replace(engine.config, max_waiting=4)
  monkeypatch.setattr(engine, 'config', short)
  before = engine.metrics.value('refused_total', reason='overloaded')
  one = _requests()[0]

  def asked(*numbers):
    return [
      dataclasses.replace(
        one, settings=dataclasses.replace(one.settings, n=number)
      )
      for number in numbers
    ]

  wrong = dataclasses.replace(one, prompt_ids=(259,))
  with pytest.raises(ValueError, match='got token id 259'):
    engine.submit_all([one, wrong])
  assert not engine.has_work
  with pytest.raises(ValueError, match='got 5 completions to make, expected'):
    engine.submit_all(asked(2, 3))
  assert not engine.has_work
  engine.submit(one)
  with pytest.raises(engine_lib.Overloaded, match='while 1 wait, expected'):
    engine.submit_all(asked(2, 2))
  assert engine.num_waiting == 1
  first, second = engine.submit_all(asked(1, 2))
  assert engine.num_waiting == 4
  after = engine.metrics.value('refused_total', reason='overloaded')
  assert after == before + 1
  done = [each.request_id for each in engine.run() if each.completion]
  assert sorted(done)[1:] == [first, second, second]


def test_one_client_never_has_the_whole_queue(engine, monkeypatch):
  short = dataclasses.replace(engine.config, max_waiting=1024)
  monkeypatch.setattr(engine, 'config', short)

  def asked(principal, n=1):
    changed = dataclasses.replace(_requests()[0].settings, n=n, max_tokens=2)
    return dataclasses.replace(
      _requests()[0], principal=principal, settings=changed
    )

  ids = engine.submit_all([asked('flood')] * 890)
  with pytest.raises(
    engine_lib.Overloaded,
    match='got 12 more completions to make while 890 wait, expected at most'
    ' 1024 to wait, and 896 of one client',
  ):
    engine.submit(asked('flood', 12))
  with pytest.raises(ValueError, match='got 897 completions to make, expected'):
    engine.submit_all([asked('late')] * 897)
  ids += engine.submit_all([asked('other')] * 12)  # all of them are taken
  assert engine.num_waiting == 902
  assert engine.manager.num_waiting_of('other') == 12
  engine.step()  # has one chunk
  engine.step()
  running = {each.principal for each in engine.manager.running()}
  assert running == {'flood', 'other'}
  ids += engine.submit_all([asked('third', 2)])
  for request_id in ids:
    engine.cancel(request_id)
  list(engine.run())


def test_a_guest_has_work_at_once_and_a_flood_keeps_every_bit(engine):
  flood = [
    dataclasses.replace(each, principal='flood', priority=0)
    for each in _requests()
  ]
  wanted = {engine.submit(each): each for each in flood}
  done, preempted = {}, engine.metrics.value('preemptions_total')
  for number in itertools.count():
    if not engine.has_work:
      break
    if number % 9 == 8 and len(wanted) < 24:
      guest = dataclasses.replace(
        _requests()[len(wanted) % 16], principal='guest', priority=0
      )
      has_none = 'guest' not in engine.manager._active
      request_id = engine.submit(guest)
      wanted[request_id] = guest
      done |= _ended(engine.step())
      if has_none:
        assert engine.manager._sequences[request_id, 0].num_computed
    done |= _ended(engine.step())
  assert len(wanted) == 24
  assert engine.metrics.value('preemptions_total') >= preempted + 3
  for request_id, request in wanted.items():
    assert _is_as_expected(request, done[request_id])


def _ended(updates):
  return {
    each.request_id: each.completion for each in updates if each.completion
  }


def test_answers_of_several_callers_wait_for_their_caller(engine, monkeypatch):
  short = dataclasses.replace(engine.config, max_waiting=2)
  monkeypatch.setattr(engine, 'config', short)
  requests_of = _requests()[:5], _requests()[5:7]
  first, second = (engine.answer(asked) for asked in requests_of)
  done = [{}, {}]
  for whose, updates in ((0, first), (1, second), (0, first)):
    for which, update in itertools.islice(updates, 30):
      if update.completion:
        done[whose][which] = update.completion
  for whose, updates in ((1, second), (0, first)):
    for which, update in updates:
      if update.completion:
        done[whose][which] = update.completion
  for asked, completions in zip(requests_of, done, strict=True):
    for which, request in enumerate(asked):
      assert _is_as_expected(request, completions[which])
  assert not engine._feeder.inboxes
  assert not [*engine.run()]  # reads the step in flight


def test_an_answer_that_is_closed_cancels_its_requests(engine):
  updates = engine.answer(_requests()[:3])
  next(updates)
  assert engine.has_work
  updates.close()
  list(engine.run())
  assert not engine._live
  assert not engine._feeder.inboxes
  with pytest.raises(ValueError, match='got token id 259'):
    # At the call, not at the first update.
    engine.answer([dataclasses.replace(_requests()[0], prompt_ids=(259,))])


def test_what_the_cache_could_not_hold_alone_is_refused(engine, monkeypatch):
  small = sequence_manager.SequenceManager(engine.manager.limits, num_pages=5)
  monkeypatch.setattr(engine, 'manager', small)
  one = _requests()[0]
  # Four pages of 16, and the last token, which is never computed.
  for prompt, wanted in ((40, 26), (65, None), (70, 1)):
    changed = dataclasses.replace(one.settings, max_tokens=wanted)
    request = requests.Request(prompt_ids=(1,) * prompt, settings=changed)
    with pytest.raises(
      ValueError, match='expected at most 65 together .the cache'
    ):
      engine.submit(request)
  assert not engine.has_work
  fits = dataclasses.replace(one.settings, max_tokens=None)
  request = requests.Request(prompt_ids=(1,) * 40, settings=fits)
  assert engine.checked(request).room == 25


# ------------------------------------------------------------------------------
# Cancellation.


def _long(length=100, **chosen):
  chosen = {'max_tokens': 20, 'seed': 1, 'logprobs': 1, **chosen}
  return requests.Request(
    prompt_ids=tuple(np.random.default_rng(9).integers(0, 256, length)),
    settings=settings.Settings(**chosen),
  )


def _in_state(engine, state):
  """Returns a request in a state; other requests may run."""
  if state == 'waiting':
    for request in _requests()[:12]:
      engine.submit(request)
  n = 12 if state == 'forks wait' else 1
  request_id = engine.submit(_long(n=n))

  def sequence():
    return engine.manager._sequences[request_id, 0]

  def waits(index):
    return not engine.manager._sequences[request_id, index].is_running

  reached = {
    'waiting': lambda: engine.manager.gauges().num_running and waits(0),
    'prefilling': lambda: 0 < sequence().num_computed < 100,
    'decoding': lambda: len(sequence().tokens) > 103,
    'forks wait': lambda: len(sequence().tokens) > 100 and waits(11),
    'preempted': lambda: sequence().num_preemptions,
  }[state]
  while not reached():
    engine.step()
    if state == 'preempted' and sequence().num_computed > 50:
      simulated_device.preempt(engine.manager, sequence())
  return request_id


@pytest.mark.parametrize(
  'state', ['waiting', 'prefilling', 'decoding', 'forks wait', 'preempted']
)
def test_what_is_cancelled_is_gone_at_the_next_step(engine, state):
  cancelled = engine.metrics.value('finished_total', reason='cancelled')
  request_id = _in_state(engine, state)
  # Unless it waits, it is in the step that was dispatched last.
  mine = [key for key in engine.manager._sequences if key[0] == request_id]
  assert engine._flight is not None
  engine.cancel(request_id)
  engine.cancel(request_id)  # the second call changes nothing
  after = engine.metrics.value('finished_total', reason='cancelled')
  assert after == cancelled + len(mine)
  updates = engine.step()
  engine.manager.check()
  assert all(key[0] != request_id for key in engine.manager._sequences)
  if state != 'waiting':
    gauges = engine.manager.gauges()
    assert (gauges.pages_used, gauges.num_running) == (0, 0)
    assert not engine.has_work
  completions = {
    each.request_id: each.completion
    for each in (*updates, *engine.run())
    if each.completion
  }
  assert request_id not in completions
  # The other requests are answered as if alone.
  assert len(completions) == (12 if state == 'waiting' else 0)
  for request, completion in zip(
    _requests(), [completions[key] for key in sorted(completions)], strict=False
  ):
    assert _is_as_expected(request, completion)


def test_pages_of_the_cancelled_are_whole_for_whoever_is_next(engine):
  # A dispatched step still writes to the pages; their next owner must not read
  # its keys and values.
  for _ in range(3):
    request_id = _in_state(engine, 'decoding')
    engine.cancel(request_id)
    served = reference_engine.serve(engine, _requests()[:4])
    for request, (completion,) in zip(
      _requests(), served.completions, strict=False
    ):
      assert _is_as_expected(request, completion)
