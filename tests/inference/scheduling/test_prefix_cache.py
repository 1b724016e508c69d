"""The prefix cache: whole pages, exact tokens, scopes, eviction order."""

import random

import pytest

from inference.scheduling import pages as pages_lib, prefix_cache

SIZE = 2


def _cache(num_pages=32):
  allocator = pages_lib.PageAllocator(num_pages)
  return allocator, prefix_cache.PrefixCache(allocator, SIZE)


def _compute(cache, allocator, scope, tokens):
  """Runs a sequence from submission to end; returns its pages."""
  found = cache.lookup(scope, tokens)
  allocator.share(found)
  missing = -(-len(tokens) // SIZE) - len(found)
  short = missing - allocator.num_free
  if short > 0:
    cache.evict(short)
  pages = found + allocator.allocate(missing)
  cache.insert(scope, tokens, pages)
  allocator.release(pages)
  return pages


def test_the_longest_run_of_whole_pages_is_found():
  allocator, cache = _cache()
  pages = _compute(cache, allocator, 'a', [1, 2, 3, 4, 5])
  assert cache.lookup('a', [1, 2, 3, 4, 5, 6]) == pages[:2]
  assert cache.lookup('a', [1, 2, 3, 9]) == pages[:1]
  assert cache.lookup('a', [1, 2, 3]) == pages[:1]
  assert cache.lookup('a', [1]) == []
  assert cache.lookup('a', [2, 1]) == []
  assert cache.lookup('a', [3, 4]) == []  # not from the beginning
  cache.check()


def test_a_page_that_is_not_full_is_not_kept():
  allocator, cache = _cache()
  _compute(cache, allocator, 'a', [1, 2, 3])
  assert (len(cache), allocator.num_idle) == (1, 1)
  _compute(cache, allocator, 'a', [7])
  assert len(cache) == 1
  cache.check()


def test_scopes_have_nothing_in_common():
  allocator, cache = _cache()
  pages = _compute(cache, allocator, ('digest', 'ann'), [1, 2, 3, 4])
  assert cache.lookup(('digest', 'bob'), [1, 2, 3, 4]) == []
  assert cache.lookup(('other', 'ann'), [1, 2, 3, 4]) == []
  others = _compute(cache, allocator, ('digest', 'bob'), [1, 2, 3, 4])
  assert not set(pages) & set(others)
  cache.check()


def test_prompts_with_a_common_beginning_share_it():
  allocator, cache = _cache()
  first = _compute(cache, allocator, 'a', [1, 2, 3, 4])
  second = _compute(cache, allocator, 'a', [1, 2, 5, 6])
  assert first[0] == second[0]
  assert first[1] != second[1]
  assert len(cache) == 3
  cache.check()


def test_tokens_of_equal_hash_are_not_equal():
  # Python hashes integers modulo this prime.
  twin = 2**61 - 1
  assert hash((0, 1)) == hash((twin, 1))
  allocator, cache = _cache()
  pages = _compute(cache, allocator, 'a', [0, 1])
  assert cache.lookup('a', [twin, 1]) == []
  assert _compute(cache, allocator, 'a', [twin, 1]) != pages
  cache.check()


def test_insert_stops_where_another_sequence_was_first():
  allocator, cache = _cache()
  mine, theirs = allocator.allocate(3), allocator.allocate(3)
  assert cache.insert('a', [1, 2, 3, 4], theirs) == 2
  # The same prefix, computed at the same time: the next page would go below a
  # page that this sequence does not hold.
  assert cache.insert('a', [1, 2, 3, 4, 5, 6], mine) == 0
  assert cache.lookup('a', [1, 2, 3, 4, 5, 6]) == theirs[:2]
  allocator.release(mine)
  assert allocator.num_free == 31 - 3
  cache.check()


def test_insert_goes_on_below_pages_of_its_own():
  allocator, cache = _cache()
  pages = allocator.allocate(3)
  assert cache.insert('a', [1, 2], pages) == 1
  assert cache.insert('a', [1, 2, 3, 4, 5], pages) == 1
  assert cache.insert('a', [1, 2, 3, 4, 5], pages) == 0
  assert cache.lookup('a', [1, 2, 3, 4, 5]) == pages[:2]


def test_least_recently_used_leaves_go_first_across_scopes():
  allocator, cache = _cache()
  old = _compute(cache, allocator, 'a', [1, 2, 3, 4])
  new = _compute(cache, allocator, 'b', [1, 2, 3, 4])
  again = _compute(cache, allocator, 'a', [1, 2, 9, 9])
  assert again[0] == old[0]
  evicted = []
  while allocator.num_idle:
    free = set(allocator._free)
    cache.evict(1)
    evicted += set(allocator._free) - free
    cache.check()
  # Only the leaf of the first use is old: its root was used again.
  assert evicted == [old[1], new[1], new[0], again[1], again[0]]
  assert not cache._roots


def test_what_is_in_use_is_not_evicted():
  allocator, cache = _cache(num_pages=8)
  held = allocator.allocate(2)
  cache.insert('a', [1, 2, 3, 4], held)
  idle = _compute(cache, allocator, 'a', [1, 2, 7, 7])
  assert allocator.num_idle == 1
  with pytest.raises(
    pages_lib.OutOfPages, match='evict 2, expected at most the 1 idle'
  ):
    cache.evict(2)
  assert cache.lookup('a', [1, 2, 7, 7]) == idle
  cache.evict(1)
  assert cache.lookup('a', [1, 2, 7, 7]) == cache.lookup('a', [1, 2])
  assert cache.lookup('a', [1, 2, 3, 4]) == held
  cache.check()


def test_idle_pages_are_counted_among_those_found():
  allocator, cache = _cache()
  pages = _compute(cache, allocator, 'a', [1, 2, 3, 4])
  assert cache.num_idle(pages) == 2
  allocator.share(pages[:1])
  assert cache.num_idle(pages) == 1


def test_a_scope_is_forgotten_even_while_it_is_used():
  allocator, cache = _cache()
  held = allocator.allocate(2)
  cache.insert('a', [1, 2, 3, 4], held)
  _compute(cache, allocator, 'a', [1, 2, 7, 7])
  kept = _compute(cache, allocator, 'b', [1, 2])
  cache.forget('a')
  cache.forget('never seen')
  cache.check()
  assert cache.lookup('a', [1, 2]) == []
  assert cache.lookup('b', [1, 2]) == kept
  assert allocator.ref_count(held[1]) == 1
  allocator.release(held)
  cache.clear()
  cache.check()
  assert allocator.num_free == allocator.num_usable


def test_the_version_goes_up_whenever_a_lookup_may_differ():
  allocator, cache = _cache()
  versions = [cache.version]
  _compute(cache, allocator, 'a', [1, 2, 3, 4])
  versions.append(cache.version)
  _compute(cache, allocator, 'a', [1, 2, 3, 4])  # nothing new
  assert cache.version == versions[-1]
  cache.evict(1)
  versions.append(cache.version)
  cache.clear()
  versions.append(cache.version)
  assert len(set(versions)) == len(versions)


def test_tokens_count_of_lookups_that_were_used():
  allocator, cache = _cache()
  _compute(cache, allocator, 'a', [1, 2, 3, 4])
  cache.lookup('a', [1, 2, 3, 4])
  assert cache.num_tokens_looked_up == 0
  cache.record(num_looked_up=6, num_found=4)
  cache.record(num_looked_up=2, num_found=0)
  assert (cache.num_tokens_looked_up, cache.num_tokens_found) == (8, 4)


def test_a_page_holds_at_least_one_token():
  with pytest.raises(ValueError, match='page_size: got 0, expected at least 1'):
    prefix_cache.PrefixCache(pages_lib.PageAllocator(4), 0)


def test_random_sequences_keep_the_promises():
  allocator, cache = _cache(num_pages=20)
  rng = random.Random(0)
  running: list[tuple[str, list[int], list[int]]] = []
  num_found = 0
  for _ in range(3000):
    if running and rng.random() < 0.5:
      scope, tokens, pages = running.pop(rng.randrange(len(running)))
      cache.insert(scope, tokens, pages)
      allocator.release(pages)
    else:
      scope = rng.choice('ab')
      tokens = [rng.randrange(2) for _ in range(rng.randint(1, 8))]
      found = cache.lookup(scope, tokens)
      num_found += len(found)
      missing = -(-len(tokens) // SIZE) - len(found)
      room = allocator.num_free + allocator.num_idle - cache.num_idle(found)
      if missing > room:
        continue
      allocator.share(found)
      cache.evict(max(missing - allocator.num_free, 0))
      running.append((scope, tokens, found + allocator.allocate(missing)))
    allocator.check()
    cache.check()
  assert num_found > 500  # the test has found pages
  for _, _, pages in running:
    allocator.release(pages)
  cache.clear()
  assert allocator.num_free == allocator.num_usable


def test_the_check_finds_a_child_held_without_its_parent():
  allocator, cache = _cache()
  pages = _compute(cache, allocator, 'a', [1, 2, 3, 4])
  cache.check()
  allocator.share(pages[1:])
  with pytest.raises(AssertionError, match='held more often'):
    cache.check()
