"""The scheduler, rule by rule: counts in, a plan out."""

import random

import pytest

from inference.scheduling import limits as limits_lib, scheduler
from tests.helpers.serving import simulated_device

# Pages of 4 tokens, chunks of 4 tokens; 4 chunks, or 2 beside decodes.
LIMITS = simulated_device.limits()


class Pool:
  """Makes tasks whose pages differ."""

  def __init__(self):
    self.num_tasks = self.num_pages = 0

  def pages(self, count: int) -> tuple[int, ...]:
    first = self.num_pages + 1
    self.num_pages += count
    return tuple(range(first, first + count))

  def task(self, id, **fields) -> scheduler.Task:
    self.num_tasks += 1
    defaults = {'principal': 'ann', 'arrival': self.num_tasks}
    return scheduler.Task(id=id, **{**defaults, **fields})

  def running(self, id, num_computed, num_remaining=1, **fields):
    defaults = {
      'pages': self.pages(LIMITS.num_pages(num_computed)),
      'seniority': self.num_tasks,
      'num_known': num_computed + num_remaining,
      'num_computed': num_computed,
      'is_running': True,
    }
    return self.task(id, **{**defaults, **fields})

  def waiting(self, id, num_known, **fields):
    return self.task(id, num_known=num_known, **fields)


@pytest.fixture
def pool():
  return Pool()


def _plan(*tasks, room=100, served=None, limits=LIMITS, **kwargs):
  return scheduler.plan(
    tasks,
    num_free=room,
    num_idle=0,
    served=served or {},
    limits=limits,
    **kwargs,
  )


def _prefills(plan):
  return [(each.id, each.start, each.length) for each in plan.prefills]


# ------------------------------------------------------------------------------
# Decodes and chunks.


def test_nothing_to_do_is_an_empty_plan():
  assert _plan() == scheduler.StepPlan()
  assert _plan().is_empty


def test_running_ones_decode_in_order_of_their_context(pool):
  tasks = [pool.running('long', 30), pool.running('short', 2)]
  plan = _plan(*tasks, pool.running('middle', 9))
  assert plan.decodes == ('short', 'middle', 'long')
  assert not plan.prefills
  assert not plan.is_empty


def test_a_prompt_takes_all_chunks_where_nobody_decodes(pool):
  assert _prefills(_plan(pool.waiting('a', 100))) == [('a', 0, 16)]
  assert _prefills(_plan(pool.running('a', 16, 84))) == [('a', 16, 16)]


def test_a_prompt_takes_no_more_than_the_bound_beside_decode_rows(pool):
  plan = _plan(pool.running('a', 8), pool.waiting('b', 100))
  assert plan.decodes == ('a',)
  assert _prefills(plan) == [('b', 0, 8)]


_DEARER = {'max_chunks': 8, 'max_mixed_chunks': 6, 'stall_context': 100}


def test_fewer_chunks_fit_beside_decode_rows_the_more_they_attend_to(pool):
  limits = simulated_device.limits(**_DEARER)
  for context, num_chunks in ((0, 6), (20, 5), (100, 3), (200, 2), (5000, 1)):
    prompt, decode = pool.running('p', context, 100), pool.running('d', 3)
    plan = _plan(decode, prompt, limits=limits)
    assert _prefills(plan) == [('p', context, 4 * num_chunks)]
    # A step without decodes delays no sequence.
    assert _prefills(_plan(prompt, limits=limits)) == [('p', context, 32)]


def test_what_one_prompt_costs_is_not_left_for_another(pool):
  limits = simulated_device.limits(**{**_DEARER, 'max_mixed_chunks': 4})
  decode, short = pool.running('d', 3), pool.running('s', 0, 100)
  long = pool.running('l', 200, 4, seniority=-1)  # one chunk, counts three
  plan = _plan(decode, long, short, limits=limits)
  assert _prefills(plan) == [('l', 200, 4), ('s', 0, 4)]


def test_chunks_hold_tokens_of_one_sequence_each(pool):
  # Five tokens take two chunks, so that one of the four is left for b.
  plan = _plan(
    pool.running('a', 0, 5), pool.running('c', 0, 4), pool.waiting('b', 9)
  )
  assert _prefills(plan) == [('a', 0, 5), ('c', 0, 4), ('b', 0, 4)]


