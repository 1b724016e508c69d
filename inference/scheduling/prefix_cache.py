"""The prefix cache: pages of prompts and completions, found by their tokens.

It is a radix tree (Zheng et al., arXiv:2312.07104, section 3) whose edges are
whole pages of tokens. A node is a page of the KV cache. The path to it holds
the tokens that its keys and values were computed from. Each scope has its own
tree: sequences that may not share (other weights, another principal) have no
path in common. So a prompt is never found, and never takes less time, because
of a prompt of another scope.

The cache holds no references: it marks pages in the allocator, which knows the
idle pages and the order in which they became idle.
"""

from collections.abc import Hashable, Iterable, Sequence

from checks import expect
from inference.scheduling import pages as pages_lib


class _Node:
  """A cached page; its parent is the page that it continues."""

  __slots__ = ('children', 'key', 'page', 'parent')

  def __init__(self, page: int, key: Hashable, parent: '_Node | None'):
    self.page = page
    self.key = key  # the tokens of the page; of a root, the scope
    self.parent = parent
    # Keyed by the tokens, not by a hash of them: a collision of hashes must not
    # find a page of other tokens.
    self.children: dict[tuple[int, ...], _Node] = {}


class PrefixCache:
  """The cached pages of each scope, by their tokens.

  Two invariants make eviction cheap. First, a sequence that holds a page of the
  tree holds all pages above it: `lookup` returns whole paths, and `insert`
  stops at a page of another sequence. So all pages below an idle page are idle.
  Second, they became idle earlier, because a sequence releases its last page
  first. Therefore the oldest idle page is always a leaf, and eviction in this
  order evicts the least recently used page at constant cost.
  """

  def __init__(self, allocator: pages_lib.PageAllocator, page_size: int):
    expect.at_least('page_size', page_size, 1)
    self._allocator = allocator
    self._page_size = page_size
    self._roots: dict[Hashable, _Node] = {}
    self._nodes: dict[int, _Node] = {}
    # Increases whenever a lookup may give another result than before.
    self.version = 0
    self.num_tokens_looked_up = 0
    self.num_tokens_found = 0

  def __len__(self) -> int:
    return len(self._nodes)

  def lookup(self, scope: Hashable, tokens: Sequence[int]) -> list[int]:
    """Returns the pages of the longest cached prefix of `tokens`.

    Whole pages only. The caller must `share` the pages before any eviction, and
    `record` the lookup: this method takes no references and counts nothing.
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
    """Returns how many of `pages` have no references."""
    return sum(not self._allocator.ref_count(page) for page in pages)

  def record(self, *, num_looked_up: int, num_found: int):
    """Counts the tokens of a lookup that was used, for the hit rate."""
    self.num_tokens_looked_up += num_looked_up
    self.num_tokens_found += num_found

  def insert(
    self, scope: Hashable, tokens: Sequence[int], pages: Sequence[int]
  ) -> int:
    """Caches the full pages of a sequence.

    Stops at the first page whose tokens are cached from another sequence. The
    sequence does not hold that page, so its own pages must not go below it: see
    the first invariant.

    Args:
      scope: sequences of this scope find the pages.
      tokens: the tokens that the keys and values were computed from. A last
        page that they do not fill is not cached.
      pages: the pages of the sequence from its beginning; it references them.

    Returns:
      The number of newly cached pages.
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
    """Frees the least recently used idle pages, of any scope.

    Raises:
      OutOfPages: fewer pages are idle; none is evicted.
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
    """Removes all pages of a scope; sequences keep the pages that they hold."""
    root = self._roots.get(scope)
    self._forget(list(root.children.values()) if root else [])

  def discard(self, scope: Hashable, tokens: Sequence[int]):
    """Removes the pages of a sequence, and all pages that continue them.

    The first page decides: keys and values of a page depend on all pages before
    it.
    """
    root = self._roots.get(scope)
    first = root and root.children.get(tuple(tokens[: self._page_size]))
    self._forget([first] if first else [])

  def _forget(self, stack: list[_Node]):
    """Removes nodes, and all nodes below them."""
    below: list[_Node] = []
    while stack:
      node = stack.pop()
      below.append(node)
      stack.extend(node.children.values())
    for node in reversed(below):  # leaves first
      self._drop(node)
    self.version += 1

  def clear(self):
    """Removes all pages of all scopes."""
    for scope in list(self._roots):
      self.forget(scope)

  def _drop(self, node: _Node):
    """Removes a leaf from its tree, and the tree if it is empty."""
    parent = node.parent
    assert parent is not None
    assert not node.children, f'page {node.page} is continued by others'
    del parent.children[node.key]  # type: ignore[arg-type]
    del self._nodes[node.page]
    self._allocator.unmark_cached(node.page)
    if parent.parent is None and not parent.children:
      del self._roots[parent.key]

  def check(self):
    """Asserts the invariants of every node; slow, for tests."""
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
