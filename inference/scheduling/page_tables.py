"""A sequence as the SequenceManager sees it, and the pages of all sequences.

PageTables says how a sequence finds, gets, shares and loses the pages that hold
its keys and values. A page never moves, and has one writer at a time: before a
sequence writes to a page that it shares, it gets a copy.
"""

from collections.abc import Hashable, Iterable
import dataclasses

from inference.scheduling import pages as pages_lib, prefix_cache, scheduler


@dataclasses.dataclass(eq=False, kw_only=True, slots=True)
class Sequence:
  """A sequence from submission to its end; without a slot, it waits."""

  id: Hashable
  tokens: list[int]  # prompt and completion; tokens in flight are missing
  num_prompt: int
  max_known: int  # tokens of prompt and completion, at most
  principal: Hashable
  priority: int
  scope: Hashable
  reads_prefix_cache: bool
  arrival: int  # order of submission
  submitted: int  # number of the step
  in_chunks: bool = False  # whether the last prompt token takes a chunk, too
  awaits_parent: bool = False
  awaits_pages: bool = False  # of another engine, which computes the prompt
  num_adopted: int = 0  # prompt tokens that it computed for this sequence
  children: list['Sequence'] = dataclasses.field(default_factory=list)
  slot: int | None = None
  pages: tuple[int, ...] = ()  # the pages of its computed tokens
  num_computed: int = 0  # tokens whose keys and values are in the pages
  num_in_flight: int = 0  # tokens that a dispatched step samples
  waited_steps: int = 0
  seniority: int | None = None  # order of first admission
  num_charged: int = 0  # tokens that its principal has been charged for
  num_cached: int = 0  # prompt tokens found computed at first admission
  num_preemptions: int = 0
  # Pages of the last lookup, and the version of the cache at that time.
  hit: tuple[int, ...] = ()
  hit_version: int = -1
  weight: float = 1.0  # of the principal, in fairness

  @property
  def num_known(self) -> int:
    """Tokens whose position is known; the ids of some may be in flight."""
    return len(self.tokens) + self.num_in_flight

  @property
  def num_remaining(self) -> int:
    """Known tokens that are not computed."""
    return self.num_known - self.num_computed

  @property
  def num_found(self) -> int:
    """Computed tokens that were not computed for this sequence."""
    return max(self.num_computed - self.num_adopted, 0)

  @property
  def num_unsampled(self) -> int:
    """Tokens that may still be sampled, without the tokens in flight."""
    return self.max_known - self.num_known

  @property
  def is_running(self) -> bool:
    """Whether it has a slot."""
    return self.slot is not None

  @property
  def is_ready(self) -> bool:
    """Whether a step may compute tokens of the sequence.

    A running sequence may have a token in flight, since the device has it. A
    waiting sequence may not: its token is lost with the slot. It also waits
    while its parent or another engine computes the prompt.
    """
    if self.num_known >= self.max_known:
      return False
    return self.is_running or not (
      self.num_in_flight or self.awaits_parent or self.awaits_pages
    )


