"""Decides what the next step of the engine computes: values in, a plan out.

A step is one program over decode rows, a token of a sequence each, and chunks
of consecutive prompt tokens (chunked prefill: Agrawal et al.,
arXiv:2403.02310). `plan` chooses who gets which, who enters, and who has to
give its pages back; it is a function of counts and knows no device, no clock
and no pages' contents. `roster` keeps the books and carries plans out.

Three questions, and the order that answers each:

- Who is admitted next? The *turn* (`fairness`): level, then the principal that
  was served least, then who came first. Strictly so: nobody passes one that
  lacks pages or chunks, since what the small ones took meanwhile would keep a
  large one out forever. And a prompt that has begun comes before one that has
  not.
- Who is served first of those that run? The *standing*: level, then who was
  admitted first. The counter has no say here: it moves with each token served,
  and two sequences would take each other's pages by turns for it.
- Who gives pages back? The last in standing whose pages help, after the forks
  that wait. So nobody loses pages to a worse one, and the best always makes
  progress: it can have the pages of all others, and alone it fits.

Nobody starves. One that waits rises until it is an equal of the best, and of
equals each principal has its share and each sequence its place in line. Once
admitted, it keeps its level and its seniority: only those that it has to let
pass anyway take its pages. A run that ends in preemption counts as waiting,
since nothing came of it but the tokens, which it keeps.

Admission needs room for all the tokens that a sequence knows, after all those
that the running ones know, and a page more for each of these that may grow into
one. One that has just given its pages back is not let in again before somebody
leaves. Those of a worse priority make room for it, others do not.
"""

import collections
from collections.abc import Hashable, Iterable, Mapping
import dataclasses

from inference.scheduling import fairness


