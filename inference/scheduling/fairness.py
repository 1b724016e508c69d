"""The order in which waiting sequences are admitted: aging and fair shares.

Three keys decide, in this order:

1. The level: the priority, lifted by one for every `aging_steps` steps of
   waiting, at most to the best priority present. A sequence that has waited
   long becomes equal to the best sequence, but never better.
2. The principal that was served least, by the virtual token counter of Sheng et
   al. (arXiv:2401.00588). So a flood of one principal that has waited long
   gains nothing over a new request of another principal.
3. The arrival, among sequences of one principal.
"""

from collections.abc import Hashable, Iterable, Iterator, Mapping
import heapq
from typing import Protocol, TypeVar


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
  def num_remaining(self) -> int: ...  # tokens to compute


QueuedT = TypeVar('QueuedT', bound=Queued)


def level(task: Queued, *, best_priority: int, aging_steps: int) -> int:
  """Returns the priority after aging; lower is sooner."""
  return max(task.priority - task.waited_steps // aging_steps, best_priority)


def lift(
  served: Mapping[Hashable, int],
  principal: Hashable,
  active: Iterable[Hashable],
) -> dict[Hashable, int]:
  """Returns the counters after an idle principal becomes active.

  Its counter is lifted to the smallest counter of the active principals: idle
  time cannot be saved up (Sheng et al., section 4). Smaller counters of idle
  principals are dropped, since they would be lifted too. Without active
  principals, all counters restart at 0.

  Args:
    served: tokens computed per principal.
    principal: that becomes active.
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
  served: Mapping[Hashable, int],
  best_priority: int,
  aging_steps: int,
) -> Iterator[QueuedT]:
  """Yields waiting sequences in the order in which they are to be admitted.

  Each sequence is charged to its principal before the next one is chosen. One
  step may admit many sequences: without the charge, a principal that submits
  many at once would get all the slots.
  """
  lines: dict[tuple[int, Hashable], list[QueuedT]] = {}
  for task in sorted(queue, key=lambda task: task.arrival, reverse=True):
    own_level = level(
      task, best_priority=best_priority, aging_steps=aging_steps
    )
    lines.setdefault((own_level, task.principal), []).append(task)
  counters = dict(served)

  def key(line: tuple[int, Hashable]):
    # Arrivals are unique, so that principals are never compared.
    return line[0], counters.get(line[1], 0), lines[line][-1].arrival, line

  heap = [key(line) for line in lines]
  heapq.heapify(heap)
  while heap:
    entry = heapq.heappop(heap)
    line = entry[-1]
    if entry == key(line):  # else stale: its principal was charged since
      task = lines[line].pop()
      counters[task.principal] = entry[1] + task.num_remaining
      yield task
    if lines[line]:
      heapq.heappush(heap, key(line))
