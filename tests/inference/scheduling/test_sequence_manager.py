"""The SequenceManager: its steps, and the life of a sequence."""

import pytest

from inference.scheduling import page_tables, scheduler, sequence_manager
from tests.helpers.serving import simulated_device


def _loop(*, num_pages=32, depth=1, **limits):
  return simulated_device.Loop(
    simulated_device.limits(**limits), num_pages=num_pages, depth=depth
  )


def _ids(sequences):
  return [sequence.id for sequence in sequences]


def _begin(manager):
  return manager.begin(manager.plan())


def _manager(*, num_pages=32, **limits):
  return sequence_manager.SequenceManager(
    simulated_device.limits(**limits), num_pages=num_pages
  )


# ------------------------------------------------------------------------------
# Steps.


def test_a_prompt_is_cut_into_chunks_and_sampled_at_its_end():
  manager = _manager()
  manager.submit('a', range(10), 5)
  step = _begin(manager)
  assert _ids(step.seated) == ['a']
  assert [(span.start, span.length) for span in step.chunks] == [
    (0, 4),
    (4, 4),
    (8, 2),
  ]
  assert [span.tokens for span in step.chunks] == [
    (0, 1, 2, 3),
    (4, 5, 6, 7),
    (8, 9),
  ]
  assert [span.samples for span in step.chunks] == [False, False, True]
  assert [len(span.pages) for span in step.chunks] == [1, 2, 3]
  assert {span.slot for span in step.chunks} == {0}
  assert not step.decodes


def test_a_token_in_flight_is_left_to_the_device():
  manager = _manager()
  a = manager.submit('a', range(4), 5)
  _begin(manager)
  [span] = _begin(manager).decodes  # the token is not known yet
  assert (span.start, span.tokens, span.samples) == (4, None, True)
  [span] = _begin(manager).decodes  # two tokens are not known now
  assert (span.start, span.tokens) == (5, None)
  for token in (7, 8, 9):
    manager.append(a, token)
  [span] = _begin(manager).decodes
  assert (span.start, span.tokens) == (6, (9,))


def test_no_more_spans_than_tokens_are_wanted():
  manager = _manager()
  a = manager.submit('a', range(4), 2)
  _begin(manager)
  _begin(manager)
  assert manager.plan().is_empty  # both are in flight
  manager.append(a, 7)
  manager.append(a, 7)
  assert manager.plan().is_empty  # it waits for its end
  manager.check()
  with pytest.raises(ValueError, match='got a token, expected none'):
    manager.append(a, 7)
  manager.end(a)
  manager.check()


def test_slots_are_given_anew():
  manager = _manager(max_sequences=2)
  a, *_ = [manager.submit(id, range(4), 5) for id in 'abc']
  assert _ids(_begin(manager).seated) == ['a', 'b']
  manager.end(a)
  step = _begin(manager)
  assert _ids(step.seated) == ['c']
  assert {span.sequence.id: span.slot for span in step.spans} == {
    'b': 1,
    'c': 0,
  }


def test_a_plan_is_good_for_one_step_of_unchanged_sequences():
  manager = _manager()
  a = manager.submit('a', range(4), 5)
  plan = manager.plan()
  assert manager.plan() == plan
  with pytest.raises(ValueError, match='made before a sequence or its pages'):
    manager.begin(plan)
  manager.begin(manager.plan())
  b = manager.submit('b', range(4), 5)  # changes nothing that is planned
  plan = manager.plan()
  manager.submit('c', range(4), 5)
  manager.append(a, 7)
  manager.begin(plan)
  for change in (
    lambda: manager.end(a),
    lambda: manager.clear(),
    lambda: manager.submit('d', range(4), 5, parent=b),
  ):
    plan = manager.plan()
    change()
    with pytest.raises(ValueError, match=r'expected the latest; call plan\(\)'):
      manager.begin(plan)


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
  manager = _manager(max_sequences=2, aging_steps=1)
  manager.submit('a', range(4), 9, priority=2)
  for _ in range(3):
    _begin(manager)
  # It has aged up to the best level, and its principal was not served yet.
  manager.submit('aged', range(4), 9, priority=2, principal='other')
  manager.submit('busy', range(4), 9, priority=1)
  manager.served = {None: 100}
  manager.num_steps += 5
  manager.plan()
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
  manager = _manager()
  with pytest.raises(sequence_manager.Refused, match=match):
    manager.submit('a', range(num_prompt), max_new_tokens)
  manager.submit('a', range(100), 24)
  manager.check()


def test_an_id_is_taken_until_its_end():
  manager = _manager()
  a = manager.submit('a', range(4), 5)
  with pytest.raises(sequence_manager.Refused, match='got an id that is taken'):
    manager.submit('a', range(4), 5)
  manager.end(a)
  manager.submit('a', range(4), 5)