def test_prompts_that_run_come_before_those_that_wait(pool):
  waiting = pool.waiting('first', 100, priority=0)
  plan = _plan(waiting, pool.running('second', 16, 50, priority=3))
  assert _prefills(plan) == [('second', 16, 16)]
  assert plan.admitted == ()


def test_a_task_of_one_token_is_a_decode_row(pool):
  hit = pool.waiting(
    'hit', 9, num_computed=8, num_hit_pages=2, num_idle_hit_pages=2
  )
  plan = _plan(pool.waiting('short', 1), hit)
  assert plan.decodes == ('short', 'hit')
  assert set(plan.admitted) == {'short', 'hit'}


def test_prompts_do_not_shut_out_a_decode_row_that_is_next(pool):
  prompt = pool.running('a', 0, 100)
  plan = _plan(prompt, pool.waiting('b', 1))
  assert plan.decodes == ('b',)
  assert _prefills(plan) == [('a', 0, 8)]


def test_prompts_keep_their_chunks_where_it_has_no_slot(pool):
  prompts = [pool.running(i, 0, 100) for i in range(4)]
  fork = pool.waiting('fork', 7, num_computed=6, pages=pool.pages(2))
  assert _prefills(_plan(*prompts, fork)) == [(0, 0, 16)]


def test_a_decode_row_waits_where_more_chunks_are_taken_already(pool):
  plan = _plan(pool.waiting('a', 12), pool.waiting('b', 1))
  assert (plan.admitted, _prefills(plan)) == (('a',), [('a', 0, 12)])


def test_who_is_not_ready_keeps_its_place_and_gets_nothing(pool):
  at_its_length = pool.running('a', 8, is_ready=False)
  in_flight = pool.waiting('b', 5, is_ready=False)
  plan = _plan(at_its_length, in_flight, pool.waiting('c', 4))
  assert plan.admitted == ('c',)
  assert plan.decodes == plan.preempted == ()


# ------------------------------------------------------------------------------
# Admission.


def test_admission_ends_with_the_slots(pool):
  running = [pool.running(i, 8) for i in range(3)]
  plan = _plan(*running, pool.waiting('a', 2), pool.waiting('b', 2))
  assert plan.admitted == ('a',)


def test_nobody_passes_one_that_lacks_pages(pool):
  large, small = pool.waiting('large', 40), pool.waiting('small', 2)
  assert _plan(large, small, room=9).admitted == ()
  assert _plan(large, small, room=10).admitted == ('large',)


def test_room_is_left_for_each_to_grow_into(pool):
  first, second = pool.waiting('first', 8), pool.waiting('second', 2)
  assert _plan(first, second, room=3).admitted == ('first',)
  assert _plan(first, second, room=4).admitted == ('first', 'second')


def test_no_room_is_left_for_who_cannot_grow_into_it(pool):
  # Ten tokens, of which the last is never computed: three pages to the end.
  runs = pool.running('a', 9, max_known=10)
  enters = pool.waiting('b', 5, max_known=9)
  assert _plan(runs, enters, room=2).admitted == ('b',)
  more = pool.running('a', 12, max_known=14)
  assert not _plan(more, enters, room=2).admitted


def test_room_is_left_for_what_running_ones_know_and_will(pool):
  running = pool.running('a', 16, 24)  # 6 pages to come, and 1 to grow
  assert _plan(running, pool.waiting('b', 2), room=7).admitted == ()
  # With enough pages, but all chunks are taken.
  assert _plan(running, pool.waiting('b', 2), room=99).admitted == ()
  shorter = pool.running('a', 16, 8)
  assert _plan(shorter, pool.waiting('b', 2), room=4).admitted == ('b',)
  assert _plan(shorter, pool.waiting('b', 2), room=3).admitted == ()


