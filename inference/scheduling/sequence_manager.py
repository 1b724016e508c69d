"""Keeps the books of the engine: who runs, who waits, who holds which pages.

Everything the engine decides that needs no device. `plan` asks the scheduler
what to do, `begin` does it on paper and returns what the device has to compute;
the engine dispatches that, and reports tokens (`append`) and ends (`end`) as
they become known. A simulator drives the same roster on a virtual clock.

The host runs ahead of the device: a step begins before the tokens of the one
before are known. Such tokens count as known, since their place is, though their
ids are still in flight. Nothing waits for the device when pages change hands: a
page that is released while a dispatched step writes to it is safe to hand on,
because the device runs steps in order, and its next owner writes later.

One thread owns it.
"""

import collections
from collections.abc import Collection, Hashable, Sequence
import dataclasses
import heapq
import itertools

from inference.scheduling import fairness, page_tables, scheduler


class Refused(ValueError):
  """A sequence that could never run, or that contradicts another."""


@dataclasses.dataclass(frozen=True, kw_only=True, slots=True)
class Row:
  """Consecutive tokens of one sequence that a step computes."""

  id: Hashable
  slot: int  # of device-side arrays; the sequence's own while it runs
  start: int  # position of the first token
  length: int
  # Their ids. None: it is one token, in flight, the last sampled in this slot.
  # A slot's new owner never sees the last owner's: its first tokens are known.
  tokens: tuple[int, ...] | None
  pages: tuple[int, ...]  # page table as far as start + length
  samples: bool  # whether the last position yields a token


@dataclasses.dataclass(frozen=True, kw_only=True)
class Step:
  """What the device computes in one step.

  First the copies: all sources are read before any page is written, since a
  source may belong to another sequence in this very step. Then the rows, which
  write only to pages of their own.
  """

  copies: tuple[tuple[int, int], ...]  # pages (source, destination)
  decodes: tuple[Row, ...]  # in ascending order of context length
  chunks: tuple[Row, ...]  # at most `chunk_tokens` tokens each
  seated: tuple[Hashable, ...]  # entered a slot in this step; all have a row
  preempted: tuple[Hashable, ...]  # left theirs before it


@dataclasses.dataclass(frozen=True, kw_only=True)
class Gauges:
  """The state of a roster, for metrics; the last two only ever grow."""

  num_running: int
  num_waiting: int
  pages_used: int
  pages_idle: int
  pages_free: int
  tokens_held: int  # in the used pages; those of a shared page count once
  prefix_tokens_looked_up: int
  prefix_tokens_found: int

  @property
  def hit_rate(self) -> float:
    """Share of the prompts that the prefix cache knew, by tokens."""
    return self.prefix_tokens_found / max(self.prefix_tokens_looked_up, 1)


