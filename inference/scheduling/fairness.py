"""Shares of principals: of the queue, of the slots, and of the tokens.

**The turn** is the order in which waiting sequences are admitted. Four keys
decide, in this order:

1. The level: the priority, lifted by one for every `aging_steps` steps of
   waiting, at most to the best priority present. A sequence that has waited
   long becomes equal to the best sequence, but never better.
2. Principals without a running sequence come first.
3. The principal that was served least, by the virtual token counter of Sheng et
   al. (arXiv:2401.00588). A token counts 1 / weight, so that a principal with
   twice the weight gets twice the tokens. A flood of one principal that has
   waited long gains nothing over a new request of another principal.
4. The arrival, among sequences of one principal.

**The standing** is the order in which running sequences keep their slots and
pages: the level, then the rank of a sequence among those of its principal,
divided by the weight, then the order of first admission. The last in standing
is the first to give way, so the principal that holds most slots for its weight
gives way.

**Slots.** A principal that has nothing running is admitted by force if it must
be: others whose rank is above 0 are preempted for its slot and its pages, and
chunks of others wait. So the first sequence of such a principal has work in the
next step that is planned, or in the k-th if k such principals wait. That holds
unless others have a better level, have one sequence each in all slots, or leave
too few pages even with one sequence each.

**Chunks.** Where several principals compute prompts, the one that was served
least has the first chunks of a step.

**The queue.** A principal may have at most a share of the places that others
leave (`most_waiting`). So the first principal leaves places to a second, and
these two to a third.
"""

import collections
from collections.abc import Collection, Hashable, Iterable, Iterator, Mapping
import heapq
from typing import Any, Protocol, TypeVar


class Queued(Protocol):
  """The fields of a sequence that decide its turn."""

  @property
  def principal(self) -> Hashable: ...
  @property
  def priority(self) -> int: ...  # lower is sooner
  @property
  def arrival(self) -> int: ...  # order of submission; unique
  @property
  def waited_steps(self) -> int: ...
  @property
  def weight(self) -> float: ...
  @property
  def num_remaining(self) -> int: ...  # tokens to compute


class Running(Protocol):
  """The fields of a sequence that decide its standing."""

  @property
  def id(self) -> Hashable: ...
  @property
  def principal(self) -> Hashable: ...
  @property
  def weight(self) -> float: ...
  @property
  def arrival(self) -> int: ...
  @property
  def seniority(self) -> int: ...  # order of first admission
  @property
  def is_ready(self) -> bool: ...
  @property
  def is_decode(self) -> bool: ...  # its next token takes no chunk


QueuedT = TypeVar('QueuedT', bound=Queued)
RunningT = TypeVar('RunningT', bound=Running)

# One of this many free places is kept for other principals. A queue of
# 1,024 places has 112 for a second principal, and 14 for a third.
_KEPT_SHARE = 8


def most_waiting(max_waiting: int, num_others: int = 0) -> int:
  """Returns how many sequences of one principal may wait.

  Args:
    max_waiting: places in the queue.
    num_others: places that sequences of other principals take.
  """
  places = max(max_waiting - num_others, 0)
  return places - places // _KEPT_SHARE


def has_places(
  asked: Mapping[Any, int],
  own: Mapping[Any, int],
  *,
  max_waiting: int,
  waiting: int,
) -> bool:
  """Returns whether the queue takes more sequences of some principals.

  Args:
    asked: new sequences, by principal.
    own: sequences that wait now, by principal.
    max_waiting: places in the queue.
    waiting: places that are taken.
  """
  return waiting + sum(asked.values()) <= max_waiting and all(
    own[each] + num <= most_waiting(max_waiting, waiting - own[each])
    for each, num in asked.items()
  )