def test_a_prefix_hit_needs_room_only_for_pages_that_are_idle(pool):
  in_use = pool.waiting(
    'a', 13, num_computed=12, num_hit_pages=3, num_idle_hit_pages=0
  )
  assert _plan(in_use, room=1).admitted == ('a',)
  idle = pool.waiting(
    'a', 13, num_computed=12, num_hit_pages=3, num_idle_hit_pages=3
  )
  assert _plan(idle, room=3).admitted == ()
  assert _plan(idle, room=4).decodes == ('a',)


def test_idle_pages_are_as_good_as_free(pool):
  def plan(num_idle):
    return scheduler.plan(
      [pool.waiting('a', 8)],
      num_free=1,
      num_idle=num_idle,
      served={},
      limits=LIMITS,
    )

  assert plan(0).admitted == ()
  assert plan(1).admitted == ('a',)


def test_a_fork_needs_room_for_the_page_it_copies(pool):
  pages = pool.pages(2)
  parent = pool.running('a', 7, pages=pages, num_copies=1)
  fork = pool.waiting('b', 7, num_computed=6, pages=pages, num_copies=1)
  # A copy for each, and a page for the parent to grow into.
  assert _plan(parent, fork, room=2).admitted == ()
  plan = _plan(parent, fork, room=3)
  assert plan.decodes == ('b', 'a')


def test_the_turn_decides_who_enters(pool):
  ann = [pool.waiting(i, 2) for i in range(3)]
  bob = pool.waiting('bob', 2, principal='bob')
  limits = simulated_device.limits(max_sequences=2)
  assert _plan(*ann, bob, limits=limits).admitted == (0, 'bob')
  plan = _plan(*ann, bob, limits=limits, served={'bob': 100})
  assert plan.admitted == (0, 1)
  urgent = pool.waiting('urgent', 2, priority=-1)
  assert _plan(*ann, urgent, limits=limits).admitted == ('urgent', 0)


def test_the_best_priority_may_be_that_of_one_who_is_not_shown(pool):
  served = {'ann': 100}
  aged = pool.waiting('aged', 2, priority=3, waited_steps=16)
  bob = pool.waiting('bob', 2, priority=2, principal='bob')
  # With 2 as the best priority both have that level, and bob was served less.
  assert _plan(aged, bob, served=served).admitted[0] == 'bob'
  plan = _plan(aged, bob, served=served, best_priority=0)
  assert plan.admitted[0] == 'aged'


# ------------------------------------------------------------------------------
# Preemption.


def test_the_last_in_standing_gives_its_pages_to_the_first(pool):
  tasks = [pool.running(i, 8) for i in range(3)]
  plan = _plan(*reversed(tasks), room=0)
  assert plan.preempted == (2,)
  assert plan.decodes == (0, 1)


def test_priority_counts_before_seniority(pool):
  tasks = [pool.running(i, 8, priority=3 - i) for i in range(3)]
  plan = _plan(*tasks, room=0)
  assert plan.preempted == (0,)


def test_fair_shares_do_not_decide_who_loses_pages(pool):
  tasks = [pool.running(i, 8, principal=i) for i in range(3)]
  assert _plan(*tasks, room=0, served={0: 99}).preempted == (2,)


def test_no_more_are_preempted_than_it_takes(pool):
  tasks = [pool.running(i, 8) for i in range(3)]
  assert _plan(*tasks, room=1).preempted == (2,)
  assert _plan(*tasks, room=2).preempted == (2,)
  assert _plan(*tasks, room=3).preempted == ()
  within_a_page = [pool.running(i, 7) for i in range(3)]
  assert _plan(*within_a_page, room=0).preempted == ()


def test_the_worst_is_preempted_for_itself(pool):
  better = pool.running('a', 7)
  plan = _plan(better, pool.running('b', 8), room=0)
  assert (plan.preempted, plan.decodes) == (('b',), ('a',))


def test_a_plan_that_preempts_for_running_ones_admits_nobody(pool):
  tasks = [pool.running(i, 8, priority=2) for i in range(3)]
  urgent = pool.waiting('urgent', 2)
  plan = _plan(*tasks, urgent, room=0)
  assert (plan.preempted, plan.admitted) == ((2,), ())
  # The next one does.
  plan = _plan(*tasks[:2], urgent, room=2)
  assert (plan.preempted, plan.admitted) == ((1,), ('urgent',))