class Roster:
  """The sequences of an engine and their pages."""

  def __init__(self, limits: scheduler.Limits, *, num_pages: int):
    self.limits = limits
    self.tables = page_tables.PageTables(
      num_pages=num_pages, page_size=limits.page_size
    )
    self.served: dict[Hashable, int] = {}  # virtual token counters
    self.num_steps = 0
    self._sequences: dict[Hashable, page_tables.Sequence] = {}
    self._running: dict[Hashable, page_tables.Sequence] = {}
    self._waiting: dict[Hashable, page_tables.Sequence] = {}
    self._active: collections.Counter[Hashable] = collections.Counter()
    self._free_slots = list(range(limits.max_sequences))
    self._num_submitted = 0
    self._num_seated = 0
    self._planned: scheduler.Plan | None = None

  def submit(
    self,
    id: Hashable,
    prompt: Sequence[int],
    max_new_tokens: int,
    *,
    principal: Hashable = None,
    priority: int = 0,
    scope: Hashable = None,
    reads_prefix_cache: bool = True,
    parent: Hashable = None,
  ):
    """Takes in a sequence, to run when it has its turn.

    Args:
      id: Of no other sequence that is here.
      prompt: Token ids, at least one.
      max_new_tokens: After so many it gets no more work, and waits for `end`.
      principal: On whose behalf; fairness is between principals.
      priority: Lower is sooner.
      scope: Who shares prefixes: those of equal scope.
      reads_prefix_cache: False if all positions of the prompt are wanted, not
        only what follows; its pages are found by others all the same.
      parent: A sequence of the same prompt. This one waits until the parent has
        computed it, and shares its pages. If the parent is gone, or loses its
        pages before, the two have nothing more to do with each other.

    Raises:
      Refused: it could never run, or is not what its parent is.
    """
    prompt = list(prompt)
    self._check_new(id, len(prompt), max_new_tokens)
    source = self._sequences.get(parent) if parent is not None else None
    if source and (
      source.tokens[: source.num_prompt] != prompt or source.scope != scope
    ):
      raise Refused(
        f'sequence {id!r}: got another prompt or scope than its parent'
        f' {parent!r}, expected the same; submit it without a parent'
      )
    if principal not in self._active:
      self.served = fairness.lift(self.served, principal, self._active)
    self._active[principal] += 1
    sequence = page_tables.Sequence(
      id=id,
      tokens=prompt,
      num_prompt=len(prompt),
      max_known=len(prompt) + max_new_tokens,
      principal=principal,
      priority=priority,
      scope=scope,
      reads_prefix_cache=reads_prefix_cache,
      arrival=self._num_submitted,
      submitted=self.num_steps,
    )
    self._num_submitted += 1
    self._sequences[id] = self._waiting[id] = sequence
    if source:
      source.children.append(sequence)
      sequence.awaits_parent = True
      if source.num_computed >= source.num_prompt:
        self._fork(source)

  def plan(self) -> scheduler.Plan:
    """Plans the next step; to plan again gives the same."""
    everybody = self._sequences.values()
    best_priority = min((each.priority for each in everybody), default=0)
    for sequence in self._waiting.values():
      sequence.waited_steps = self.num_steps - sequence.submitted
    candidates = self._candidates(best_priority)
    chosen = {sequence.id for sequence in candidates}
    forks = [
      sequence
      for sequence in self._waiting.values()
      if sequence.pages and sequence.id not in chosen
    ]
    viewed = [*self._running.values(), *candidates, *forks]
    self._planned = scheduler.plan(
      [self.tables.task(sequence) for sequence in viewed],
      num_free=self.tables.allocator.num_free,
      num_idle=self.tables.allocator.num_idle,
      served=self.served,
      limits=self.limits,
      best_priority=best_priority,
    )
    return self._planned

  def begin(self, plan: scheduler.Plan) -> Step:
    """Carries a plan out and returns what the device is to compute.

    From here on everything in the step counts as computed, and each token that
    it samples as known.

    Raises:
      ValueError: `plan` is not the latest, or a sequence has left since.
    """
    if plan is not self._planned:
      raise ValueError(
        'plan: got one that was made before the roster changed, expected the'
        ' latest; call plan() again'
      )
    self._planned = None
    for id in plan.preempted:
      self._vacate(self._sequences[id])
    # Before anything is evicted: what they have found is theirs.
    for id in plan.admitted:
      self._seat(self._sequences[id])
    work = [(self._sequences[id], 1) for id in plan.decodes]
    work += [(self._sequences[each.id], each.length) for each in plan.prefills]
    copies = []
    for sequence, length in work:
      copies += self.tables.grow(sequence, length)
    decodes = work[: len(plan.decodes)]
    prefills = work[len(plan.decodes) :]
    step = Step(
      copies=tuple(copies),
      decodes=tuple(
        self._row(sequence, sequence.num_computed, 1) for sequence, _ in decodes
      ),
      chunks=tuple(
        row
        for sequence, length in prefills
        for row in self._chunks(sequence, length)
      ),
      seated=plan.admitted,
      preempted=plan.preempted,
    )
    for sequence, length in work:
      self._advance(sequence, length)
    self._charge(work)
    self.num_steps += 1
    return step

  def append(self, id: Hashable, token: int):
    """Reports a sampled token, the oldest of the sequence in flight.

    Raises:
      ValueError: none is in flight.
    """
    sequence = self._get(id)
    if not sequence.num_in_flight:
      raise ValueError(
        f'sequence {id!r}: got a token, expected none, since no row that'
        ' samples one has begun; append one for each Row.samples'
      )
    sequence.num_in_flight -= 1
    sequence.tokens.append(token)

  def end(self, id: Hashable):
    """Lets a sequence go that is finished; tokens still in flight are lost.

    Its pages are released at once, those that are full and of known tokens to
    the prefix cache. A plan that is out may count on it: make a new one.
    """
    sequence = self._get(id)
    self._release(sequence)
    self._disown(sequence)
    sequence.awaits_parent = False  # who finds it among its children
    del self._sequences[id]
    self._waiting.pop(id, None)
    self._active[sequence.principal] -= 1
    if not self._active[sequence.principal]:
      del self._active[sequence.principal]
    self._planned = None

  def preempt(self, id: Hashable):
    """Makes a sequence give back its pages and wait, as a plan would.

    Raises:
      ValueError: it holds none.
    """
    sequence = self._get(id)
    if not sequence.pages:
      raise ValueError(
        f'sequence {id!r}: got one that waits without pages to preempt,'
        ' expected one that runs; nothing is gained by it'
      )
    self._vacate(sequence)
    self._planned = None

  def forget(self, scope: Hashable):
    """Lets the prefix cache go of a scope, whose weights or principal left."""
    self.tables.cache.forget(scope)
    self._planned = None

  def clear(self):
    """Lets the prefix cache go of everything."""
    self.tables.cache.clear()
    self._planned = None

  def is_running(self, id: Hashable) -> bool:
    """Returns whether a sequence has a slot."""
    return self._get(id).is_running

  def running(self) -> Collection[Hashable]:
    """Returns the ids of those that have a slot."""
    return self._running.keys()

  def slot(self, id: Hashable) -> int:
    """Returns the slot of one that runs."""
    slot = self._get(id).slot
    if slot is None:
      raise ValueError(
        f'sequence {id!r}: got one that waits, expected one that runs; it has'
        ' no slot'
      )
    return slot

  def tokens(self, id: Hashable) -> Sequence[int]:
    """Returns the tokens of which the ids are known, those of the prompt first.

    Not to be changed, and only good until the next `append`.
    """
    return self._get(id).tokens

  def num_cached_tokens(self, id: Hashable) -> int:
    """Returns how many prompt tokens it found computed.

    By the prefix cache or by its parent, when it was first admitted; what it
    finds after a preemption is its own.
    """
    return self._get(id).num_cached

  def num_preemptions(self, id: Hashable) -> int:
    """Returns how often a sequence gave its pages back."""
    return self._get(id).num_preemptions

  def num_pages_held(self, id: Hashable) -> int:
    """Returns how many pages a sequence holds, shared ones included."""
    return len(self._get(id).pages)

  def gauges(self) -> Gauges:
    """Returns the state of the roster."""
    allocator, cache = self.tables.allocator, self.tables.cache
    return Gauges(
      num_running=len(self._running),
      num_waiting=len(self._waiting),
      pages_used=allocator.num_used,
      pages_idle=allocator.num_idle,
      pages_free=allocator.num_free,
      tokens_held=self.tables.num_tokens_held(self._sequences.values()),
      prefix_tokens_looked_up=cache.num_tokens_looked_up,
      prefix_tokens_found=cache.num_tokens_found,
    )

  def check(self):
    """Asserts what always holds; for tests, it looks at everything."""
    everybody = self._sequences.values()
    self.tables.check(everybody)
    assert {**self._running, **self._waiting} == self._sequences
    assert len(self._running) + len(self._waiting) == len(self._sequences)
    slots = [*self._free_slots, *(x.slot for x in self._running.values())]
    assert set(slots) == set(range(self.limits.max_sequences)), slots
    assert len(slots) == self.limits.max_sequences, slots
    assert all(each.slot is None for each in self._waiting.values())
    for each in everybody:
      assert 0 <= each.num_computed <= each.num_known <= each.max_known, each
      assert each.num_in_flight >= 0, each
      assert not each.awaits_parent or not each.pages, each
      if each.awaits_parent:
        assert any(each in other.children for other in everybody), each
    assert self._active == collections.Counter(
      each.principal for each in everybody
    )

  def _candidates(self, best_priority: int) -> list[page_tables.Sequence]:
    """Those that may enter next: the planner need not see the whole queue."""
    ready = [each for each in self._waiting.values() if each.is_ready]
    num_slots = len(self._free_slots)
    worst = max((each.priority for each in self._running.values()), default=0)
    if not num_slots and all(each.priority >= worst for each in ready):
      return []  # neither a slot nor anybody who would have to make room
    queue = fairness.in_turn(
      ready,
      served=self.served,
      best_priority=best_priority,
      aging_steps=self.limits.aging_steps,
    )
    return list(itertools.islice(queue, max(num_slots, 1)))

  def _row(
    self, sequence: page_tables.Sequence, start: int, length: int
  ) -> Row:
    stop = start + length
    is_known = stop <= len(sequence.tokens)
    assert sequence.slot is not None
    return Row(
      id=sequence.id,
      slot=sequence.slot,
      start=start,
      length=length,
      tokens=tuple(sequence.tokens[start:stop]) if is_known else None,
      pages=sequence.pages[: self.limits.num_pages(stop)],
      samples=stop == sequence.num_known,
    )

  def _chunks(self, sequence: page_tables.Sequence, length: int) -> list[Row]:
    """Cuts the prefill of a sequence into chunks."""
    start, rows = sequence.num_computed, self.limits.chunk_tokens
    return [
      self._row(sequence, start + done, min(rows, length - done))
      for done in range(0, length, rows)
    ]

  def _seat(self, sequence: page_tables.Sequence):
    """Lets a sequence run."""
    if not sequence.pages:
      self.tables.take_hit(sequence)
      if sequence.seniority is None and sequence.reads_prefix_cache:
        self.tables.cache.record(
          num_looked_up=len(sequence.tokens), num_found=sequence.num_computed
        )
    if sequence.seniority is None:
      sequence.seniority = self._num_seated
      sequence.num_cached = sequence.num_computed
      self._num_seated += 1
    sequence.num_charged = max(sequence.num_charged, sequence.num_computed)
    sequence.slot = heapq.heappop(self._free_slots)
    del self._waiting[sequence.id]
    self._running[sequence.id] = sequence

  def _vacate(self, sequence: page_tables.Sequence):
    """Makes a sequence wait without pages."""
    self._release(sequence)
    self._disown(sequence)
    sequence.num_preemptions += 1
    self._waiting[sequence.id] = sequence

  def _release(self, sequence: page_tables.Sequence):
    """Takes slot and pages from a sequence, if it has any."""
    self.tables.release(sequence)
    if sequence.slot is not None:
      del self._running[sequence.id]
      heapq.heappush(self._free_slots, sequence.slot)
      sequence.slot = None

  def _disown(self, sequence: page_tables.Sequence):
    """Lets those that wait for the prompt of a sequence go their own way."""
    for child in sequence.children:
      child.awaits_parent = False
    sequence.children.clear()

  def _fork(self, sequence: page_tables.Sequence):
    """Shares a prompt that is computed with those that wait for it."""
    for child in sequence.children:
      if child.awaits_parent:  # else it has ended
        self.tables.fork(sequence, child)
        self._planned = None  # its parent may have to copy a page now
    self._disown(sequence)

  def _advance(self, sequence: page_tables.Sequence, length: int):
    """Counts tokens as computed, and what it samples as known."""
    was_prompt = sequence.num_computed < sequence.num_prompt
    sequence.num_computed += length
    if not sequence.num_remaining:
      sequence.num_in_flight += 1
    if was_prompt and sequence.num_computed >= sequence.num_prompt:
      # At once, not at its end: others with the same prompt are on their way.
      self.tables.insert(sequence)
      self._fork(sequence)

  def _charge(self, work: list[tuple[page_tables.Sequence, int]]):
    """Charges what is computed for the first time; see `fairness.charge`."""
    charges = collections.Counter()
    for sequence, _ in work:
      new = max(sequence.num_computed - sequence.num_charged, 0)
      charges[sequence.principal] += new
      sequence.num_charged += new
    for principal, num_tokens in charges.items():
      self.served = fairness.charge(self.served, principal, num_tokens)

  def _get(self, id: Hashable) -> page_tables.Sequence:
    try:
      return self._sequences[id]
    except KeyError:
      raise KeyError(
        f'sequence {id!r}: got an id that is not here, expected one that is'
      ) from None

  def _check_new(self, id: Hashable, num_prompt: int, max_new_tokens: int):
    """Refuses what could not run even alone."""
    if id in self._sequences:
      raise Refused(
        f'sequence {id!r}: got an id that is taken; expected a new one'
      )
    if num_prompt < 1 or max_new_tokens < 1:
      raise Refused(
        f'sequence {id!r}: got a prompt of {num_prompt} tokens and'
        f' {max_new_tokens} new ones, expected at least one of each; begin with'
        ' a token that starts a text, and ignore a token that is not wanted'
      )
    usable = self.tables.allocator.num_usable
    # The last token is sampled and never computed.
    needed = self.limits.num_pages(num_prompt + max_new_tokens - 1)
    if needed > usable:
      raise Refused(
        f'sequence {id!r}: got {num_prompt} prompt tokens and up to'
        f' {max_new_tokens} new ones, {needed} pages, expected at most'
        f' {usable * self.limits.page_size} tokens, {usable} pages; shorten it'
        ' or give the cache more pages'
      )
