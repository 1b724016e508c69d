"""Shares of principals under a flood: slots, pages, chunks, and the queue.

The bounds are those of `inference.scheduling.fairness`, in steps of the
simulated device, which also checks that every preemption is exact.
"""

import itertools
import random
from typing import cast

import pytest

from inference.scheduling import fairness, scheduler
from tests.helpers.serving import simulated_device


def _loop(*, num_pages=600, **limits):
  fields = {'max_sequences': 8, 'aging_steps': 64, **limits}
  return simulated_device.Loop(
    simulated_device.limits(**fields), num_pages=num_pages
  )


def _flood(loop, number, *, length=6, new=60, principal='flood', **fields):
  """Submits many sequences of one principal."""
  for i in range(number):
    prompt = [i % 7, 1, *[2] * (length - 2)]
    loop.submit((principal, i), prompt, new, principal=principal, **fields)


def _wait(loop, id, prompt, new=4, **fields):
  """Submits a sequence; returns steps until it has work, and a token."""
  fields = {'principal': 'guest', **fields}
  loop.submit(id, prompt, new, **fields)
  submitted = len(loop.steps)
  while not loop.truths[id].num_appended:
    loop.step()
  return loop.first_steps[id] - submitted, len(loop.steps) - submitted


@pytest.mark.parametrize('num_pages', [40, 600], ids=['few pages', 'many'])
@pytest.mark.parametrize('warm', [1, 5, 30, 47])
def test_a_principal_with_nothing_running_has_work_in_the_next_step(
  num_pages, warm
):
  loop = _loop(num_pages=num_pages)
  _flood(loop, 1200)
  for _ in range(warm):
    loop.step()
  assert sum(len(step.preempted) for step in loop.steps) < 40
  waits = []
  for turn in range(12):  # one after the other: each has nothing running
    waits.append(_wait(loop, turn, [5, turn, 5])[0])
    while turn in loop.truths:
      loop.step()
  assert waits == [1] * 12
  # None of the flood is lost.
  loop.step()
  running = {each.principal for each in loop.manager.running()}
  assert running == {'flood'}
  loop.manager.check()


def test_a_flood_gives_way_once_not_for_every_sequence():
  loop = _loop()
  _flood(loop, 100)
  for _ in range(10):
    loop.step()
  for i in range(20):
    loop.submit(i, [5, i], 6, principal='guest')
  for _ in range(4):
    loop.step()
  # One for the first of them; slots that come free are shared from then on.
  assert sum(len(step.preempted) for step in loop.steps) == 1
  loop.run()
  assert len(loop.ended) == 120


def test_several_principals_enter_one_step_after_the_other():
  loop = _loop()
  _flood(loop, 100)
  for _ in range(10):
    loop.step()
  names = [f'guest {i}' for i in range(7)]
  start = len(loop.steps)
  for name in names:
    loop.submit(name, [5, 6, 7], 40, principal=name)
  for _ in range(7):
    loop.step()
  assert [loop.first_steps[name] - start for name in names] == [
    1, 2, 3, 4, 5, 6, 7
  ]  # fmt: skip
  # An eighth finds one sequence of each principal, and waits for an end.
  loop.submit('late', [5], 4, principal='late')
  loop.step()
  assert 'late' not in loop.first_steps
  running = [each.principal for each in loop.manager.running()]
  assert sorted(running) == sorted(['flood', *names])
  while not loop.ended:
    loop.step()
  loop.step()
  assert 'late' in loop.first_steps  # the next slot is its own
  loop.run()