def test_a_longer_prefill_is_worth_nobodys_pages(pool):
  prompt = pool.running('a', 8, 20)
  plan = _plan(prompt, pool.running('b', 6), room=1)
  assert plan.preempted == ()
  assert _prefills(plan) == [('a', 8, 4)]
  # One token is.
  plan = _plan(prompt, pool.running('b', 6), room=0)
  assert plan.preempted == ('b',)
  assert _prefills(plan) == [('a', 8, 8)]


def test_forks_that_wait_give_their_pages_first(pool):
  tasks = [pool.running(i, 8) for i in range(2)]
  fork = pool.waiting('fork', 7, num_computed=6, pages=pool.pages(2))
  plan = _plan(*tasks, fork, room=0)
  assert plan.preempted == ('fork',)
  assert plan.decodes == (0, 1)


def test_those_whose_pages_help_nobody_are_passed_over(pool):
  parent = pool.running('a', 16)
  fork = pool.waiting('fork', 8, num_computed=7, pages=parent.pages[:2])
  plan = _plan(parent, pool.running('b', 6), fork, room=0)
  assert plan.preempted == ('b',)  # the parent holds all pages of the fork


def test_pages_that_only_victims_share_come_free_together(pool):
  first = pool.running('a', 16)
  pages = pool.pages(2)
  forks = [
    pool.waiting(i, 8, num_computed=7, pages=pages, num_copies=1)
    for i in range(2)
  ]
  plan = _plan(first, *forks, room=0)
  assert set(plan.preempted) == {0, 1}
  assert plan.decodes == ('a',)


def test_where_even_all_are_not_enough_only_the_one_goes(pool):
  best = pool.running('a', 6)
  middle = pool.running('b', 8)
  worst = pool.running('c', 2, pages=best.pages[:1])
  plan = _plan(best, middle, worst, room=0)
  assert plan.preempted == ('b',)
  assert set(plan.decodes) == {'a', 'c'}


def test_who_was_asked_in_vain_still_holds_its_pages(pool):
  tasks = [pool.running('a', 8, is_ready=False)]
  tasks += [pool.running(id, 8, pages=tasks[0].pages) for id in 'bcd']
  plan = _plan(*tasks, room=0)
  assert plan.preempted == ('b', 'c', 'd')  # each for itself
  assert plan.decodes == ()


def test_a_copy_is_saved_where_the_others_who_share_are_preempted(pool):
  pages = pool.pages(2)
  parent = pool.running('a', 7, pages=pages, num_copies=1)
  fork = pool.waiting('b', 7, num_computed=6, pages=pages, num_copies=1)
  plan = _plan(parent, fork, room=0)
  assert (plan.preempted, plan.decodes) == (('b',), ('a',))
  # It copies if the prefix cache keeps the page as well.
  cached = pool.running('a', 7, pages=pages, num_copies=1, is_tail_cached=True)
  assert _plan(cached, fork, room=0).preempted == ('a',)


def test_a_newcomer_takes_the_place_of_a_worse_priority(pool):
  tasks = [pool.running(i, 8, priority=2) for i in range(4)]
  urgent = pool.waiting('urgent', 20)
  plan = _plan(*tasks, urgent)
  assert (plan.preempted, plan.admitted) == ((3,), ('urgent',))
  assert set(plan.decodes) == {0, 1, 2}
  plan = _plan(*tasks[:3], urgent, room=3)
  # It needs 5 pages, and each of the others 2 more to continue and to grow.
  assert (plan.preempted, plan.admitted) == ((2, 1), ('urgent',))


@pytest.mark.parametrize(
  'fields',
  [{'priority': 0}, {'priority': 2, 'waited_steps': 16}],
  ids=['equal', 'aged to an equal'],
)
def test_a_newcomer_waits_for_its_equals(pool, fields):
  tasks = [pool.running(i, 8, **fields) for i in range(4)]
  plan = _plan(*tasks, pool.waiting('urgent', 20))
  assert (plan.preempted, plan.admitted) == ((), ())
  plan = _plan(*tasks[:3], pool.waiting('urgent', 20), room=4)
  assert (plan.preempted, plan.admitted) == ((), ())


