"""The roster: what a step contains, and what becomes of a sequence."""

import pytest

from inference.scheduling import page_tables, scheduler, sequence_manager
from tests.helpers import simulated_device


def _loop(*, num_pages=32, depth=1, **limits):
  return simulated_device.Loop(
    simulated_device.limits(**limits), num_pages=num_pages, depth=depth
  )


def _begin(roster):
  return roster.begin(roster.plan())


def _roster(*, num_pages=32, **limits):
  return sequence_manager.Roster(
    simulated_device.limits(**limits), num_pages=num_pages
  )


# ------------------------------------------------------------------------------
# Steps.


def test_a_prompt_is_cut_into_chunks_and_sampled_at_its_end():
  roster = _roster()
  roster.submit('a', range(10), 5)
  step = _begin(roster)
  assert step.seated == ('a',)
  assert [(row.start, row.length) for row in step.chunks] == [
    (0, 4),
    (4, 4),
    (8, 2),
  ]
  assert [row.tokens for row in step.chunks] == [
    (0, 1, 2, 3),
    (4, 5, 6, 7),
    (8, 9),
  ]
  assert [row.samples for row in step.chunks] == [False, False, True]
  assert [len(row.pages) for row in step.chunks] == [1, 2, 3]
  assert {row.slot for row in step.chunks} == {0}
  assert not step.decodes


def test_a_token_in_flight_is_left_to_the_device():
  roster = _roster()
  roster.submit('a', range(4), 5)
  _begin(roster)
  [row] = _begin(roster).decodes  # the token is not known yet
  assert (row.start, row.tokens, row.samples) == (4, None, True)
  [row] = _begin(roster).decodes  # nor are the two
  assert (row.start, row.tokens) == (5, None)
  for token in (7, 8, 9):
    roster.append('a', token)
  [row] = _begin(roster).decodes
  assert (row.start, row.tokens) == (6, (9,))


def test_no_more_rows_than_tokens_are_wanted():
  roster = _roster()
  roster.submit('a', range(4), 2)
  _begin(roster)
  _begin(roster)
  assert roster.plan().is_empty  # both are in flight
  roster.append('a', 7)
  roster.append('a', 7)
  assert roster.plan().is_empty  # it waits for its end
  roster.check()
  with pytest.raises(ValueError, match='got a token, expected none'):
    roster.append('a', 7)
  roster.end('a')
  roster.check()


def test_slots_are_given_anew():
  roster = _roster(max_sequences=2)
  for id in 'abc':
    roster.submit(id, range(4), 5)
  assert _begin(roster).seated == ('a', 'b')
  roster.end('a')
  step = _begin(roster)
  assert step.seated == ('c',)
  assert {row.id: row.slot for row in (*step.decodes, *step.chunks)} == {
    'b': 1,
    'c': 0,
  }


def test_a_plan_is_good_for_one_step_of_an_unchanged_roster():
  roster = _roster()
  roster.submit('a', range(4), 5)
  plan = roster.plan()
  assert roster.plan() == plan
  with pytest.raises(ValueError, match='made before the roster changed'):
    roster.begin(plan)
  roster.begin(roster.plan())
  roster.submit('b', range(4), 5)  # asks for nothing that is planned
  plan = roster.plan()
  roster.submit('c', range(4), 5)
  roster.append('a', 7)
  roster.begin(plan)
  for change in (
    lambda: roster.preempt('a'),
    lambda: roster.end('a'),
    lambda: roster.forget(None),
    lambda: roster.submit('d', range(4), 5, parent='b'),
  ):
    plan = roster.plan()
    change()
    with pytest.raises(ValueError, match=r'expected the latest; call plan\(\)'):
      roster.begin(plan)


