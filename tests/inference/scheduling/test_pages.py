"""The page allocator: holders, marks, free and idle pages."""

import random

import pytest

from inference.scheduling import pages


def test_every_page_but_the_null_page_is_handed_out_once():
  allocator = pages.PageAllocator(6)
  assert (allocator.num_usable, allocator.num_free) == (5, 5)
  taken = allocator.allocate(2) + allocator.allocate(3)
  assert sorted(taken) == [1, 2, 3, 4, 5]
  assert (allocator.num_free, allocator.num_used) == (0, 5)
  allocator.check()


def test_more_than_is_free_is_refused_and_nothing_taken():
  allocator = pages.PageAllocator(6)
  allocator.allocate(2)
  with pytest.raises(
    pages.OutOfPages, match='got a request for 4, expected at most the 3 free'
  ):
    allocator.allocate(4)
  assert allocator.num_free == 3
  allocator.check()


def test_a_shared_page_is_free_after_its_last_release():
  allocator = pages.PageAllocator(4)
  [page] = allocator.allocate(1)
  allocator.share([page])
  assert allocator.ref_count(page) == 2
  assert not allocator.is_exclusive(page)
  allocator.release([page])
  assert allocator.is_exclusive(page)
  assert allocator.num_free == 2
  allocator.release([page])
  assert (allocator.ref_count(page), allocator.num_free) == (0, 3)


def test_a_cached_page_is_idle_until_the_cache_lets_go():
  allocator = pages.PageAllocator(4)
  [page] = allocator.allocate(1)
  allocator.mark_cached(page)
  assert not allocator.is_exclusive(page)  # others may find and read it
  allocator.release([page])
  assert (allocator.num_free, allocator.num_idle, allocator.num_used) == (
    2,
    1,
    0,
  )
  with pytest.raises(pages.OutOfPages, match='evict some of the 1 idle'):
    allocator.allocate(3)
  allocator.share([page])  # found again
  assert (allocator.num_idle, allocator.num_used) == (0, 1)
  allocator.release([page])
  allocator.unmark_cached(page)
  assert (allocator.num_free, allocator.num_idle) == (3, 0)
  allocator.check()


def test_the_cache_lets_go_of_a_page_in_use():
  allocator = pages.PageAllocator(4)
  [page] = allocator.allocate(1)
  allocator.mark_cached(page)
  allocator.unmark_cached(page)
  assert allocator.num_free == 2
  allocator.release([page])
  assert allocator.num_free == 3


def test_pages_become_idle_from_the_last_on_and_anew_after_use():
  allocator = pages.PageAllocator(8)
  first, second = allocator.allocate(2), allocator.allocate(2)
  for page in first + second:
    allocator.mark_cached(page)
  assert allocator.oldest_idle is None
  allocator.release(first)
  allocator.release(second)
  order = []
  allocator.share(first)  # used again: now the most recent
  allocator.release(first)
  while allocator.oldest_idle is not None:
    order.append(allocator.oldest_idle)
    allocator.unmark_cached(allocator.oldest_idle)
  assert order == [second[1], second[0], first[1], first[0]]


@pytest.mark.parametrize(
  ('operation', 'match'),
  [
    (lambda allocator, page: allocator.share([page]), 'a free page to share'),
    (lambda allocator, page: allocator.release([page]), 'without references'),
    (lambda allocator, page: allocator.mark_cached(page), 'got 0 references'),
    (lambda allocator, page: allocator.unmark_cached(page), 'not cached'),
  ],
)
def test_what_nobody_holds_is_neither_shared_nor_released(operation, match):
  allocator = pages.PageAllocator(4)
  [page] = allocator.allocate(1)
  allocator.release([page])
  with pytest.raises(ValueError, match=match):
    operation(allocator, page)
  allocator.check()


def test_a_page_is_cached_once():
  allocator = pages.PageAllocator(4)
  [page] = allocator.allocate(1)
  allocator.mark_cached(page)
  with pytest.raises(ValueError, match='cached: True, expected'):
    allocator.mark_cached(page)


def test_at_least_one_page_is_to_be_had():
  with pytest.raises(ValueError, match='num_pages: got 1, expected at least 2'):
    pages.PageAllocator(1)


def test_random_operations_agree_with_a_count_by_hand():
  allocator = pages.PageAllocator(12)
  rng = random.Random(0)
  held: list[int] = []  # one entry per reference
  cached: set[int] = set()
  for _ in range(2000):
    match rng.randrange(5):
      case 0 if allocator.num_free:
        held += allocator.allocate(rng.randint(1, allocator.num_free))
      case 1 if known := sorted({*held, *cached}):
        page = rng.choice(known)
        allocator.share([page])
        held.append(page)
      case 2 if held:
        page = held.pop(rng.randrange(len(held)))
        allocator.release([page])
      case 3 if new := sorted(set(held) - cached):
        page = rng.choice(new)
        allocator.mark_cached(page)
        cached.add(page)
      case 4 if cached:
        page = rng.choice(sorted(cached))
        allocator.unmark_cached(page)
        cached.remove(page)
    allocator.check()
    assert allocator.num_used == len(set(held))
    assert allocator.num_idle == len(cached - set(held))
    assert all(allocator.ref_count(p) == held.count(p) for p in range(12))


def test_the_check_finds_a_page_that_is_free_and_held():
  allocator = pages.PageAllocator(4)
  [page] = allocator.allocate(1)
  allocator._free.append(page)
  with pytest.raises(AssertionError, match=f'page {page}'):
    allocator.check()