def test_long_prompts_of_others_do_not_keep_a_prompt_from_chunks():
  loop = _loop(num_pages=3000)
  _flood(loop, 8, length=600, new=20)
  for _ in range(3):
    loop.step()
  work, token = _wait(loop, 'guest', [5] * 40)
  assert work == 1
  # Ten chunks; two a step beside decodes, and four without.
  assert token <= -(-10 // loop.limits.max_mixed_chunks) + 2
  # Two that both compute prompts share the chunks.
  loop.submit('second', [6] * 200, 4, principal='second')
  loop.submit('third', [7] * 200, 4, principal='third')
  submitted = len(loop.steps)
  while loop.truths['second'].num_appended == 0:
    loop.step()
  third = loop.sequences['third'].num_computed
  assert third >= 150
  most = 3 * -(-50 // loop.limits.max_mixed_chunks)
  assert len(loop.steps) - submitted <= most
  loop.run()


def test_a_better_level_is_never_preempted_for_a_guest():
  loop = _loop()
  _flood(loop, 50, priority=0)
  for _ in range(5):
    loop.step()
  loop.submit('guest', [5], 4, principal='guest', priority=1)
  for _ in range(20):
    loop.step()
  assert not any(step.preempted for step in loop.steps)
  assert 'guest' not in loop.first_steps
  # It rises to their level by waiting, and is a guest then.
  while loop.sequences['guest'].waited_steps < 64:
    loop.step()
  loop.step()
  assert 'guest' in loop.first_steps


@pytest.mark.parametrize('seed', range(4))
def test_any_mix_of_principals_ends_and_no_guest_waits_beyond_the_bound(seed):
  rng = random.Random(seed)
  num_pages = [24, 60, 120, 400][seed]
  loop = _loop(num_pages=num_pages, max_sequences=4)
  ids, submitted = itertools.count(), {}
  for _ in range(400):
    for principal, most in (('flood', 30), ('ann', 2), ('bob', 1)):
      present = sum(
        loop.sequences[id].principal == principal for id in loop.truths
      )
      if present < most and rng.random() < 0.5:
        id = next(ids)
        length = rng.randint(1, 30)
        loop.submit(
          id,
          [rng.randrange(2) for _ in range(length)],
          rng.randint(1, 30),
          principal=principal,
          scope=principal,
        )
        if not present:
          submitted[id] = len(loop.steps)
    loop.step()
    loop.manager.check()
  loop.run()
  assert len(submitted) > 15
  # Three principals, four slots: two others may come first. A token of the
  # one before may still be in flight when its principal submits again.
  waits = [loop.first_steps[id] - step for id, step in submitted.items()]
  # 24 pages do not hold one sequence of each.
  assert max(waits) <= (3 if num_pages > 24 else 60)


def test_ranks_take_turns_between_principals():
  def task(number, principal):
    return scheduler.Task(
      id=number,
      principal=principal,
      arrival=number,
      seniority=number,
      num_known=1,
      is_running=True,
    )

  tasks = [task(i, 'ann') for i in range(3)] + [task(3, 'bob'), task(4, 'eve')]
  levels = dict.fromkeys(range(5), 0)
  ranked = fairness.standing(tasks, levels)
  assert [each.id for _, each in ranked] == [0, 3, 4, 1, 2]
  assert [rank for rank, _ in ranked] == [0, 0, 0, 1, 2]
  assert fairness.standing(tasks, {**levels, 2: -1})[0][1].id == 2


@pytest.mark.parametrize(
  ('places', 'others', 'most'),
  [(1024, 0, 896), (1024, 896, 112), (1024, 1008, 14), (4, 0, 4), (4, 4, 0)],
)
def test_a_principal_leaves_places_of_the_queue_to_others(places, others, most):
  assert fairness.most_waiting(places, others) == most


@pytest.mark.parametrize('weight', [1.0, 3.0])
def test_tokens_are_shared_by_weight_while_both_wait(weight):
  loop = _loop()
  _flood(loop, 400, new=20, principal='heavy', weight=weight)
  _flood(loop, 400, new=20, principal='light')
  for _ in range(400):
    loop.step()
  made = {'heavy': 0, 'light': 0}
  for name, truth in [*loop.truths.items(), *loop.ended.items()]:
    principal, _ = cast(tuple[str, int], name)
    made[principal] += truth.num_appended
  # A sequence of 20 tokens in each of 8 slots: the shares are that coarse.
  assert made['heavy'] / made['light'] == pytest.approx(weight, rel=0.1)
  # Alone, a principal has everything, whatever its weight.
  assert sum(made.values()) > 0.8 * 400 * 8