def test_the_planner_sees_the_next_in_turn_and_knows_of_the_others(
  monkeypatch,
):
  calls = []
  plan = scheduler.plan
  monkeypatch.setattr(
    scheduler,
    'plan',
    lambda tasks, **kwargs: (
      calls.append((tasks, kwargs)) or plan(tasks, **kwargs)
    ),
  )
  roster = _roster(max_sequences=2, aging_steps=1)
  roster.submit('a', range(4), 9, priority=2)
  for _ in range(3):
    _begin(roster)
  # By now as good as the best, and of a principal that had nothing yet.
  roster.submit('aged', range(4), 9, priority=2, principal='other')
  roster.submit('busy', range(4), 9, priority=1)
  roster.served = {None: 100}
  roster.num_steps += 5
  roster.plan()
  tasks, kwargs = calls[-1]
  assert [task.id for task in tasks] == ['a', 'aged']
  assert kwargs['best_priority'] == 1


# ------------------------------------------------------------------------------
# Refusals.


@pytest.mark.parametrize(
  ('num_prompt', 'max_new_tokens', 'match'),
  [
    (100, 26, 'got 100 prompt tokens and up to 26 new ones, 32 pages'),
    (125, 1, 'expected at most 124 tokens, 31 pages'),
    (0, 1, 'got a prompt of 0 tokens'),
    (1, 0, 'and 0 new ones, expected at least one of each'),
  ],
)
def test_what_could_never_run_is_refused(num_prompt, max_new_tokens, match):
  roster = _roster()
  with pytest.raises(sequence_manager.Refused, match=match):
    roster.submit('a', range(num_prompt), max_new_tokens)
  roster.submit('a', range(100), 24)
  roster.check()


def test_an_id_is_taken_until_its_end():
  roster = _roster()
  roster.submit('a', range(4), 5)
  with pytest.raises(sequence_manager.Refused, match='got an id that is taken'):
    roster.submit('a', range(4), 5)
  roster.end('a')
  for call in (roster.end, roster.preempt, roster.num_pages_held):
    with pytest.raises(KeyError, match='got an id that is not here'):
      call('a')
  roster.submit('a', range(4), 5)


@pytest.mark.parametrize('fields', [{'prompt': [1]}, {'scope': 'other'}])
def test_a_child_is_of_its_parents_prompt_and_scope(fields):
  roster = _roster()
  roster.submit('a', range(4), 5)
  with pytest.raises(sequence_manager.Refused, match='expected the same'):
    roster.submit(
      'b', **{'prompt': range(4), 'max_new_tokens': 5, 'parent': 'a', **fields}
    )
  roster.check()


# ------------------------------------------------------------------------------
# Prefixes.


def test_a_prefix_is_computed_once():
  loop = _loop()
  loop.submit('a', range(10), 3)
  loop.run()
  loop.submit('b', [*range(10), 50], 3)
  step = loop.step()
  # The ten tokens fill two pages; what came after them was something else.
  assert [(row.start, row.length) for row in step.chunks] == [(8, 3)]
  assert loop.roster.num_cached_tokens('b') == 8
  gauges = loop.roster.gauges()
  assert gauges.prefix_tokens_looked_up == 21
  assert gauges.prefix_tokens_found == 8
  assert gauges.hit_rate == 8 / 21
  loop.run()


def test_a_prompt_is_found_while_its_sequence_runs():
  loop = _loop()
  loop.submit('a', range(9), 30)
  loop.step()
  loop.submit('b', range(9), 3)
  loop.step()
  assert loop.roster.num_cached_tokens('b') == 8
  loop.roster.check()
  loop.run()


def test_completions_are_found_too():
  loop = _loop()
  loop.submit('a', range(4), 9)
  loop.run()
  tokens = loop.ended['a'].tokens
  loop.submit('b', tokens, 3)
  loop.step()
  assert loop.roster.num_cached_tokens('b') == 12
  loop.run()


def test_who_wants_all_positions_finds_none():
  loop = _loop()
  loop.submit('a', range(10), 3)
  loop.run()
  loop.submit('b', range(10), 3, reads_prefix_cache=False)
  step = loop.step()
  assert sum(row.length for row in step.chunks) == 10
  assert loop.roster.num_cached_tokens('b') == 0
  assert loop.roster.gauges().prefix_tokens_looked_up == 10
  loop.run()


