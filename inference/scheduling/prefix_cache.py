"""Remembers the pages of prompts and completions, to compute a prefix once.

A radix tree (Zheng et al., arXiv:2312.07104, section 3) whose edges are whole
pages of tokens: a node is a page of the KV cache, the way to it the tokens that
its keys and values were computed from. One tree per scope: what may not be
shared (other weights, another principal) has no path in common, so that nothing
is found, and nothing takes less time, because of somebody else's prompt.

The cache takes no references: it marks pages in the allocator, which says when
they are idle and in which order they became so.
"""

from collections.abc import Hashable, Iterable, Sequence

from inference.scheduling import pages as pages_lib


class _Node:
  """A page that is kept, below the page that it continues."""

  __slots__ = ('children', 'key', 'page', 'parent')

  def __init__(self, page: int, key: Hashable, parent: '_Node | None'):
    self.page = page
    self.key = key  # its tokens; of a root, the scope
    self.parent = parent
    # Keyed by the tokens themselves: a dict compares them after their hash, so
    # that a collision is a miss and never somebody else's page.
    self.children: dict[tuple[int, ...], _Node] = {}


class PrefixCache:
  """Which page holds which tokens, per scope.

  Two promises hold at any time. Whoever holds a page of the tree holds all
  pages above it: `lookup` returns whole paths, and `insert` stops at a page
  that is not the sequence's own. So an idle page has only idle pages below it.
  And these became idle before it did, since a sequence releases its last page
  first. The oldest idle page is therefore always a leaf: taking pages in that
  order is least recently used first, at constant cost.
  """

  def __init__(self, allocator: pages_lib.PageAllocator, page_size: int):
    if page_size < 1:
      raise ValueError(
        f'page_size: got {page_size}, expected at least 1 token to a page'
      )
    self._allocator = allocator
    self._page_size = page_size
    self._roots: dict[Hashable, _Node] = {}
    self._nodes: dict[int, _Node] = {}
    # Goes up whenever a lookup may find something else than before.
    self.version = 0
    self.num_tokens_looked_up = 0
    self.num_tokens_found = 0

  def __len__(self) -> int:
    return len(self._nodes)

  def lookup(self, scope: Hashable, tokens: Sequence[int]) -> list[int]:
    """Returns the pages of the longest known beginning of `tokens`.

    Whole pages only. Takes no reference and counts for nothing: `share` what
    is used before anything is evicted, and `record` it.
    """
    found: list[int] = []
    node = self._roots.get(scope)
    size = self._page_size
    for start in range(0, len(tokens) - size + 1, size):
      if node is None:
        break
      node = node.children.get(tuple(tokens[start : start + size]))
      if node is not None:
        found.append(node.page)
    return found

  def num_idle(self, pages: Iterable[int]) -> int:
    """Returns how many of `pages` no sequence references."""
    return sum(not self._allocator.ref_count(page) for page in pages)

  def record(self, *, num_looked_up: int, num_found: int):
    """Counts a lookup that was used, in tokens, for the hit rate."""
    self.num_tokens_looked_up += num_looked_up
    self.num_tokens_found += num_found

  def insert(
    self, scope: Hashable, tokens: Sequence[int], pages: Sequence[int]
  ) -> int:
    """Keeps the pages of a sequence that hold whole pages of `tokens`.

    Stops at the first page of tokens that another sequence has put there
    before: to hang one's own pages below a page that one does not hold would
    break the promise above.

    Args:
      scope: Who may find the pages again.
      tokens: What the keys and values were computed from; a last page that
        they do not fill is left out.
      pages: The pages of the sequence from its beginning, referenced by it.

    Returns:
      How many pages are newly kept.
    """
    size = self._page_size
    num_pages = min(len(tokens) // size, len(pages))
    if not num_pages:
      return 0
    root = self._roots.get(scope)
    node = _Node(pages_lib.NULL_PAGE, scope, None) if root is None else root
    self._roots[scope] = node
    num_new = 0
    for index in range(num_pages):
      key = tuple(tokens[index * size : (index + 1) * size])
      child = node.children.get(key)
      if child is None:
        child = _Node(pages[index], key, node)
        self._allocator.mark_cached(child.page)
        node.children[key] = self._nodes[child.page] = child
        num_new += 1
      elif child.page != pages[index]:
        break
      node = child
    self.version += bool(num_new)
    return num_new

  def evict(self, num_pages: int):
    """Frees the idle pages that were used least recently, of any scope.

    Raises:
      OutOfPages: fewer are idle; nothing is evicted.
    """
    if num_pages > self._allocator.num_idle:
      raise pages_lib.OutOfPages(
        f'pages: got a request to evict {num_pages}, expected at most the'
        f' {self._allocator.num_idle} idle ones; preempt a sequence'
      )
    for _ in range(num_pages):
      page = self._allocator.oldest_idle
      assert page is not None
      self._drop(self._nodes[page])
      self.version += 1

  def forget(self, scope: Hashable):
    """Lets go of all pages of a scope; sequences keep those that they hold."""
    root = self._roots.get(scope)
    stack = list(root.children.values()) if root else []
    below: list[_Node] = []
    while stack:
      node = stack.pop()
      below.append(node)
      stack.extend(node.children.values())
    for node in reversed(below):  # a node comes after all nodes above it
      self._drop(node)
    self.version += 1

  def clear(self):
    """Lets go of all pages of all scopes."""
    for scope in list(self._roots):
      self.forget(scope)

  def _drop(self, node: _Node):
    """Takes a leaf out of its tree, and an empty tree out of the forest."""
    parent = node.parent
    assert parent is not None
    assert not node.children, f'page {node.page} is continued by others'
    del parent.children[node.key]  # type: ignore[arg-type]
    del self._nodes[node.page]
    self._allocator.unmark_cached(node.page)
    if parent.parent is None and not parent.children:
      del self._roots[parent.key]

  def check(self):
    """Asserts what always holds; for tests, it looks at every node."""
    seen: dict[int, _Node] = {}
    stack = list(self._roots.values())
    assert all(root.children for root in stack), 'an empty scope is kept'
    while stack:
      node = stack.pop()
      for key, child in node.children.items():
        assert child.parent is node
        assert child.key == key
        assert len(key) == self._page_size
        assert child.page not in seen, f'page {child.page} is in two places'
        seen[child.page] = child
        assert self._allocator.is_cached(child.page)
        if node.parent is not None:
          count = self._allocator.ref_count
          assert count(node.page) >= count(child.page), (
            f'page {child.page} is held more often than {node.page} above it'
          )
        stack.append(child)
    assert seen == self._nodes
    for page in range(1, self._allocator.num_usable + 1):
      assert self._allocator.is_cached(page) == (page in seen), f'page {page}'