@pytest.mark.parametrize('fields', [{'prompt': [1]}, {'scope': 'other'}])
def test_a_child_is_of_its_parents_prompt_and_scope(fields):
  manager = _manager()
  a = manager.submit('a', range(4), 5)
  with pytest.raises(sequence_manager.Refused, match='expected the same'):
    manager.submit(
      'b', **{'prompt': range(4), 'max_new_tokens': 5, 'parent': a, **fields}
    )
  manager.check()


# ------------------------------------------------------------------------------
# Prefixes.


def test_a_prefix_is_computed_once():
  loop = _loop()
  loop.submit('a', range(10), 3)
  loop.run()
  loop.submit('b', [*range(10), 50], 3)
  step = loop.step()
  # The ten tokens fill two pages; the tokens after them differ.
  assert [(span.start, span.length) for span in step.chunks] == [(8, 3)]
  assert loop.sequences['b'].num_cached == 8
  gauges = loop.manager.gauges()
  assert gauges.prefix_tokens_looked_up == 21
  assert gauges.prefix_tokens_found == 8
  loop.run()


def test_a_prompt_is_found_while_its_sequence_runs():
  loop = _loop()
  loop.submit('a', range(9), 30)
  loop.step()
  loop.submit('b', range(9), 3)
  loop.step()
  assert loop.sequences['b'].num_cached == 8
  loop.manager.check()
  loop.run()


def test_completions_are_found_too():
  loop = _loop()
  loop.submit('a', range(4), 9)
  loop.run()
  tokens = loop.ended['a'].tokens
  loop.submit('b', tokens, 3)
  loop.step()
  assert loop.sequences['b'].num_cached == 12
  loop.run()


def test_who_wants_all_positions_finds_none():
  loop = _loop()
  loop.submit('a', range(10), 3)
  loop.run()
  loop.submit('b', range(10), 3, reads_prefix_cache=False)
  step = loop.step()
  assert sum(span.length for span in step.chunks) == 10
  assert loop.sequences['b'].num_cached == 0
  assert loop.manager.gauges().prefix_tokens_looked_up == 10
  loop.run()


def test_a_hit_is_not_evicted_in_the_step_that_takes_it():
  # Seven pages, of which two are idle. One sequence needs all free pages, while
  # another is admitted with the idle ones.
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
  loop.manager.check()
  assert loop.manager.gauges().pages_idle == 4
  simulated_device.forget(loop.manager, 'x')
  assert loop.manager.gauges().pages_idle == 2
  loop.manager.clear()
  assert loop.manager.gauges().pages_free == 31


# ------------------------------------------------------------------------------
# Samples of one prompt.


def test_children_wait_for_the_prompt_and_share_it():
  loop = _loop()
  loop.submit('a', range(30), 3)
  for id in 'bc':
    loop.submit(id, range(30), 3, parent='a')
  assert {span.sequence.id for span in loop.step().chunks} == {'a'}
  assert {span.sequence.id for span in loop.step().chunks} == {'a'}
  assert loop.manager.gauges().pages_used == 8
  assert loop.manager.gauges().tokens_held == 30
  step = loop.step()
  assert _ids(step.seated) == ['b', 'c']
  # Three sequences write to the page of the 30th token: two to a copy.
  assert len(step.decodes) == 3
  assert len(step.copies) == 2
  assert loop.sequences['b'].num_cached == 29
  assert loop.manager.gauges().pages_used == 8 + 2
  loop.manager.check()
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
  assert [(span.sequence.id, span.start) for span in step.decodes] == [
    ('b', 5),
    ('a', 7),
  ]
  assert len(step.copies) == 1
  loop.run()


@pytest.mark.parametrize('leave', ['preempt', 'cancel'])
def test_children_of_one_who_leaves_before_go_their_own_way(leave):
  loop = _loop()
  loop.submit('a', range(100, 130), 3)
  for id in 'bc':
    loop.submit(id, range(100, 130), 3, parent='a')
  loop.step()
  getattr(loop, leave)('a')
  loop.manager.check()
  loop.run()
  assert loop.ended.keys() >= {'b', 'c'}
  # They start after whole pages of the cache, or at 0.
  for id in 'bc':
    first = next(
      span
      for step in loop.steps
      for span in step.spans
      if span.sequence.id == id
    )
    assert first.start % loop.limits.page_size == 0


def test_a_child_that_ends_before_its_parent_gets_nothing():
  loop = _loop()
  loop.submit('a', range(30), 3)
  loop.submit('b', range(30), 3, parent='a')
  loop.step()
  loop.cancel('b')
  loop.run()
  loop.manager.check()
  loop.manager.clear()
  assert loop.manager.gauges().pages_free == 31


def test_a_child_of_one_who_is_gone_is_like_any_other():
  loop = _loop()
  loop.submit('gone', range(6), 3)
  loop.cancel('gone')
  loop.submit('b', range(6), 3, parent='gone')
  assert _ids(loop.step().seated) == ['b']
  loop.run()


# ------------------------------------------------------------------------------
# Preemption.