def test_a_hit_is_not_evicted_in_the_step_that_takes_it():
  # Seven pages: two idle, then one runs that wants all that are free, while
  # another is admitted that wants the idle ones.
  loop = _loop(num_pages=8)
  loop.submit('old', range(8), 1)
  loop.run()
  loop.submit('a', range(100, 112), 8)
  loop.step()
  loop.submit('b', range(9), 3)
  loop.run()
  assert loop.ended.keys() == {'old', 'a', 'b'}


def test_forgetting_a_scope_frees_its_pages():
  loop = _loop()
  for scope in 'xy':
    loop.submit(scope, range(8), 1, scope=scope)
  loop.run()
  loop.roster.check()
  assert loop.roster.gauges().pages_idle == 4
  loop.roster.forget('x')
  assert loop.roster.gauges().pages_idle == 2
  loop.roster.clear()
  assert loop.roster.gauges().pages_free == 31


# ------------------------------------------------------------------------------
# Samples of one prompt.


def test_children_wait_for_the_prompt_and_share_it():
  loop = _loop()
  loop.submit('a', range(30), 3)
  for id in 'bc':
    loop.submit(id, range(30), 3, parent='a')
  assert {row.id for row in loop.step().chunks} == {'a'}
  assert {row.id for row in loop.step().chunks} == {'a'}
  assert loop.roster.gauges().pages_used == 8
  assert loop.roster.gauges().tokens_held == 30
  step = loop.step()
  assert step.seated == ('b', 'c')
  # Three write to the page of the 30th token: two of them to a copy.
  assert len(step.decodes) == 3
  assert len(step.copies) == 2
  assert loop.roster.num_cached_tokens('b') == 29
  assert loop.roster.gauges().pages_used == 8 + 2
  loop.roster.check()
  loop.run()
  assert loop.ended['b'].tokens != loop.ended['c'].tokens


def test_copying_is_what_keeps_samples_apart(monkeypatch):
  monkeypatch.setattr(page_tables.PageTables, 'copied', lambda *_: None)
  loop = _loop()
  loop.submit('a', range(30), 9)
  for id in 'bc':
    loop.submit(id, range(30), 9, parent='a')
  with pytest.raises(AssertionError, match='another'):
    loop.run()


def test_a_late_child_shares_at_once():
  loop = _loop()
  loop.submit('a', range(6), 30)
  loop.step()
  loop.step()
  loop.submit('b', range(6), 3, parent='a')
  step = loop.step()
  assert [(row.id, row.start) for row in step.decodes] == [('b', 5), ('a', 7)]
  assert len(step.copies) == 1
  loop.run()


@pytest.mark.parametrize('leave', ['preempt', 'end'])
def test_children_of_one_who_leaves_before_go_their_own_way(leave):
  loop = _loop()
  loop.submit('a', range(100, 130), 3)
  for id in 'bc':
    loop.submit(id, range(100, 130), 3, parent='a')
  loop.step()
  getattr(loop.roster, leave)('a')
  if leave != 'preempt':
    del loop.truths['a']
  loop.roster.check()
  loop.run()
  assert loop.ended.keys() >= {'b', 'c'}
  # They began with whole pages that the cache had, or had not.
  for id in 'bc':
    first = next(
      row
      for step in loop.steps
      for row in (*step.decodes, *step.chunks)
      if row.id == id
    )
    assert first.start % loop.limits.page_size == 0


def test_a_child_that_ends_before_its_parent_gets_nothing():
  loop = _loop()
  loop.submit('a', range(30), 3)
  loop.submit('b', range(30), 3, parent='a')
  loop.step()
  loop.roster.end('b')
  del loop.truths['b']
  loop.run()
  loop.roster.check()
  loop.roster.clear()
  assert loop.roster.gauges().pages_free == 31


def test_a_child_of_one_who_is_gone_is_like_any_other():
  loop = _loop()
  loop.submit('b', range(6), 3, parent='gone')
  assert loop.step().seated == ('b',)
  loop.run()


# ------------------------------------------------------------------------------
# Preemption.


