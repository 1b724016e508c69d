"""The allocator of the pages of the KV cache: owners, not contents.

The device keeps keys and values in pages of a fixed number of tokens
(`models/kv_cache.py`). Sequences hold a page by references, and the prefix
cache keeps a page by a mark. A page without references and mark is free. A page
with a mark and without references is idle: it still holds keys and values,
until another sequence needs the room (Kwon et al., arXiv:2309.06180, section
4).
"""

from collections.abc import Iterable, Sequence

from checks import expect

# Padding writes to this page, and the unused end of a page table points to it.
# No sequence owns it, and its contents are never used.
NULL_PAGE = 0


class OutOfPages(RuntimeError):
  """A request for more pages than are free or idle."""


class PageAllocator:
  """Hands out the pages 1 to `num_pages - 1`, and counts references to them.

  Every operation takes constant time per page. Idle pages are kept in the order
  in which they became idle. `release` goes from the last page to the first. So,
  as long as pages are given in the order of their positions, a page becomes
  idle after all pages that continue it, and no page continues the oldest idle
  page (see `prefix_cache`).
  """

  def __init__(self, num_pages: int):
    expect.at_least('num_pages', num_pages, 2, 'one of them is the null page')
    self.num_usable = num_pages - 1
    self._num_references = [0] * num_pages
    self._is_cached = [False] * num_pages
    # A stack. Pages released last are taken first, since they may still be in a
    # hardware cache; unused pages follow, lowest first.
    self._free = list(range(num_pages - 1, NULL_PAGE, -1))
    self._idle: dict[int, None] = {}

  @property
  def num_free(self) -> int:
    """Pages without references and mark."""
    return len(self._free)

  @property
  def num_idle(self) -> int:
    """Pages that only the prefix cache keeps; eviction frees them."""
    return len(self._idle)

  @property
  def num_used(self) -> int:
    """Pages that at least one sequence references."""
    return self.num_usable - len(self._free) - len(self._idle)

  @property
  def oldest_idle(self) -> int | None:
    """The page that became idle first; None if none is."""
    return next(iter(self._idle), None)

  def ref_count(self, page: int) -> int:
    """Returns how many sequences reference `page`."""
    return self._num_references[page]

  def is_cached(self, page: int) -> bool:
    """Returns whether the prefix cache keeps `page`."""
    return self._is_cached[page]

  def is_exclusive(self, page: int) -> bool:
    """Returns whether the only holder of `page` may write to it.

    It may not write to a page that the prefix cache keeps: the next sequence
    that finds the page would read the change.
    """
    return self._num_references[page] == 1 and not self._is_cached[page]

  def allocate(self, num_pages: int) -> list[int]:
    """Returns free pages with one reference each.

    Raises:
      OutOfPages: fewer pages are free; idle pages are not taken.
    """
    if num_pages > len(self._free):
      raise OutOfPages(
        f'pages: got a request for {num_pages}, expected at most the'
        f' {len(self._free)} free of {self.num_usable}; evict some of the'
        f' {len(self._idle)} idle ones, or preempt a sequence'
      )
    pages = [self._free.pop() for _ in range(num_pages)]
    for page in pages:
      self._num_references[page] = 1
    return pages

  def share(self, pages: Iterable[int]):
    """Adds a reference to each page; none may be free.

    Raises:
      ValueError: a page is free, so that its contents are undefined.
    """
    for page in pages:
      if not self._num_references[page] and page not in self._idle:
        raise ValueError(
          f'page {page}: got a free page to share, expected one that is'
          ' referenced or cached; allocate it'
        )
      self._idle.pop(page, None)
      self._num_references[page] += 1

  def release(self, pages: Sequence[int]):
    """Removes one reference from each page, from the last to the first.

    Raises:
      ValueError: a page is not referenced.
    """
    for page in reversed(pages):
      if not self._num_references[page]:
        raise ValueError(
          f'page {page}: got a page without references to release, expected'
          ' one with references; release a page once per reference'
        )
      self._num_references[page] -= 1
      if self._num_references[page]:
        continue
      if self._is_cached[page]:
        self._idle[page] = None
      else:
        self._free.append(page)

  def mark_cached(self, page: int):
    """Marks `page` as kept by the prefix cache after its last reference.

    Raises:
      ValueError: the page has no references, or has a mark already.
    """
    if not self._num_references[page] or self._is_cached[page]:
      raise ValueError(
        f'page {page}: got {self._num_references[page]} references, cached:'
        f' {self._is_cached[page]}, expected a page that is referenced and not'
        ' cached; cache a page once, while a sequence holds it'
      )
    self._is_cached[page] = True

  def unmark_cached(self, page: int):
    """Removes the mark of `page`: an idle page becomes free.

    Raises:
      ValueError: the page has no mark.
    """
    if not self._is_cached[page]:
      raise ValueError(
        f'page {page}: got a page that is not cached, expected one that is;'
        ' unmark it once'
      )
    self._is_cached[page] = False
    if not self._num_references[page]:
      del self._idle[page]
      self._free.append(page)

  def check(self):
    """Asserts the invariants of every page; slow, for tests."""
    free = set(self._free)
    assert len(free) == len(self._free), 'a page is free twice'
    assert NULL_PAGE not in free, 'the null page is free'
    assert NULL_PAGE not in self._idle, 'the null page is idle'
    assert not self._num_references[NULL_PAGE], 'the null page is held'
    assert not self._is_cached[NULL_PAGE], 'the null page is cached'
    num_used = 0
    for page in range(NULL_PAGE + 1, self.num_usable + 1):
      count, is_cached = self._num_references[page], self._is_cached[page]
      assert count >= 0, f'page {page}: {count} references'
      assert (page in free) == (not count and not is_cached), f'page {page}'
      assert (page in self._idle) == (not count and is_cached), f'page {page}'
      num_used += bool(count)
    assert num_used == self.num_used, (num_used, self.num_used)