@pytest.mark.parametrize('depth', [0, 1, 2])
def test_a_preempted_sequence_resumes_with_what_it_has(depth):
  loop = _loop(depth=depth)
  loop.submit('a', range(10), 9)
  for _ in range(3):
    loop.step()
  loop.preempt('a')
  loop.manager.check()
  assert not loop.sequences['a'].is_running
  assert not loop.sequences['a'].pages
  assert loop.sequences['a'].num_preemptions == 1
  # Not before all its tokens are known.
  while loop.in_flight:
    assert loop.manager.plan().is_empty
    loop.take_results()
  tokens = list(loop.truths['a'].tokens)
  step = loop.step()
  assert _ids(step.seated) == ['a']
  spans = step.spans
  assert spans[-1].start + spans[-1].length == len(tokens) == 13
  assert loop.sequences['a'].num_cached == 0  # counted at the first admission
  loop.run()


def test_a_preempted_sequence_looks_for_all_that_it_knows():
  loop = _loop()
  loop.submit('a', range(8), 1)
  loop.run()
  loop.submit('b', range(8), 9)
  loop.step()
  assert loop.sequences['b'].num_cached == 4  # one token has to be computed
  loop.take_results()
  loop.preempt('b')
  assert [span.start for span in loop.step().decodes] == [8]


def test_being_preempted_does_not_change_what_is_sampled():
  alone = _loop()
  alone.submit('a', range(10), 20)
  alone.run()
  loop = _loop()
  loop.submit('a', range(10), 20)
  while loop.truths:
    if len(loop.steps) % 3 == 2 and loop.sequences['a'].is_running:
      loop.preempt('a')
    loop.step()
  assert sum('a' in _ids(step.seated) for step in loop.steps) > 3
  assert loop.ended['a'].tokens == alone.ended['a'].tokens


def test_pages_run_out_and_everybody_ends():
  loop = _loop(num_pages=10)
  for id in 'abc':
    loop.submit(id, [ord(id)] * 5, 20)
  loop.run()
  assert sum(len(step.preempted) for step in loop.steps) > 0
  assert loop.end_steps['a'] < loop.end_steps['b'] < loop.end_steps['c']
  loop.manager.check()


# ------------------------------------------------------------------------------
# Counters.


def test_gauges_tell_running_waiting_pages_and_tokens():
  loop = _loop(max_sequences=2)
  for id in 'abc':
    loop.submit(id, [ord(id)] * 5, 20)
  loop.step()
  assert loop.manager.gauges() == sequence_manager.gauges_lib.Gauges(
    num_running=2,
    num_waiting=1,
    pages_used=4,
    pages_idle=0,
    pages_free=27,
    tokens_held=10,
    prefix_tokens_looked_up=10,
    prefix_tokens_found=0,
  )
  assert len(loop.sequences['a'].pages) == 2
  assert not loop.sequences['c'].pages


def test_a_principal_is_charged_for_what_is_computed_the_first_time():
  loop = _loop()
  loop.submit('a', range(10), 20, principal='ann')
  loop.submit('b', range(50, 55), 20, principal='bob')
  loop.step()
  assert loop.manager.served == {'ann': 10, 'bob': 4}
  loop.step()
  assert loop.manager.served == {'ann': 11, 'bob': 5}
  loop.preempt('a')
  while not loop.sequences['a'].is_running:
    loop.step()
  # Eleven tokens were computed again, the token in flight for the first time.
  assert loop.manager.served['ann'] == 11 + 1
  loop.submit('c', range(10), 20, principal='ann')
  before = loop.manager.served['ann']
  loop.step()
  assert loop.sequences['c'].num_cached == 8
  assert loop.manager.served['ann'] == before + 1 + 2  # a, and what c lacked


def test_who_was_idle_does_not_come_with_old_claims():
  loop = _loop()
  loop.submit('a', range(10), 20, principal='ann')
  loop.step()
  loop.submit('b', range(50, 55), 20, principal='bob')
  assert loop.manager.served == {'ann': 10, 'bob': 10}
  loop.step()
  loop.submit('c', range(5), 20, principal='bob')
  assert loop.manager.served == {'ann': 11, 'bob': 15}


def test_a_principal_pays_for_no_token_after_the_end():
  loop = _loop(num_pages=20)
  loop.submit('a', [1] * 4, 12, principal='p')
  loop.step()
  plan = loop.manager.plan()
  num = loop.manager.decode_steps(plan, 8)
  assert num == 8
  step = loop.manager.begin(plan, decode_steps=num)
  assert [span.length for span in step.decodes] == [8]
  assert loop.manager.served['p'] == 4 + 8
  sequence = loop.sequences['a']
  for token in (0, 1, 2):  # the last one ends it
    loop.manager.append(sequence, token)
  loop.manager.end(sequence)
  assert loop.manager.served['p'] == 4 + 3
  assert loop.manager.gauges().pages_used == 0
  # Of the seven tokens, the last is not computed: one page of four is full.
  assert loop.manager.gauges().pages_idle == 1