def level(task: Queued, *, best_priority: int, aging_steps: int) -> int:
  """Returns the priority after aging; lower is sooner."""
  return max(task.priority - task.waited_steps // aging_steps, best_priority)


def standing(
  running: Iterable[RunningT], levels: Mapping[Hashable, int]
) -> list[tuple[int, RunningT]]:
  """Returns running sequences with their ranks, best standing first.

  Args:
    running: running sequences, in any order.
    levels: level of each sequence, by id.
  """

  def key(task: RunningT):
    return levels[task.id], task.seniority, task.arrival

  ranks: collections.Counter[Hashable] = collections.Counter()
  ranked = []
  for task in sorted(running, key=key):
    ranked.append((ranks[task.principal], task))
    ranks[task.principal] += 1
  # Stable: equal ranks keep the order of first admission.
  return sorted(
    ranked,
    key=lambda each: (levels[each[1].id], each[0] / each[1].weight),
  )


def service_order(
  running: Iterable[RunningT],
  levels: Mapping[Hashable, int],
  served: Mapping[Hashable, float],
) -> list[RunningT]:
  """Returns the order in which running sequences get tokens of a step.

  It is the standing. But if several principals compute prompts, decodes come
  first, then a prompt of the principal that was served least.

  Args:
    running: running sequences, best standing first.
    levels: level of each sequence, by id.
    served: tokens computed per principal, divided by its weight.
  """
  running = list(running)
  prompts = [each for each in running if each.is_ready and not each.is_decode]
  if len({each.principal for each in prompts}) < 2:
    return running
  first = min(
    prompts,
    key=lambda each: (levels[each.id], served.get(each.principal, 0)),
  )
  return sorted(
    running, key=lambda each: (not each.is_decode, each is not first)
  )


def lift(
  served: Mapping[Hashable, float],
  principal: Hashable,
  active: Iterable[Hashable],
) -> dict[Hashable, float]:
  """Returns the counters after an idle principal becomes active.

  Its counter is lifted to the smallest counter of the active principals: idle
  time cannot be saved up (Sheng et al., section 4). Smaller counters of idle
  principals are dropped, since they would be lifted too. Without active
  principals, all counters restart at 0.

  Args:
    served: tokens computed per principal, divided by its weight.
    principal: the principal that becomes active.
    active: principals with unfinished sequences.
  """
  active = set(active)
  if not active:
    return {principal: 0}
  smallest = min(served.get(other, 0) for other in active)
  kept = {
    other: count
    for other, count in served.items()
    if other in active or count > smallest
  }
  return {**kept, principal: max(served.get(principal, 0), smallest)}


def in_turn(
  queue: Iterable[QueuedT],
  *,
  served: Mapping[Hashable, float],
  best_priority: int,
  aging_steps: int,
  running: Collection[Hashable] = (),
) -> Iterator[QueuedT]:
  """Yields waiting sequences in the order in which they are to be admitted.

  Each sequence is charged to its principal before the next one is chosen. One
  step may admit many sequences: without the charge, a principal that submits
  many at once would get all the slots.

  Args:
    queue: the waiting sequences.
    served: tokens computed per principal, divided by its weight.
    best_priority: best priority of all sequences, running or waiting.
    aging_steps: steps of waiting that lift by one level.
    running: principals that have a running sequence.
  """
  lines: dict[tuple[int, Hashable], list[QueuedT]] = {}
  for task in sorted(queue, key=lambda task: task.arrival, reverse=True):
    own_level = level(
      task, best_priority=best_priority, aging_steps=aging_steps
    )
    lines.setdefault((own_level, task.principal), []).append(task)
  counters = dict(served)

  def key(line: tuple[int, Hashable]):
    own_level, principal = line
    # Arrivals are unique, so that principals are never compared.
    return (
      own_level,
      principal in running,
      counters.get(principal, 0),
      lines[line][-1].arrival,
      line,
    )

  heap = [key(line) for line in lines]
  heapq.heapify(heap)
  while heap:
    entry = heapq.heappop(heap)
    line = entry[-1]
    if entry == key(line):  # else stale: its principal was charged since
      task = lines[line].pop()
      charged = counters.get(task.principal, 0)
      counters[task.principal] = charged + task.num_remaining / task.weight
      yield task
    if lines[line]:
      heapq.heappush(heap, key(line))
