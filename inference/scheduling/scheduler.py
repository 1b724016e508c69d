"""The scheduler: counts of sequences in, the plan of the next step out.

A step is one program over decodes (one token of a sequence each) and chunks of
consecutive prompt tokens (chunked prefill: Agrawal et al., arXiv:2403.02310).
`plan` chooses which sequences get decodes and chunks, which enter, and which
give their pages back. It is a pure function of counts: it knows no device, no
clock and no contents of pages. The SequenceManager carries plans out.

Three questions, and the order that answers each:

- Which sequence is admitted next? The *turn* of `fairness`. No sequence passes
  another one that lacks pages or chunks: small sequences would take the room
  again and again, and keep a large one out forever. A prompt that has begun
  comes before one that has not.
- Which running sequence is served first? The *standing* of `fairness`. The
  counters of served tokens do not count here: they move with each token, and
  two sequences would take each other's pages in turn.
- Which sequence gives pages back? The last in standing whose pages help, after
  the forks that wait. So no sequence loses pages to one of worse standing, and
  the best one always makes progress: it can have the pages of all others, and
  alone it fits.

No sequence starves. A waiting sequence rises until it is equal to the best one.
Among equals, each principal has its share and each sequence its place in line.
An admitted sequence keeps its level and its seniority: only sequences that go
before it anyway can take its pages. A run that is preempted counts as waiting.

Admission needs pages for all tokens that the sequence knows, after the pages of
running sequences, and one page more for each sequence that may grow into it. A
sequence that has just given its pages back is not admitted again before another
one leaves. Running sequences of worse priority make room for it; others do so
only for a *guest*, the next in turn of a principal that has nothing running. If
one draft of a plan does not admit the guest, another admits it first.
"""

import collections
from collections.abc import Collection, Hashable, Iterable, Mapping
import dataclasses

from inference.scheduling import fairness, limits as limits_lib


@dataclasses.dataclass(frozen=True, kw_only=True, slots=True)
class Task:
  """The counts of one sequence that the scheduler reads.

  A running sequence holds pages for its computed tokens. A waiting one holds no
  pages, and starts from the pages of a prefix hit. A fork is a sequence that
  waits with pages: the pages of the prompt that it shares with its parent.
  """

  id: Hashable
  principal: Hashable = None
  priority: int = 0  # lower is sooner
  weight: float = 1.0  # of the principal
  arrival: int  # order of submission; kept when preempted
  waited_steps: int = 0  # since submission, without the current run
  seniority: int = 0  # order of first admission; kept when preempted
  num_known: int  # known tokens, tokens in flight included
  max_known: int = 2**62  # tokens of prompt and completion, at most
  num_computed: int = 0  # computed tokens; while waiting: after its prefix hit
  pages: tuple[int, ...] = ()  # held now
  num_hit_pages: int = 0  # pages that a prefix hit would give a waiting one
  num_idle_hit_pages: int = 0  # hit pages that are idle: they take up room
  num_copies: int = 0  # pages to copy before it can write: 0 or 1
  is_tail_cached: bool = False  # then it copies even as the only holder
  is_running: bool = False
  is_ready: bool = True  # False: it keeps its place, but gets no work
  needs_chunk: bool = False  # for its next token, if that is its only one too

  @property
  def num_pages(self) -> int:
    """Pages held now."""
    return len(self.pages)

  @property
  def has_pages_while_waiting(self) -> bool:
    """Whether the sequence is a fork that waits."""
    return bool(self.pages) and not self.is_running

  @property
  def num_remaining(self) -> int:
    """Tokens known but not computed."""
    return self.num_known - self.num_computed

  @property
  def is_decode(self) -> bool:
    """Whether its only token needs no chunk."""
    return self.num_remaining == 1 and not self.needs_chunk


@dataclasses.dataclass(frozen=True, slots=True)
class Prefill:
  """Consecutive tokens of one sequence, computed in chunks."""

  id: Hashable
  start: int
  length: int


@dataclasses.dataclass(frozen=True, kw_only=True)
class StepPlan:
  """The plan of a step: ids of sequences, in the order of the actions."""

  preempted: tuple[Hashable, ...] = ()  # give back all pages and wait again
  admitted: tuple[Hashable, ...] = ()  # get a slot, and work in this step
  decodes: tuple[Hashable, ...] = ()  # in ascending order of context length
  prefills: tuple[Prefill, ...] = ()  # best standing first

  @property
  def is_empty(self) -> bool:
    """Whether the step computes no tokens."""
    return not self.decodes and not self.prefills


