"""A sequence in the books of the engine, and what is done with its pages.

`roster` says who runs; here is how a sequence finds, gets, shares and loses the
pages that hold its keys and values. Pages are never moved and only ever written
by one owner: whoever is to write to a page that is somebody else's too writes
to a copy of its own.
"""

from collections.abc import Hashable, Iterable
import dataclasses

from inference.scheduling import pages as pages_lib, prefix_cache, scheduler


@dataclasses.dataclass(eq=False, kw_only=True, slots=True)
class Sequence:
  """A sequence from submission to its end; who waits has no slot."""

  id: Hashable
  tokens: list[int]  # the prompt, and what has been sampled
  num_prompt: int
  max_known: int  # tokens of prompt and completion, at most
  principal: Hashable
  priority: int
  scope: Hashable
  reads_prefix_cache: bool
  arrival: int
  submitted: int  # the step
  awaits_parent: bool = False
  children: list['Sequence'] = dataclasses.field(default_factory=list)
  slot: int | None = None
  pages: tuple[int, ...] = ()  # as many as hold what is computed
  num_computed: int = 0
  num_in_flight: int = 0  # tokens sampled, or about to be, ids unknown
  waited_steps: int = 0
  seniority: int | None = None  # order of first admission
  num_charged: int = 0  # tokens that its principal has been charged for
  num_cached: int = 0  # found computed at its first admission
  num_preemptions: int = 0
  # The last lookup, and the version of the cache that it is true of.
  hit: tuple[int, ...] = ()
  hit_version: int = -1

  @property
  def num_known(self) -> int:
    """Tokens whose place is known; the ids of some may be in flight."""
    return len(self.tokens) + self.num_in_flight

  @property
  def num_remaining(self) -> int:
    """Tokens known and not computed."""
    return self.num_known - self.num_computed

  @property
  def is_running(self) -> bool:
    """Whether it has a slot."""
    return self.slot is not None

  @property
  def is_ready(self) -> bool:
    """Whether a step may compute something for it.

    A running one may have a token in flight: the device has it. A waiting one
    may not, and neither may its parent be about to compute its prompt.
    """
    if self.num_known >= self.max_known:
      return False
    return self.is_running or not (self.num_in_flight or self.awaits_parent)


class PageTables:
  """The pages of all sequences: allocator and prefix cache in one hand."""

  def __init__(self, *, num_pages: int, page_size: int):
    self.page_size = page_size
    self.allocator = pages_lib.PageAllocator(num_pages)
    self.cache = prefix_cache.PrefixCache(self.allocator, page_size)

  def num_pages(self, num_tokens: int) -> int:
    """Returns how many pages hold so many tokens."""
    return -(-num_tokens // self.page_size)

  def hit(self, sequence: Sequence) -> tuple[int, ...]:
    """Returns the pages that the cache knows of a sequence without pages.

    The last known token is never among what they hold: it has to be computed,
    to sample what follows.
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
    """Lets a sequence without pages start from its last hit.

    That of the plan: those who were preempted since may have left more.
    """
    sequence.pages = sequence.hit
    self.allocator.share(sequence.pages)
    sequence.num_computed = len(sequence.pages) * self.page_size

  def copied(self, sequence: Sequence) -> int | None:
    """Returns the page that has to be copied before the sequence writes.

    Only the page that it continues can be: whole pages are not written again.
    Those that it shares in the middle of a page come from `fork`.
    """
    index, offset = divmod(sequence.num_computed, self.page_size)
    if not offset or self.allocator.is_exclusive(sequence.pages[index]):
      return None
    return sequence.pages[index]

  def task(self, sequence: Sequence) -> scheduler.Task:
    """Returns what the planner may know of a sequence."""
    hit, num_computed = (), sequence.num_computed
    if not sequence.is_running and not sequence.pages:
      hit = self.hit(sequence)
      num_computed = len(hit) * self.page_size
    copied = self.copied(sequence)
    return scheduler.Task(
      id=sequence.id,
      principal=sequence.principal,
      priority=sequence.priority,
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
    )

  def grow(self, sequence: Sequence, length: int) -> list[tuple[int, int]]:
    """Gets the pages to compute `length` more tokens.

    Returns:
      Pages to copy, (source, destination): one or none.

    Raises:
      OutOfPages: neither free nor idle ones are left.
    """
    copies = []
    source = self.copied(sequence)
    if source is not None:
      (destination,) = self._allocate(1)
      copies.append((source, destination))
      # Whoever gets the source may write to it in the same step: that is after
      # all copies.
      self.allocator.release([source])
      sequence.pages = (*sequence.pages[:-1], destination)
    num_pages = self.num_pages(sequence.num_computed + length)
    if missing := num_pages - len(sequence.pages):
      sequence.pages += tuple(self._allocate(missing))
    return copies

  def fork(self, source: Sequence, child: Sequence):
    """Lets `child` share the prompt of `source`, which has been computed.

    All but the last token: what follows that one is sampled by each on its own.
    A page that would hold only that token is not shared.
    """
    child.num_computed = child.num_charged = source.num_prompt - 1
    child.pages = source.pages[: self.num_pages(child.num_computed)]
    self.allocator.share(child.pages)

  def insert(self, sequence: Sequence):
    """Offers what is computed of a sequence to the prefix cache.

    Only positions whose ids are known. Their keys and values need not be there
    yet: the step that computes them has been dispatched, and whoever finds the
    page reads it in a later one.
    """
    num_tokens = min(sequence.num_computed, len(sequence.tokens))
    self.cache.insert(
      sequence.scope, sequence.tokens[:num_tokens], sequence.pages
    )

  def release(self, sequence: Sequence):
    """Takes all pages from a sequence; the cache keeps the full ones."""
    self.insert(sequence)
    self.allocator.release(sequence.pages)
    sequence.pages = ()
    sequence.num_computed = 0
    sequence.hit_version = -1  # it knows more tokens than when it last waited

  def num_tokens_held(self, sequences: Iterable[Sequence]) -> int:
    """Returns how many tokens the used pages hold, shared ones once."""
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
    """Asserts what always holds; for tests, it looks at every page."""
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