@pytest.mark.parametrize('depth', [0, 1, 2])
def test_a_preempted_sequence_resumes_with_what_it_has(depth):
  loop = _loop(depth=depth)
  loop.submit('a', range(10), 9)
  for _ in range(3):
    loop.step()
  loop.roster.preempt('a')
  loop.roster.check()
  assert not loop.roster.is_running('a')
  assert loop.roster.num_pages_held('a') == 0
  assert loop.roster.num_preemptions('a') == 1
  # Not before all its tokens are known.
  while loop.in_flight:
    assert loop.roster.plan().is_empty
    loop.take_results()
  tokens = list(loop.truths['a'].tokens)
  step = loop.step()
  assert step.seated == ('a',)
  rows = (*step.decodes, *step.chunks)
  assert rows[-1].start + rows[-1].length == len(tokens) == 13
  assert loop.roster.num_cached_tokens('a') == 0  # it is about the first time
  loop.run()


def test_a_preempted_sequence_looks_for_all_that_it_knows():
  loop = _loop()
  loop.submit('a', range(8), 1)
  loop.run()
  loop.submit('b', range(8), 9)
  loop.step()
  assert loop.roster.num_cached_tokens('b') == 4  # one token has to be computed
  loop.take_results()
  loop.roster.preempt('b')
  assert [row.start for row in loop.step().decodes] == [8]


def test_being_preempted_does_not_change_what_is_sampled():
  alone = _loop()
  alone.submit('a', range(10), 20)
  alone.run()
  loop = _loop()
  loop.submit('a', range(10), 20)
  while loop.truths:
    if len(loop.steps) % 3 == 2 and loop.roster.is_running('a'):
      loop.roster.preempt('a')
    loop.step()
  assert sum('a' in step.seated for step in loop.steps) > 3
  assert loop.ended['a'].tokens == alone.ended['a'].tokens


def test_who_holds_no_pages_cannot_be_preempted():
  roster = _roster()
  roster.submit('a', range(4), 5)
  with pytest.raises(ValueError, match='got one that waits without pages'):
    roster.preempt('a')


def test_pages_run_out_and_everybody_ends():
  loop = _loop(num_pages=10)
  for id in 'abc':
    loop.submit(id, [ord(id)] * 5, 20)
  loop.run()
  assert sum(len(step.preempted) for step in loop.steps) > 0
  assert loop.end_steps['a'] < loop.end_steps['b'] < loop.end_steps['c']
  loop.roster.check()


# ------------------------------------------------------------------------------
# Counters.


def test_gauges_tell_running_waiting_pages_and_tokens():
  loop = _loop(max_sequences=2)
  for id in 'abc':
    loop.submit(id, [ord(id)] * 5, 20)
  loop.step()
  assert loop.roster.gauges() == sequence_manager.Gauges(
    num_running=2,
    num_waiting=1,
    pages_used=4,
    pages_idle=0,
    pages_free=27,
    tokens_held=10,
    prefix_tokens_looked_up=10,
    prefix_tokens_found=0,
  )
  assert loop.roster.num_pages_held('a') == 2
  assert loop.roster.num_pages_held('c') == 0


def test_a_principal_is_charged_for_what_is_computed_the_first_time():
  loop = _loop()
  loop.submit('a', range(10), 20, principal='ann')
  loop.submit('b', range(50, 55), 20, principal='bob')
  loop.step()
  assert loop.roster.served == {'ann': 10, 'bob': 4}
  loop.step()
  assert loop.roster.served == {'ann': 11, 'bob': 5}
  loop.roster.preempt('a')
  while not loop.roster.is_running('a'):
    loop.step()
  # Eleven were computed again, and the token that was in flight.
  assert loop.roster.served['ann'] == 11 + 1
  loop.submit('c', range(10), 20, principal='ann')
  before = loop.roster.served['ann']
  loop.step()
  assert loop.roster.num_cached_tokens('c') == 8
  assert loop.roster.served['ann'] == before + 1 + 2  # a, and what c lacked


def test_who_was_idle_does_not_come_with_old_claims():
  loop = _loop()
  loop.submit('a', range(10), 20, principal='ann')
  loop.step()
  loop.submit('b', range(50, 55), 20, principal='bob')
  assert loop.roster.served == {'ann': 10, 'bob': 10}
  loop.step()
  loop.submit('c', range(5), 20, principal='bob')
  assert loop.roster.served == {'ann': 11, 'bob': 15}