@dataclasses.dataclass(frozen=True, kw_only=True)
class Limits:
  """What a step can hold; checked when made.

  The bound on how long a long prompt stalls others: a step with decode rows
  computes at most `max_mixed_chunks * chunk_tokens` prompt tokens beside them,
  whatever waits, and every running sequence has its row in every step. What a
  chunk attends to makes it dearer, so that fewer fit: behind `stall_context`
  tokens half as many, behind twice that a third, but always one.

  Raises:
    ValueError: a count is below 1, or more chunks fit beside decode rows than
      without.
  """

  max_sequences: int  # that run at once: slots, and decode rows of a step
  chunk_tokens: int  # tokens of a chunk
  max_chunks: int  # of a step without decode rows
  max_mixed_chunks: int  # of a step with decode rows
  stall_context: int  # tokens before a chunk that make it count twice there
  page_size: int  # tokens of a page
  aging_steps: int  # of waiting that are worth one level of priority

  def __post_init__(self):
    for field in dataclasses.fields(self):
      value = getattr(self, field.name)
      if not isinstance(value, int) or isinstance(value, bool) or value < 1:
        raise ValueError(
          f'{field.name}: got {value!r}, expected a whole number of at least 1;'
          ' none of these can be switched off'
        )
    if self.max_mixed_chunks > self.max_chunks:
      raise ValueError(
        f'max_mixed_chunks: got {self.max_mixed_chunks}, expected at most'
        f' max_chunks, {self.max_chunks}; raise that'
      )

  def num_pages(self, num_tokens: int) -> int:
    """Returns how many pages hold so many tokens."""
    return -(-num_tokens // self.page_size)

  def num_chunks(self, num_tokens: int) -> int:
    """Returns how many chunks compute so many tokens."""
    return -(-num_tokens // self.chunk_tokens)


@dataclasses.dataclass(frozen=True, kw_only=True, slots=True)
class Task:
  """What the planner knows of a sequence.

  A running one holds pages for what it has computed. A waiting one holds none,
  and starts from the pages of a prefix hit; a fork waits with those that it
  shares.
  """

  id: Hashable
  principal: Hashable = None
  priority: int = 0  # lower is sooner
  arrival: int  # order of submission; kept when preempted
  waited_steps: int = 0  # since submission, the current run left out
  seniority: int = 0  # order of first admission; kept when preempted
  num_known: int  # tokens known, those still in flight included
  max_known: int = 2**62  # tokens of prompt and completion, at most
  num_computed: int = 0  # of these, or where it would start from
  pages: tuple[int, ...] = ()  # held now
  num_hit_pages: int = 0  # that a prefix hit would give a waiting one
  num_idle_hit_pages: int = 0  # of these, idle now: taking them uses room up
  num_copies: int = 0  # pages to copy before it can write: 0 or 1
  is_tail_cached: bool = False  # then it copies even if nobody else holds it
  is_running: bool = False
  is_ready: bool = True  # False: keeps its place, but gets no work

  @property
  def num_pages(self) -> int:
    """Pages held now."""
    return len(self.pages)

  @property
  def has_pages_while_waiting(self) -> bool:
    """Whether it is a fork that waits with the pages that it shares."""
    return bool(self.pages) and not self.is_running

  @property
  def num_remaining(self) -> int:
    """Tokens known but not computed; one of them is a decode row."""
    return self.num_known - self.num_computed


@dataclasses.dataclass(frozen=True, slots=True)
class Prefill:
  """Consecutive tokens of one sequence, computed in chunks."""

  id: Hashable
  start: int
  length: int


@dataclasses.dataclass(frozen=True, kw_only=True)
class Plan:
  """What a step does, in this order; ids of sequences."""

  preempted: tuple[Hashable, ...] = ()  # give back all pages and wait again
  admitted: tuple[Hashable, ...] = ()  # each has work in this step
  decodes: tuple[Hashable, ...] = ()  # in ascending order of context length
  prefills: tuple[Prefill, ...] = ()  # best standing first

  @property
  def is_empty(self) -> bool:
    """Whether nothing is computed."""
    return not self.decodes and not self.prefills


def plan(
  tasks: Iterable[Task],
  *,
  num_free: int,
  num_idle: int,
  served: Mapping[Hashable, int],
  limits: Limits,
  best_priority: int | None = None,
) -> Plan:
  """Plans the next step.

  Args:
    tasks: All that run and all that hold pages; of the others, at least those
      whose turn comes first, one for each slot that is free.
    num_free: Pages that hold nothing.
    num_idle: Pages that only the prefix cache keeps.
    served: Tokens computed per principal.
    limits: What a step can hold.
    best_priority: Of all sequences, where `tasks` leaves some out.
  """
  tasks = tuple(tasks)
  if best_priority is None:
    best_priority = min((task.priority for task in tasks), default=0)
  levels = {
    task.id: fairness.level(
      task, best_priority=best_priority, aging_steps=limits.aging_steps
    )
    for task in tasks
  }
  running = sorted(
    (task for task in tasks if task.is_running),
    key=lambda task: (levels[task.id], task.seniority, task.arrival),
  )
  waiting = fairness.in_turn(
    (task for task in tasks if not task.is_running),
    served=served,
    best_priority=best_priority,
    aging_steps=limits.aging_steps,
  )
  draft = _Draft(running, list(waiting), levels, num_free + num_idle, limits)
  for task in running:
    draft.serve(task)
  # Pages have just run out: whoever entered now would lose its own next.
  if not draft.preempted:
    draft.admit()
  return draft.finish()


class _Draft:
  """A plan in the making; lives for one call of `plan`."""

  def __init__(
    self,
    running: list[Task],
    waiting: list[Task],
    levels: Mapping[Hashable, int],
    num_available: int,
    limits: Limits,
  ):
    self.running = running
    self.waiting = waiting
    self.levels = levels
    self.num_available = num_available
    self.limits = limits
    self.room = num_available  # pages, less those given out by this plan
    # Best first; the last to be served is the first to give pages back.
    self.holders = running + [
      task for task in waiting if task.has_pages_while_waiting
    ]
    self.preempted: dict[Hashable, Task] = {}
    self.admitted: dict[Hashable, Task] = {}
    self.work: dict[Hashable, tuple[Task, int]] = {}  # tokens of this step
    self.num_chunks = 0
    self.cost = 0.0  # of those, what counts towards `max_mixed_chunks`
    self.claims: dict[Hashable, int] = {}
    self.references: collections.Counter[int] | None = None
    # Blocks are given out before it is known who enters. So the next in turn
    # counts as a decode row if it is one: prompts do not shut it out.
    ready = [task for task in running if task.is_ready]
    if len(running) < limits.max_sequences:
      ready += [task for task in waiting if task.is_ready][:1]
    self.is_mixed = any(task.num_remaining == 1 for task in ready)

  def serve(self, task: Task):
    """Gives a running task its work, and the pages for it."""
    length = self._length(task)
    if task.id in self.preempted or not task.is_ready or not length:
      return
    # One token is worth a preemption, a longer prefill is not.
    one_more = task.num_computed + 1
    if self._pages_for(task, one_more) > self.room:
      worse = self.holders[self.holders.index(task) + 1 :]
      if not self._make_room(task, one_more, worse):
        self.room += self._drop(task)
        self._preempt([task])
        return
    num_pages = task.num_pages + self.room - self._num_copies(task)
    most = num_pages * self.limits.page_size - task.num_computed
    length = min(length, most)
    self.room -= self._pages_for(task, task.num_computed + length)
    self._give(task, length)

  def admit(self):
    """Lets tasks enter in turn, up to the first for which there is no room.

    Only in a plan that has preempted nobody.
    """
    # What running ones know takes pages before those who enter do, computed or
    # not; and each of them will want a page to grow into.
    self.claims = {
      task.id: self._pages_for(task, task.num_known) + self._growth(task)
      for task in self.running
    }
    self.room = self.num_available - sum(self.claims.values())
    for task in self.waiting:
      if not task.is_ready:
        continue
      num_seated = len(self.running) + len(self.admitted)
      is_seated = num_seated < self.limits.max_sequences
      needed = self._pages_for(task, task.num_known) + task.num_idle_hit_pages
      if needed > self.room or not is_seated:
        self._admit_instead(task, is_seated=is_seated)
        return
      if not (length := self._length(task)):
        return
      self.room -= needed + self._growth(task)
      self.admitted[task.id] = task
      self._give(task, length)

  def _admit_instead(self, task: Task, *, is_seated: bool):
    """Admits `task` in the place of worse ones, if they make room enough.

    These are the other forks, whose turn comes later, and running ones of a
    worse priority that have not aged up to it. The priority itself must be
    worse, which never changes: no two tasks drive each other out by turns.
    """
    # Who was admitted just now may count on pages that a victim holds.
    if self.admitted or not (length := self._length(task)):
      return
    worse = [
      other
      for other in self.holders
      if other.id != task.id
      and (
        not other.is_running
        or (
          other.priority > task.priority
          and self.levels[other.id] > self.levels[task.id]
        )
      )
    ]
    running = [other for other in worse if other.is_running]
    if not is_seated and not running:
      return
    first = None if is_seated else running[-1]
    if self._make_room(task, task.num_known, worse, first=first):
      self.admitted[task.id] = task
      self._give(task, length)

  def finish(self) -> Plan:
    """Returns the plan."""
    work = list(self.work.values())
    decodes = sorted(
      (task for task, _ in work if task.num_remaining == 1),
      key=lambda task: (task.num_computed, task.arrival),
    )
    return Plan(
      preempted=tuple(self.preempted),
      admitted=tuple(self.admitted),
      decodes=tuple(task.id for task in decodes),
      prefills=tuple(
        Prefill(task.id, task.num_computed, length)
        for task, length in work
        if task.num_remaining > 1
      ),
    )

  def _length(self, task: Task) -> int:
    """Tokens that rows and chunks are left for."""
    most_mixed = self.limits.max_mixed_chunks
    if task.num_remaining == 1:
      return int(self.num_chunks <= most_mixed)
    left = self.limits.max_chunks - self.num_chunks
    if self.is_mixed:
      left = int((most_mixed - self.cost) / self._weight(task) + 0.5)
      left = max(left, int(not self.num_chunks))
    return max(min(task.num_remaining, left * self.limits.chunk_tokens), 0)

  def _weight(self, task: Task) -> float:
    """Returns what a chunk of `task` counts beside decode rows."""
    return 1 + task.num_computed / self.limits.stall_context

  def _give(self, task: Task, length: int):
    """Enters a decode or a prefill."""
    self.work[task.id] = task, length
    if task.num_remaining == 1:
      self.is_mixed = True
    else:
      num_chunks = self.limits.num_chunks(length)
      self.num_chunks += num_chunks
      self.cost += num_chunks * self._weight(task)

  def _growth(self, task: Task) -> int:
    """Returns 1 if `task` may ever want a page beyond what it knows, else 0."""
    most = self.limits.num_pages(task.max_known - 1)  # the last is not computed
    return int(most > self.limits.num_pages(task.num_known))

  def _pages_for(self, task: Task, num_tokens: int) -> int:
    """Pages to allocate until so many tokens of `task` are computed."""
    missing = self.limits.num_pages(num_tokens)
    missing -= task.num_pages + task.num_hit_pages
    return max(missing, 0) + self._num_copies(task)

  def _num_copies(self, task: Task) -> int:
    """Pages to copy; none where those who share the page are preempted."""
    if self.references is None or not task.num_copies or task.is_tail_cached:
      return task.num_copies
    tail = task.pages[task.num_computed // self.limits.page_size]
    return int(self.references[tail] > 1)

  def _make_room(
    self,
    task: Task,
    num_tokens: int,
    candidates: list[Task],
    *,
    first: Task | None = None,
  ) -> bool:
    """Preempts as few of the candidates as it takes, from the last on.

    Passes over those whose pages are all held by others too, while there are
    some whose pages help. If all together are not enough, nobody is preempted.
    """
    room, rest, victims = self.room, list(candidates), []
    # Hits that are in use now may be idle once others have gone: all count.
    while first is not None or (
      self._pages_for(task, num_tokens) + task.num_hit_pages > self.room
    ):
      if first is None and not rest:
        for victim in victims:
          self._references().update(victim.pages)
        self.room = room
        return False
      helping = (other for other in reversed(rest) if self._helps(other))
      victim = first or next(helping, rest[-1])
      first = None
      rest.remove(victim)
      victims.append(victim)
      self.room += self._drop(victim)
    self._preempt(victims)
    return True

  def _references(self) -> collections.Counter[int]:
    """How many tasks hold each page; counted only where pages run out."""
    if self.references is None:
      self.references = collections.Counter(
        page for holder in self.holders for page in holder.pages
      )
    return self.references

  def _helps(self, task: Task) -> bool:
    """Whether pages become free when `task` alone gives back its own."""
    references = self._references()
    return any(references[page] == 1 for page in reversed(task.pages))

  def _drop(self, task: Task) -> int:
    """Takes back what `task` holds; returns the room that it leaves."""
    references = self._references()
    references.subtract(task.pages)
    num_freed = sum(not references[page] for page in task.pages)
    return num_freed + self.claims.get(task.id, 0)

  def _preempt(self, victims: list[Task]):
    """Enters those who give their pages back, and takes back their work.

    Their chunks stay unused: who enters in their place has been given its own.
    """
    for victim in victims:
      self.preempted[victim.id] = victim
      self.holders.remove(victim)
      self.work.pop(victim.id, None)