def plan(
  tasks: Iterable[Task],
  *,
  num_free: int,
  num_idle: int,
  served: Mapping[Hashable, float],
  limits: limits_lib.Limits,
  best_priority: int | None = None,
) -> StepPlan:
  """Plans the next step.

  Args:
    tasks: all sequences that run or hold pages, and of the other sequences at
      least the first in turn, one for each free slot.
    num_free: pages without contents.
    num_idle: pages that only the prefix cache keeps.
    served: tokens computed per principal, divided by its weight.
    limits: limits of the step.
    best_priority: best priority of all sequences, if `tasks` leaves some out.
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
  ranked = fairness.standing([x for x in tasks if x.is_running], levels)
  running = [task for _, task in ranked]
  principals = {task.principal for task in running}
  waiting = list(
    fairness.in_turn(
      (task for task in tasks if not task.is_running),
      served=served,
      best_priority=best_priority,
      aging_steps=limits.aging_steps,
      running=principals,
    )
  )
  order = fairness.service_order(running, levels, served)
  firsts = {task.id for rank, task in ranked if not rank}

  def drafted(guest: Task | None = None) -> _Draft | None:
    draft = _Draft(running, waiting, levels, num_free + num_idle, limits)
    if guest and not draft.admit_guest(guest, firsts):
      return None
    for task in order:
      draft.serve(task)
    # After a preemption, pages are short: a sequence that entered now would
    # lose its pages next.
    if not guest and not draft.preempted:
      draft.admit()
    return draft

  draft = drafted()
  assert draft
  guest = next((task for task in waiting if task.is_ready), None)
  principals |= {task.principal for task in draft.admitted.values()}
  if guest and guest.principal not in principals:
    draft = drafted(guest) or draft
  return draft.finish()


class _Draft:
  """A plan in the making, for one call of `plan`."""

  def __init__(
    self,
    running: list[Task],
    waiting: list[Task],
    levels: Mapping[Hashable, int],
    num_available: int,
    limits: limits_lib.Limits,
  ):
    self.running = running
    self.waiting = waiting
    self.levels = levels
    self.num_available = num_available
    self.limits = limits
    self.room = num_available  # pages that this plan has not given out
    # Best standing first; the last one is the first to give pages back.
    self.holders = running + [
      task for task in waiting if task.has_pages_while_waiting
    ]
    self.preempted: dict[Hashable, Task] = {}
    self.admitted: dict[Hashable, Task] = {}
    self.work: dict[Hashable, tuple[Task, int]] = {}  # with number of tokens
    self.num_chunks = 0
    self.cost = 0.0  # their weights, compared with `max_mixed_chunks`
    self.claims: dict[Hashable, int] = {}
    self.granted: dict[Hashable, int] = {}  # pages that a running task gets
    self.references: collections.Counter[int] | None = None
    # Chunks are given out before sequences enter. So the next in turn counts
    # now if it will decode: prompts must not shut it out.
    ready = [task for task in running if task.is_ready]
    if len(running) < limits.max_sequences:
      ready += [task for task in waiting if task.is_ready][:1]
    self.is_mixed = any(task.is_decode for task in ready)

  def serve(self, task: Task):
    """Gives a running task its tokens of this step, and pages for them."""
    length = self._length(task)
    if task.id in self.preempted or not task.is_ready or not length:
      return
    # Preempts others for one token, not for a longer prefill.
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
    self.granted[task.id] = self._pages_for(task, task.num_computed + length)
    self.room -= self.granted[task.id]
    self._give(task, length)

  def admit_guest(self, task: Task, firsts: Collection[Hashable]) -> bool:
    """Admits `task` before any other gets work; returns whether it could.

    Others make room unless their level is better, or they are in `firsts`, ids
    of the first running sequence of each principal.
    """
    worse = [
      other
      for other in self.holders
      if other.id not in (task.id, *firsts)
      and self.levels[other.id] >= self.levels[task.id]
    ]
    first = None
    if len(self.running) >= self.limits.max_sequences:
      first = next((each for each in reversed(worse) if each.is_running), None)
      if first is None:
        return False
    if not self._make_room(task, task.num_known, worse, first=first):
      return False
    # Pages of its hit may become idle by later preemptions: all of them count.
    self.room -= self._pages_for(task, task.num_known) + task.num_hit_pages
    self._references()  # counts its pages, if it is a fork
    self.holders = [each for each in self.holders if each is not task]
    self.admitted[task.id] = task
    self._give(task, self._length(task))
    return True

  def admit(self):
    """Admits tasks in turn, up to the first one without room.

    Only in a plan without preemptions.
    """
    # Known tokens of running tasks claim pages before tasks enter, computed or
    # not. Each running task may also grow into one more page.
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
    """Admits `task` instead of worse tasks, if they make enough room.

    Worse tasks are the other forks, whose turn comes later, and running tasks
    of worse priority that have not aged up to its level. The priority itself
    must be worse: it never changes, so two tasks cannot preempt each other in
    turn.
    """
    # A task admitted by this plan may count on pages that a victim holds.
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

  def finish(self) -> StepPlan:
    """Returns the plan."""
    work = list(self.work.values())
    decodes = sorted(
      (task for task, _ in work if task.is_decode),
      key=lambda task: (task.num_computed, task.arrival),
    )
    return StepPlan(
      preempted=tuple(self.preempted),
      admitted=tuple(self.admitted),
      decodes=tuple(task.id for task in decodes),
      prefills=tuple(
        Prefill(task.id, task.num_computed, length)
        for task, length in work
        if not task.is_decode
      ),
    )

  def _length(self, task: Task) -> int:
    """Returns how many tokens of `task` the step can still hold."""
    most_mixed = self.limits.max_mixed_chunks
    if task.is_decode:
      return int(self.num_chunks <= most_mixed)
    left = self.limits.max_chunks - self.num_chunks
    if self.is_mixed:
      left = int((most_mixed - self.cost) / self._weight(task) + 0.5)
      left = max(left, int(not self.num_chunks))
    return max(min(task.num_remaining, left * self.limits.chunk_tokens), 0)

  def _weight(self, task: Task) -> float:
    """Returns how often a chunk of `task` counts in a step with decodes."""
    return 1 + task.num_computed / self.limits.stall_context

  def _give(self, task: Task, length: int):
    """Adds tokens of a task to the plan."""
    self.work[task.id] = task, length
    if task.is_decode:
      self.is_mixed = True
    else:
      num_chunks = self.limits.num_chunks(length)
      self.num_chunks += num_chunks
      self.cost += num_chunks * self._weight(task)

  def _growth(self, task: Task) -> int:
    """Returns 1 if `task` may need a page beyond its known tokens, else 0."""
    most = self.limits.num_pages(task.max_known - 1)  # the last is not computed
    return int(most > self.limits.num_pages(task.num_known))

  def _pages_for(self, task: Task, num_tokens: int) -> int:
    """Returns the pages to allocate for `num_tokens` tokens of `task`."""
    missing = self.limits.num_pages(num_tokens)
    missing -= task.num_pages + task.num_hit_pages
    return max(missing, 0) + self._num_copies(task)

  def _num_copies(self, task: Task) -> int:
    """Returns the pages to copy: 0 if the other holders are preempted."""
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
    """Preempts as few candidates as needed, from the last on.

    Skips candidates whose pages are all shared, as long as others free pages.
    If all candidates together free too few pages, none is preempted.

    Args:
      task: the task that needs pages.
      num_tokens: tokens of the task that need pages.
      candidates: tasks that may be preempted, best standing first.
      first: a task that is preempted in any case, for its slot.

    Returns:
      Whether the task has room now.
    """
    room, rest, victims = self.room, list(candidates), []
    # Hit pages in use now may be idle after the preemptions: all of them count.
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
    """Returns the number of holders of each page; counted once, if needed."""
    if self.references is None:
      self.references = collections.Counter(
        page for holder in self.holders for page in holder.pages
      )
    return self.references

  def _helps(self, task: Task) -> bool:
    """Whether preempting `task` alone frees a page."""
    references = self._references()
    return any(references[page] == 1 for page in reversed(task.pages))

  def _drop(self, task: Task) -> int:
    """Takes back the pages of `task`; returns the room that it leaves."""
    references = self._references()
    references.subtract(task.pages)
    num_freed = sum(not references[page] for page in task.pages)
    wanted = self.claims.get(task.id, 0) or self.granted.get(task.id, 0)
    return num_freed + wanted

  def _preempt(self, victims: list[Task]):
    """Marks tasks as preempted, and removes their work from the plan.

    Their chunks stay unused: the length of the next task is decided already.
    """
    for victim in victims:
      self.preempted[victim.id] = victim
      self.holders.remove(victim)
      self.work.pop(victim.id, None)
