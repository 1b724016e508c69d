"""The SequenceManager: which sequences run, which wait, and their pages.

It makes every decision of the engine that needs no device. `plan` asks the
scheduler for the next step. `begin` updates the books as if the step were done,
and returns the step for the device. The engine dispatches the step, and reports
tokens (`append`) and ends of sequences (`end`) when it knows them. In tests a
simulated device drives the same class.

The host runs ahead of the device: a step begins before the tokens of the step
before are known. The position of such a token in flight is known, its id is
not. Pages change hands without waiting for the device: a page may be released
while a dispatched step writes to it, because the device runs steps in order and
the next owner of the page writes in a later step.

A step without chunks may compute several tokens of each sequence, one after
another: `decode_steps` says how many may follow without another plan. It may
also verify tokens that were drafted, all at once: `draft_lengths` says how
many, and `reject` takes back the wrong ones.

One thread owns a SequenceManager.
"""

import collections
from collections.abc import Collection, Hashable, Mapping, Sequence
import heapq
import itertools

from inference.scheduling import (
  fairness,
  gauges as gauges_lib,
  lengths,
  limits as limits_lib,
  page_tables,
  refusals,
  scheduler,
  spans,
)

Refused = refusals.Refused


class SequenceManager:
  """The sequences of an engine and their pages."""

  def __init__(self, limits: limits_lib.Limits, *, num_pages: int):
    """Starts without sequences.

    Args:
      limits: limits of a step.
      num_pages: P, the null page included.
    """
    self.limits = limits
    self.tables = page_tables.PageTables(
      num_pages=num_pages, page_size=limits.page_size
    )
    self.served: dict[Hashable, float] = {}  # virtual token counters
    self.num_steps = 0
    self._sequences: dict[Hashable, page_tables.Sequence] = {}
    self._running: dict[Hashable, page_tables.Sequence] = {}
    self._waiting: dict[Hashable, page_tables.Sequence] = {}
    self._active: collections.Counter[Hashable] = collections.Counter()
    self._free_slots = list(range(limits.max_sequences))
    self._num_submitted = 0
    self._num_seated = 0
    self._planned: scheduler.StepPlan | None = None

  def submit(
    self,
    id: Hashable,
    prompt: Sequence[int],
    max_new_tokens: int,
    *,
    principal: Hashable = None,
    priority: int = 0,
    weight: float = 1.0,
    scope: Hashable = None,
    reads_prefix_cache: bool = True,
    in_chunks: bool = False,
    awaits_pages: bool = False,
    parent: page_tables.Sequence | None = None,
  ) -> page_tables.Sequence:
    """Adds a waiting sequence, and returns it.

    Args:
      id: a name that no other sequence of the manager has.
      prompt: token ids, at least one.
      max_new_tokens: after this many tokens the sequence gets no more work, and
        waits for `end`.
      principal: the tenant; fairness is between principals.
      priority: lower is sooner.
      weight: above 0; a principal with twice the weight gets twice the tokens.
      scope: prefixes are shared between sequences of equal scope.
      reads_prefix_cache: False if logprobs of the whole prompt are wanted, so
        that every position must be computed. Other sequences still find the
        pages of this one.
      in_chunks: True if hidden states of the prompt are wanted, which steps of
        decodes do not return.
      awaits_pages: whether it waits until `adopt`.
      parent: a sequence of the same prompt. The new sequence waits until the
        parent has computed the prompt, and shares its pages. If the parent ends
        or is preempted before that, the new sequence computes the prompt.

    Raises:
      Refused: the sequence could never run, or differs from its parent.
    """
    prompt = list(prompt)
    refusals.check_new(id, self._sequences)
    refusals.check_fits(
      id,
      len(prompt),
      max_new_tokens,
      limits=self.limits,
      num_usable=self.tables.allocator.num_usable,
    )
    if parent and self._sequences.get(parent.id) is not parent:
      parent = None  # it has ended
    refusals.check_parent(id, prompt, scope, parent)
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
      weight=weight,
      scope=scope,
      reads_prefix_cache=reads_prefix_cache,
      in_chunks=in_chunks,
      awaits_pages=awaits_pages,
      arrival=self._num_submitted,
      submitted=self.num_steps,
    )
    self._num_submitted += 1
    self._sequences[id] = self._waiting[id] = sequence
    if parent:
      parent.children.append(sequence)
      sequence.awaits_parent = True
      if parent.num_computed >= parent.num_prompt:
        self._fork(parent)
    return sequence

  def adopt(
    self, id: Hashable, num_tokens: int, *, num_computed: int
  ) -> tuple[page_tables.Sequence, list[int | None]]:
    """Caches `num_tokens` of a prompt that another engine computed.

    The sequence waits no more. `num_computed` of the tokens were computed for
    it. Returns it, and the pages to write, see `PageTables.adopt`.
    """
    sequence = self._sequences[id]
    sequence.awaits_pages, sequence.num_adopted = False, num_computed
    self._planned = None
    return sequence, self.tables.adopt(sequence, num_tokens)

  def plan(self) -> scheduler.StepPlan:
    """Plans the next step; planning twice gives the same plan."""
    best_priority = min(
      (each.priority for each in self._sequences.values()), default=0
    )
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

  def decode_steps(self, plan: scheduler.StepPlan, most: int) -> int:
    """Returns how many decode steps may be computed before the next plan.

    There are several only if the next plan would decode the same sequences, and
    the pages that no sequence holds are enough.

    Args:
      plan: the latest plan.
      most: upper bound of the result.
    """
    if not lengths.is_steady(plan, self._running.values()):
      return 1
    if any(each.is_ready for each in self._waiting.values()):
      most = min(most, lengths.STEPS_BEFORE_WAITING)
    sequences = [self._sequences[id] for id in plan.decodes]
    return lengths.decode_steps(sequences, most, self.tables)

  def draft_lengths(
    self, plan: scheduler.StepPlan, wanted: Mapping[Hashable, int]
  ) -> dict[Hashable, int]:
    """Returns how many drafted tokens of each decode may be verified at once.

    None if the plan preempts, or if a token is in flight: a draft continues
    known tokens.

    Args:
      plan: the latest plan.
      wanted: tokens of the draft of each sequence, by its id.
    """
    if not lengths.may_draft(plan, self._running.values()):
      return {}
    found = lengths.drafts(
      {self._sequences[id]: wanted.get(id, 0) for id in plan.decodes},
      {self._sequences[each.id]: each.length for each in plan.prefills},
      self.tables,
    )
    return {each.id: length for each, length in found.items()}

  def begin(
    self,
    plan: scheduler.StepPlan,
    *,
    decode_steps: int = 1,
    drafts: Mapping[Hashable, Sequence[int]] | None = None,
  ) -> spans.Step:
    """Carries out a plan and returns the step for the device.

    From here on, all tokens of the step count as computed. The positions of the
    tokens that it samples count as known.

    Args:
      plan: the latest plan.
      decode_steps: tokens of each decode, as `decode_steps` allows. A sequence
        that reaches its last token earlier gets fewer.
      drafts: tokens that may follow the known ones of each decode, by its id,
        as many as `draft_lengths` allows; the step verifies them. None: it
        verifies nothing.

    Raises:
      ValueError: `plan` is not the latest plan, or a sequence has left since.
    """
    if plan is not self._planned:
      raise ValueError(
        'plan: got one that was made before a sequence or its pages changed,'
        ' expected the latest; call plan() again'
      )
    self._planned = None
    preempted = [self._sequences[id] for id in plan.preempted]
    for sequence in preempted:
      self._vacate(sequence)
    # Before pages are evicted: these sequences count on the pages of their
    # prefix hits, which may be idle.
    seated = [self._sequences[id] for id in plan.admitted]
    for sequence in seated:
      self._seat(sequence)
    decoding = [self._sequences[id] for id in plan.decodes]
    work = lengths.work(decoding, decode_steps, drafts)
    work += [(self._sequences[each.id], each.length) for each in plan.prefills]
    copies = []
    for sequence, length in work:
      copies += self.tables.grow(sequence, length)
    decodes = work[: len(plan.decodes)]
    prefills = work[len(plan.decodes) :]
    step = spans.Step(
      copies=tuple(copies),
      decodes=tuple(
        spans.decode(
          sequence, length, self.limits, (drafts or {}).get(sequence.id, ())
        )
        for sequence, length in decodes
      ),
      chunks=tuple(
        chunk
        for sequence, length in prefills
        for chunk in spans.chunks(sequence, length, self.limits)
      ),
      seated=tuple(seated),
      preempted=tuple(preempted),
      is_verified=drafts is not None,
    )
    for sequence, length in decodes:
      for _ in range(length):
        self._advance(sequence, 1)
    for sequence, length in prefills:
      self._advance(sequence, length)
    self._charge(work)
    self.num_steps += (
      1
      if step.is_verified
      else max((length for _, length in decodes), default=1)
    )
    return step

  def append(self, sequence: page_tables.Sequence, token: int) -> None:
    """Reports the oldest token in flight of a sequence.

    Raises:
      ValueError: the sequence has no token in flight.
    """
    if not sequence.num_in_flight:
      raise ValueError(
        f'sequence {sequence.id!r}: got a token, expected none, since no token'
        ' is in flight; append one token for each span that samples'
      )
    sequence.num_in_flight -= 1
    sequence.tokens.append(token)

  def reject(self, sequence: page_tables.Sequence, num_tokens: int) -> None:
    """Takes back the last tokens in flight: they follow a wrong draft.

    Their pages are released: the step that wrote to them has been read. A plan
    made before is void.
    """
    sequence.num_in_flight -= num_tokens
    if sequence.is_running:  # else its pages are gone already
      sequence.num_computed -= num_tokens
      self.tables.trim(sequence)
      self._refund(sequence, sequence.num_computed)
    self._planned = None

  def end(
    self, sequence: page_tables.Sequence, *, is_sound: bool = True
  ) -> None:
    """Removes a sequence; its tokens in flight are lost.

    Its pages are released at once. The prefix cache keeps full pages of known
    tokens, without the last one: the device computes no token after the end of
    a sequence. A plan made before is void, since it may count on the sequence.

    Args:
      sequence: the sequence that ends, running or waiting.
      is_sound: False if its keys and values are not finite. The prefix cache
        then drops all its pages, also the pages that it shared.
    """
    num_known = len(sequence.tokens)
    self._refund(sequence, num_known)
    sequence.num_computed = min(sequence.num_computed, num_known - 1)
    self._release(sequence, is_sound=is_sound)
    self._disown(sequence)
    sequence.awaits_parent = False  # its parent may still list it as a child
    del self._sequences[sequence.id]
    self._waiting.pop(sequence.id, None)
    self._active[sequence.principal] -= 1
    if not self._active[sequence.principal]:
      del self._active[sequence.principal]
    self._planned = None

  def discard(self, sequence: page_tables.Sequence) -> None:
    """Removes the pages of a sequence that has ended from the prefix cache."""
    self.tables.cache.discard(sequence.scope, sequence.tokens)
    self._planned = None

  def clear(self) -> None:
    """Empties the prefix cache; sequences keep the pages that they hold."""
    self.tables.cache.clear()
    self._planned = None

  def running(self) -> Collection[page_tables.Sequence]:
    """Returns the sequences that have a slot."""
    return self._running.values()

  @property
  def num_waiting(self) -> int:
    """Number of sequences that wait for a slot."""
    return len(self._waiting)

  def num_waiting_of(self, principal: Hashable) -> int:
    """Returns how many sequences of a principal wait for a slot."""
    running = [each.principal for each in self._running.values()]
    return self._active[principal] - running.count(principal)

  def gauges(self) -> gauges_lib.Gauges:
    """Returns the state of the manager."""
    return gauges_lib.of(
      self.tables,
      self._sequences.values(),
      num_running=len(self._running),
      num_waiting=len(self._waiting),
    )

  def check(self) -> None:
    """Asserts the invariants; slow, for tests."""
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
    """Returns the waiting sequences that may enter in the next step.

    The scheduler need not see the whole queue.
    """
    ready = [each for each in self._waiting.values() if each.is_ready]
    num_slots = len(self._free_slots)
    worst = max((each.priority for each in self._running.values()), default=0)
    running = {each.principal for each in self._running.values()}
    if not num_slots and all(
      each.priority >= worst and each.principal in running for each in ready
    ):
      return []  # no slot is free, and no running sequence has to make room
    queue = fairness.in_turn(
      ready,
      served=self.served,
      best_priority=best_priority,
      aging_steps=self.limits.aging_steps,
      running=running,
    )
    return list(itertools.islice(queue, max(num_slots, 1)))

  def _seat(self, sequence: page_tables.Sequence):
    """Gives a slot to a sequence, and the pages of its prefix hit."""
    if not sequence.pages:
      self.tables.take_hit(sequence)
      if sequence.seniority is None and sequence.reads_prefix_cache:
        self.tables.cache.record(
          num_looked_up=len(sequence.tokens), num_found=sequence.num_found
        )
    if sequence.seniority is None:
      sequence.seniority = self._num_seated
      sequence.num_cached = sequence.num_found
      self._num_seated += 1
    sequence.num_charged = max(sequence.num_charged, sequence.num_computed)
    sequence.slot = heapq.heappop(self._free_slots)
    del self._waiting[sequence.id]
    self._running[sequence.id] = sequence

  def _vacate(self, sequence: page_tables.Sequence):
    """Preempts a sequence: it gives its pages back and waits."""
    self._release(sequence)
    self._disown(sequence)
    sequence.num_preemptions += 1
    self._waiting[sequence.id] = sequence

  def _release(self, sequence: page_tables.Sequence, *, is_sound: bool = True):
    """Takes the slot and the pages of a sequence, if it has them."""
    self.tables.release(sequence, is_sound=is_sound)
    if sequence.slot is not None:
      del self._running[sequence.id]
      heapq.heappush(self._free_slots, sequence.slot)
      sequence.slot = None

  def _disown(self, sequence: page_tables.Sequence):
    """Makes the children of a sequence compute the prompt themselves."""
    for child in sequence.children:
      child.awaits_parent = False
    sequence.children.clear()

  def _fork(self, sequence: page_tables.Sequence):
    """Shares the computed prompt of a sequence with its children."""
    for child in sequence.children:
      if child.awaits_parent:  # else it has ended
        self.tables.fork(sequence, child)
        self._planned = None  # the parent may have to copy a page now
    self._disown(sequence)

  def _advance(self, sequence: page_tables.Sequence, length: int):
    """Counts `length` tokens as computed, and a sampled token as known."""
    was_prompt = sequence.num_computed < sequence.num_prompt
    sequence.num_computed += length
    if not sequence.num_remaining:
      sequence.num_in_flight += 1
    if was_prompt and sequence.num_computed >= sequence.num_prompt:
      # The prefix cache gets the pages now, not at the end of the sequence:
      # requests with the same prompt often arrive together.
      self.tables.insert(sequence)
      self._fork(sequence)

  def _charge(self, work: list[tuple[page_tables.Sequence, int]]):
    """Charges each principal for tokens that are computed for the first time.

    Tokens computed again after a preemption, and tokens found in the prefix
    cache, are free.
    """
    for sequence, _ in work:
      new = max(sequence.num_computed - sequence.num_charged, 0)
      sequence.num_charged += new
      served = self.served.get(sequence.principal, 0)
      self.served[sequence.principal] = served + new / sequence.weight

  def _refund(self, sequence: page_tables.Sequence, num_tokens: int):
    """Gives back the charge for tokens that were to follow the first ones."""
    unused = sequence.num_charged - num_tokens
    if unused > 0:
      sequence.num_charged -= unused
      self.served[sequence.principal] -= unused / sequence.weight