def test_aging_alone_drives_nobody_out(pool):
  # Of equal priority; the other has waited, and a better one is present.
  tasks = [pool.running(i, 8, priority=2) for i in range(4)]
  aged = pool.waiting('aged', 8, priority=2, waited_steps=100)
  plan = _plan(*tasks, aged, best_priority=0)
  assert (plan.preempted, plan.admitted) == ((), ())


def test_nobody_is_driven_out_for_nothing(pool):
  tasks = [pool.running(i, 8, priority=2 * (i == 3)) for i in range(4)]
  plan = _plan(*tasks, pool.waiting('urgent', 200), room=20)
  assert (plan.preempted, plan.admitted) == ((), ())


def test_forks_make_room_for_whoever_comes_before_them(pool):
  first = pool.waiting('first', 20)
  fork = pool.waiting('fork', 7, num_computed=6, pages=pool.pages(2))
  plan = _plan(first, fork, room=3)
  assert (plan.preempted, plan.admitted) == (('fork',), ('first',))
  plan = _plan(pool.waiting('last', 20), fork, room=3)
  assert plan.admitted == ('fork',)


# ------------------------------------------------------------------------------
# Limits, and the invariants of any plan.


@pytest.mark.parametrize('name', sorted(limits_lib.Limits.__annotations__))
@pytest.mark.parametrize('value', [0, -1, 1.0, True])
def test_limits_are_counts(name, value):
  with pytest.raises(
    ValueError, match=f'{name}: got {value}, expected a whole'
  ):
    simulated_device.limits(**{name: value})


def test_no_more_chunks_beside_decode_rows_than_without():
  with pytest.raises(
    ValueError,
    match='max_mixed_chunks: got 5, expected at most max_chunks = 4; raise',
  ):
    simulated_device.limits(max_mixed_chunks=5)


def _random_tasks(rng):
  pool = Pool()
  tasks = [
    pool.running(
      f'r{i}',
      rng.randint(1, 20),
      rng.choice([1, 1, 1, 5, 30]),
      priority=rng.randrange(3),
      principal=rng.randrange(2),
      waited_steps=rng.randrange(20),
      is_ready=rng.random() < 0.9,
    )
    for i in range(rng.randrange(5))
  ]
  for i in range(rng.randrange(4)):
    tasks.append(
      pool.waiting(
        f'w{i}',
        rng.randint(1, 30),
        priority=rng.randrange(3),
        principal=rng.randrange(2),
        waited_steps=rng.randrange(20),
        is_ready=rng.random() < 0.9,
      )
    )
  return tasks


def test_any_plan_keeps_to_rows_chunks_and_pages():
  rng = random.Random(0)
  for _ in range(1000):
    tasks, room = _random_tasks(rng), rng.randrange(12)
    plan = _plan(*tasks, room=room)
    by_id = {task.id: task for task in tasks}
    lengths = dict.fromkeys(plan.decodes, 1)
    lengths |= {each.id: each.length for each in plan.prefills}
    assert not lengths.keys() & set(plan.preempted)
    assert all(by_id[id].is_ready for id in lengths)
    assert set(plan.admitted) <= lengths.keys()
    assert all(by_id[id].num_remaining == 1 for id in plan.decodes)
    most = LIMITS.max_mixed_chunks if plan.decodes else LIMITS.max_chunks
    chunks = [LIMITS.num_chunks(prefill.length) for prefill in plan.prefills]
    assert sum(chunks) <= most
    running = {task.id for task in tasks if task.is_running}
    seated = running - set(plan.preempted) | set(plan.admitted)
    assert len(seated) <= LIMITS.max_sequences
    used = sum(
      LIMITS.num_pages(by_id[id].num_computed + length) - by_id[id].num_pages
      for id, length in lengths.items()
    )
    freed = sum(by_id[id].num_pages for id in plan.preempted)
    assert used <= room + freed
    # Every running sequence decodes, unless pages are short.
    if not plan.preempted:
      assert set(plan.decodes) >= {
        task.id
        for task in tasks
        if task.is_running and task.is_ready and task.num_remaining == 1
      }
