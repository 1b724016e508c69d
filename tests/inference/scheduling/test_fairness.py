"""The turn of waiting sequences: levels, fair shares, arrival."""

import dataclasses

import pytest

from inference.scheduling import fairness


@dataclasses.dataclass
class Waiting:
  arrival: int
  principal: str = 'ann'
  priority: int = 0
  waited_steps: int = 0
  num_remaining: int = 10
  weight: float = 1.0


def _turns(*queue, served=None, best_priority=0, aging_steps=5):
  in_turn = fairness.in_turn(
    queue,
    served=served or {},
    best_priority=best_priority,
    aging_steps=aging_steps,
  )
  return [task.arrival for task in in_turn]


@pytest.mark.parametrize(
  ('priority', 'waited_steps', 'level'),
  [
    (7, 0, 7),
    (7, 4, 7),
    (7, 5, 6),
    (7, 29, 2),
    (7, 1000, 2),  # equal to the best, never better
    (2, 1000, 2),
  ],
)
def test_waiting_lifts_up_to_the_best_present(priority, waited_steps, level):
  task = Waiting(0, priority=priority, waited_steps=waited_steps)
  assert fairness.level(task, best_priority=2, aging_steps=5) == level


def test_priority_comes_before_arrival_and_waiting_before_priority():
  assert _turns(Waiting(0, priority=1), Waiting(1)) == [1, 0]
  aged = Waiting(0, priority=1, waited_steps=5)
  assert _turns(aged, Waiting(1)) == [0, 1]


def test_within_a_principal_it_is_first_come_first_served():
  assert _turns(Waiting(2), Waiting(0), Waiting(1)) == [0, 1, 2]


def test_the_principal_served_least_comes_first():
  queue = Waiting(0, 'ann'), Waiting(1, 'bob')
  assert _turns(*queue) == [0, 1]
  assert _turns(*queue, served={'ann': 1}) == [1, 0]


def test_a_flood_that_waited_long_gains_nothing_over_a_newcomer():
  flood = [Waiting(i, 'ann', waited_steps=1000) for i in range(100)]
  assert _turns(*flood, Waiting(100, 'bob'), served={'ann': 1})[0] == 100


def test_who_asks_for_many_at_once_does_not_get_all_the_turns():
  flood = [Waiting(i, 'ann') for i in range(4)]
  few = [Waiting(4, 'bob'), Waiting(5, 'bob')]
  assert _turns(*flood, *few) == [0, 4, 1, 5, 2, 3]
  # Tokens count, not requests.
  long = [Waiting(i, 'ann', num_remaining=20) for i in range(3)]
  assert _turns(*long, *few) == [0, 4, 5, 1, 2]


def test_what_a_principal_got_at_one_level_counts_at_the_next():
  queue = [
    Waiting(0, 'ann', priority=0),
    Waiting(1, 'ann', priority=1),
    Waiting(2, 'bob', priority=1),
  ]
  assert _turns(*queue) == [0, 2, 1]


def test_principals_need_no_order_of_their_own():
  assert _turns(Waiting(0, None), Waiting(1, ('a', 1)), Waiting(2, 'b')) == [
    0,
    1,
    2,
  ]


def test_idle_time_cannot_be_saved_up():
  served = {'ann': 50, 'bob': 30, 'eve': 99, 'old': 10}
  active = ['ann', 'bob']
  assert fairness.lift(served, 'new', active)['new'] == 30
  assert fairness.lift(served, 'old', active)['old'] == 30
  assert fairness.lift(served, 'eve', active)['eve'] == 99  # nor forgotten


def test_counters_that_say_nothing_are_dropped():
  served = {'ann': 50, 'bob': 30, 'eve': 99, 'old': 10}
  lifted = fairness.lift(served, 'new', ['ann', 'bob'])
  assert lifted == {'ann': 50, 'bob': 30, 'eve': 99, 'new': 30}
  # A principal that comes back has the counter that it would have had.
  assert fairness.lift(lifted, 'old', ['ann', 'bob', 'new'])['old'] == 30
  assert fairness.lift(served, 'eve', []) == {'eve': 0}