class PageTables:
  """The pages of all sequences: the allocator and the prefix cache."""

  def __init__(self, *, num_pages: int, page_size: int):
    self.page_size = page_size
    self.allocator = pages_lib.PageAllocator(num_pages)
    self.cache = prefix_cache.PrefixCache(self.allocator, page_size)

  def num_pages(self, num_tokens: int) -> int:
    """Returns the number of pages that hold `num_tokens` tokens."""
    return -(-num_tokens // self.page_size)

  def hit(self, sequence: Sequence) -> tuple[int, ...]:
    """Returns the cached pages of a sequence that holds no pages.

    They never hold the last known token: it has to be computed, because the
    next token is sampled from its logits.
    """
    if not sequence.reads_prefix_cache:
      return ()
    if sequence.hit_version != self.cache.version:
      most = (len(sequence.tokens) - 1) // self.page_size * self.page_size
      sequence.hit = tuple(
        self.cache.lookup(sequence.scope, sequence.tokens[:most])
      )
      sequence.hit_version = self.cache.version
    return sequence.hit

  def take_hit(self, sequence: Sequence):
    """Gives a sequence without pages the pages of its last lookup.

    The plan counted on that lookup. A new lookup could find more, since
    sequences preempted by the plan may have left pages to the cache.
    """
    sequence.pages = sequence.hit
    self.allocator.share(sequence.pages)
    sequence.num_computed = len(sequence.pages) * self.page_size

  def adopt(self, sequence: Sequence, num_tokens: int) -> list[int | None]:
    """Caches pages of a waiting sequence that another engine has computed.

    As many as there is room for, from the first one on; no running sequence
    loses a page.

    Returns:
      The page of each; None if it was cached already, or does not fit.
    """
    tokens = sequence.tokens[:num_tokens]
    found = self.cache.lookup(sequence.scope, tokens)
    self.allocator.share(found)
    num_new = min(
      len(tokens) // self.page_size - len(found),
      self.allocator.num_free + self.allocator.num_idle,
    )
    new = self._allocate(num_new)
    num_held = (len(found) + num_new) * self.page_size
    self.cache.insert(sequence.scope, tokens[:num_held], [*found, *new])
    self.allocator.release([*found, *new])
    return [*[None] * len(found), *new]

  def copied(self, sequence: Sequence) -> int | None:
    """Returns the page to copy before the sequence writes; None: no page.

    Only a page that is partly filled can be shared and written to. Such pages
    come from `fork`: the prefix cache shares full pages only.
    """
    index, offset = divmod(sequence.num_computed, self.page_size)
    if not offset or self.allocator.is_exclusive(sequence.pages[index]):
      return None
    return sequence.pages[index]

  def task(self, sequence: Sequence) -> scheduler.Task:
    """Returns the counts of a sequence that the scheduler reads."""
    hit, num_computed = (), sequence.num_computed
    if not sequence.is_running and not sequence.pages:
      hit = self.hit(sequence)
      num_computed = len(hit) * self.page_size
    copied = self.copied(sequence)
    return scheduler.Task(
      id=sequence.id,
      principal=sequence.principal,
      priority=sequence.priority,
      weight=sequence.weight,
      arrival=sequence.arrival,
      waited_steps=sequence.waited_steps,
      seniority=sequence.seniority or 0,
      num_known=sequence.num_known,
      max_known=sequence.max_known,
      num_computed=num_computed,
      pages=sequence.pages,
      num_hit_pages=len(hit),
      num_idle_hit_pages=self.cache.num_idle(hit),
      num_copies=int(copied is not None),
      is_tail_cached=copied is not None and self.allocator.is_cached(copied),
      is_running=sequence.is_running,
      is_ready=sequence.is_ready,
      needs_chunk=sequence.in_chunks and num_computed < sequence.num_prompt,
    )

  def num_missing(self, sequence: Sequence, length: int) -> int:
    """Returns how many pages `grow` would allocate."""
    num_pages = self.num_pages(sequence.num_computed + length)
    copied = self.copied(sequence) is not None
    return num_pages - len(sequence.pages) + copied

  def grow(self, sequence: Sequence, length: int) -> list[tuple[int, int]]:
    """Allocates the pages for `length` more tokens.

    Returns:
      Pages to copy, (source, destination): one or none.

    Raises:
      OutOfPages: too few pages are free or idle.
    """
    copies = []
    source = self.copied(sequence)
    if source is not None:
      (destination,) = self._allocate(1)
      copies.append((source, destination))
      # The next owner of the source may write to it in the same step: copies
      # come before all writes.
      self.allocator.release([source])
      sequence.pages = (*sequence.pages[:-1], destination)
    num_pages = self.num_pages(sequence.num_computed + length)
    if missing := num_pages - len(sequence.pages):
      sequence.pages += tuple(self._allocate(missing))
    return copies

  def trim(self, sequence: Sequence):
    """Releases the pages behind the computed tokens of a sequence."""
    num_pages = self.num_pages(sequence.num_computed)
    self.allocator.release(sequence.pages[num_pages:])
    sequence.pages = sequence.pages[:num_pages]

  def fork(self, source: Sequence, child: Sequence):
    """Shares the computed prompt of `source` with `child`.

    The child computes the last prompt token itself, to sample its own first
    token. A page that holds only the last token is not shared.
    """
    child.num_computed = child.num_charged = source.num_prompt - 1
    child.pages = source.pages[: self.num_pages(child.num_computed)]
    self.allocator.share(child.pages)

  def insert(self, sequence: Sequence):
    """Offers the full pages of a sequence to the prefix cache.

    Only pages of known token ids are offered. A dispatched step may still
    compute their keys and values: a sequence that finds the page reads it in a
    later step.
    """
    num_tokens = min(sequence.num_computed, len(sequence.tokens))
    self.cache.insert(
      sequence.scope, sequence.tokens[:num_tokens], sequence.pages
    )

  def release(self, sequence: Sequence, *, is_sound: bool = True):
    """Takes all pages of a sequence; the cache keeps the full ones.

    If the pages are not sound (not finite), the cache keeps none of them, and
    drops the pages that continue them.
    """
    if is_sound:
      self.insert(sequence)
    else:
      self.cache.discard(sequence.scope, sequence.tokens)
    self.allocator.release(sequence.pages)
    sequence.pages = ()
    sequence.num_computed = 0
    sequence.hit_version = -1  # it has more tokens than at its last lookup

  def num_tokens_held(self, sequences: Iterable[Sequence]) -> int:
    """Returns the tokens in used pages; a shared page counts once."""
    full: set[int] = set()
    last: dict[int, int] = {}
    for sequence in sequences:
      if sequence.pages:
        *before, page = sequence.pages
        full.update(before)
        held = sequence.num_computed - len(before) * self.page_size
        last[page] = max(held, last.get(page, 0))
    return len(full) * self.page_size + sum(
      held for page, held in last.items() if page not in full
    )

  def check(self, sequences: Iterable[Sequence]):
    """Asserts the invariants of every page; slow, for tests."""
    self.allocator.check()
    self.cache.check()
    holders: dict[int, list[tuple[int, Sequence]]] = {}
    for each in sequences:
      assert len(each.pages) == self.num_pages(each.num_computed), each
      for index, page in enumerate(each.pages):
        holders.setdefault(page, []).append((index, each))
    for page in range(self.allocator.num_usable + 1):
      held = holders.get(page, [])
      assert self.allocator.ref_count(page) == len(held), (page, held)
      # A page that is shared holds the same tokens of the same scope for all.
      for index, each in held[1:]:
        first_index, first = held[0]
        assert (index, each.scope) == (first_index, first.scope), (each, first)
        stop = min(
          (index + 1) * self.page_size, each.num_computed, first.num_computed
        )
        assert each.tokens[:stop] == first.tokens[:stop], (each, first)

  def _allocate(self, num_pages: int) -> list[int]:
    short = num_pages - self.allocator.num_free
    if short > 0:
      self.cache.evict(short)
    return self.allocator.allocate(num_pages)
