"""Decides whose turn it is among those that wait: aging and fair shares.

Level first: the priority, lifted by one for every `aging_steps` of waiting, at
most to the best priority present. Whoever has waited long becomes an equal of
the best, never more. Among equals it is the turn of the principal that was
served least, by the virtual token counter of Sheng et al. (arXiv:2401.00588):
so a flood that has waited long gains nothing over a newcomer of another
principal. Within a principal, who came first.
"""

from collections.abc import Hashable, Iterable, Iterator, Mapping
import heapq
from typing import Protocol, TypeVar


class Queued(Protocol):
  """What decides when a sequence has its turn."""

  @property
  def principal(self) -> Hashable: ...
  @property
  def priority(self) -> int: ...  # lower is sooner
  @property
  def arrival(self) -> int: ...  # order of submission, no two alike
  @property
  def waited_steps(self) -> int: ...
  @property
  def num_remaining(self) -> int: ...  # tokens to compute


QueuedT = TypeVar('QueuedT', bound=Queued)


def level(task: Queued, *, best_priority: int, aging_steps: int) -> int:
  """Returns the priority after aging; lower is sooner."""
  return max(task.priority - task.waited_steps // aging_steps, best_priority)


def charge(
  served: Mapping[Hashable, int], principal: Hashable, num_tokens: int
) -> dict[Hashable, int]:
  """Returns the counters after `principal` had so many tokens computed.

  Tokens that are computed again after a preemption, or found in the prefix
  cache, are not to be charged.
  """
  return {**served, principal: served.get(principal, 0) + num_tokens}


def lift(
  served: Mapping[Hashable, int],
  principal: Hashable,
  active: Iterable[Hashable],
) -> dict[Hashable, int]:
  """Returns the counters after an idle principal becomes active.

  It is lifted to the smallest counter of those that are active already: time
  in which one asked for nothing cannot be saved up (Sheng et al., section 4).
  So a smaller one of somebody who is idle says nothing, and is dropped; where
  nobody is active, nobody is owed anything.
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
  served: Mapping[Hashable, int],
  best_priority: int,
  aging_steps: int,
) -> Iterator[QueuedT]:
  """Yields those that wait, in the order in which they are to be admitted.

  Each is charged to its principal before the next is chosen: one step may admit
  many, and whoever asked for many at once would otherwise get all the slots.
  """
  lines: dict[tuple[int, Hashable], list[QueuedT]] = {}
  for task in sorted(queue, key=lambda task: task.arrival, reverse=True):
    own_level = level(
      task, best_priority=best_priority, aging_steps=aging_steps
    )
    lines.setdefault((own_level, task.principal), []).append(task)
  counters = dict(served)

  def key(line: tuple[int, Hashable]):
    # Arrivals differ, so that principals are never compared.
    return line[0], counters.get(line[1], 0), lines[line][-1].arrival, line

  heap = [key(line) for line in lines]
  heapq.heapify(heap)
  while heap:
    entry = heapq.heappop(heap)
    line = entry[-1]
    if entry == key(line):  # else its principal was charged at another level
      task = lines[line].pop()
      counters[task.principal] = entry[1] + task.num_remaining
      yield task
    if lines[line]:
      heapq.heappush(heap, key(line))
