"""The pages of a sequence: found, allocated, shared, copied, released."""

import pytest

from inference.scheduling import page_tables, pages

SIZE = 4


@pytest.fixture
def tables():
  return page_tables.PageTables(num_pages=12, page_size=SIZE)


def _sequence(tokens, *, num_prompt=None, **fields):
  defaults = {
    'id': 'a',
    'principal': None,
    'priority': 0,
    'scope': None,
    'reads_prefix_cache': True,
    'arrival': 0,
    'submitted': 0,
    'max_known': 100,
  }
  return page_tables.Sequence(
    tokens=list(tokens),
    num_prompt=num_prompt or len(tokens),
    **{**defaults, **fields},
  )


def _compute(tables, sequence, length):
  copies = tables.grow(sequence, length)
  sequence.num_computed += length
  return copies


def test_a_sequence_grows_by_the_pages_it_lacks(tables):
  sequence = _sequence(range(9))
  assert _compute(tables, sequence, 3) == []
  assert len(sequence.pages) == 1
  _compute(tables, sequence, 1)
  assert len(sequence.pages) == 1
  _compute(tables, sequence, 5)
  assert len(sequence.pages) == 3
  tables.check([sequence])


def test_growing_evicts_idle_pages_and_no_others(tables):
  old = _sequence(range(8))
  _compute(tables, old, 8)
  tables.release(old)
  held = _sequence(range(100, 108))
  _compute(tables, held, 8)
  assert (tables.allocator.num_idle, tables.allocator.num_free) == (2, 7)
  large = _sequence(range(200, 236))
  _compute(tables, large, 32)
  assert (tables.allocator.num_idle, tables.allocator.num_free) == (1, 0)
  _compute(tables, large, 4)
  with pytest.raises(pages.OutOfPages):
    tables.grow(large, 1)
  tables.check([held, large])


def test_a_released_sequence_leaves_its_full_pages_to_find(tables):
  first = _sequence(range(10))
  _compute(tables, first, 10)
  tables.release(first)
  assert (first.pages, first.num_computed) == ((), 0)
  assert tables.allocator.num_idle == 2
  second = _sequence(range(10))
  assert len(tables.hit(second)) == 2
  tables.take_hit(second)
  assert second.num_computed == 8
  assert tables.allocator.num_idle == 0
  tables.check([second])


def test_the_last_known_token_is_never_found(tables):
  first = _sequence(range(8))
  _compute(tables, first, 8)
  tables.release(first)
  assert len(tables.hit(_sequence(range(8)))) == 1
  assert len(tables.hit(_sequence(range(9)))) == 2


def test_only_known_and_computed_tokens_are_left(tables):
  # Eight are computed; the id of the last is in flight.
  sequence = _sequence(range(7), num_in_flight=2)
  _compute(tables, sequence, 8)
  tables.release(sequence)
  assert len(tables.cache) == 1
  # Eight are known; six are computed.
  sequence = _sequence(range(50, 58))
  _compute(tables, sequence, 6)
  tables.release(sequence)
  assert len(tables.cache) == 2


def test_who_does_not_read_finds_nothing_and_is_found(tables):
  first = _sequence(range(9), reads_prefix_cache=False)
  _compute(tables, first, 9)
  tables.insert(first)
  assert tables.hit(_sequence(range(9), reads_prefix_cache=False)) == ()
  assert len(tables.hit(_sequence(range(9)))) == 2


def test_a_hit_is_looked_up_again_only_after_a_change(tables, monkeypatch):
  lookups = []
  lookup = tables.cache.lookup
  monkeypatch.setattr(
    tables.cache, 'lookup', lambda *args: lookups.append(1) or lookup(*args)
  )
  sequence = _sequence(range(9))
  tables.hit(sequence)
  tables.hit(sequence)
  assert len(lookups) == 1
  other = _sequence(range(9))
  _compute(tables, other, 8)
  tables.insert(other)
  assert len(tables.hit(sequence)) == 2
  assert len(lookups) == 2


def test_a_fork_shares_the_prompt_and_copies_before_it_writes(tables):
  parent = _sequence(range(6))
  _compute(tables, parent, 6)
  first, second = _sequence(range(6)), _sequence(range(6))
  tables.fork(parent, first)
  tables.fork(parent, second)
  assert first.pages == second.pages == parent.pages
  assert first.num_computed == 5
  assert tables.copied(parent) == tables.copied(first) == parent.pages[1]
  shared = parent.pages[1]
  [(source, destination)] = _compute(tables, first, 1)
  assert source == shared
  assert first.pages == (parent.pages[0], destination)
  [(source, _)] = _compute(tables, parent, 1)
  assert source == shared
  # The last holder keeps the page.
  assert tables.copied(second) is None
  assert _compute(tables, second, 1) == []
  assert second.pages[1] == shared
  tables.check([parent, first, second])


def test_a_page_that_would_hold_only_the_last_token_is_not_shared(tables):
  parent = _sequence(range(5))
  _compute(tables, parent, 5)
  child = _sequence(range(5))
  tables.fork(parent, child)
  assert child.pages == parent.pages[:1]
  assert tables.copied(child) is None
  assert _compute(tables, child, 1) == []
  tables.check([parent, child])


def test_a_page_that_the_cache_keeps_is_copied_by_its_only_holder(tables):
  parent = _sequence(range(8))
  _compute(tables, parent, 8)
  child = _sequence(range(8))
  tables.fork(parent, child)
  tables.release(parent)
  shared = child.pages[1]
  assert tables.allocator.ref_count(shared) == 1
  assert [source for source, _ in _compute(tables, child, 1)] == [shared]
  assert tables.allocator.num_idle == 1  # the cache still has it
  tables.check([child])


def test_the_planner_is_told_of_hits_and_copies(tables):
  parent = _sequence(range(8), slot=0)
  _compute(tables, parent, 8)
  child = _sequence(range(8))
  tables.fork(parent, child)
  task = tables.task(child)
  assert (task.num_computed, task.num_remaining) == (7, 1)
  assert (task.num_copies, task.is_tail_cached) == (1, False)
  tables.insert(parent)
  task = tables.task(child)
  assert (task.num_copies, task.is_tail_cached) == (1, True)
  assert tables.task(parent).num_copies == 0  # its next page is its own
  waiting = tables.task(_sequence(range(9)))
  assert (waiting.num_hit_pages, waiting.num_idle_hit_pages) == (2, 0)
  assert (waiting.num_pages, waiting.num_computed) == (0, 8)
  tables.release(parent)
  waiting = tables.task(_sequence(range(9)))
  assert (waiting.num_hit_pages, waiting.num_idle_hit_pages) == (2, 0)
  tables.release(child)
  waiting = tables.task(_sequence(range(9)))
  assert (waiting.num_hit_pages, waiting.num_idle_hit_pages) == (2, 2)


def test_tokens_of_a_shared_page_are_held_once(tables):
  parent = _sequence(range(6))
  _compute(tables, parent, 6)
  assert tables.num_tokens_held([parent]) == 6
  child = _sequence(range(6))
  tables.fork(parent, child)
  assert tables.num_tokens_held([parent, child]) == 6
  _compute(tables, child, 2)
  assert tables.num_tokens_held([parent, child]) == 4 + 2 + 3
  _compute(tables, parent, 4)  # its last page is full now
  assert tables.num_tokens_held([parent, child]) == 4 + 4 + 2 + 3


@pytest.mark.parametrize(
  ('fields', 'is_ready'),
  [
    ({}, True),
    ({'max_known': 3}, False),  # at its length
    ({'num_in_flight': 1}, False),  # the token id is needed
    (
      {'num_in_flight': 1, 'slot': 0, 'num_computed': 3},
      True,
    ),  # the device has it
    ({'num_in_flight': 1, 'slot': 0, 'max_known': 4}, False),
    ({'awaits_parent': True}, False),
  ],
)
def test_who_is_ready(fields, is_ready):
  assert _sequence(range(3), **fields).is_ready == is_ready


def test_the_check_finds_a_page_shared_between_scopes(tables):
  first = _sequence(range(4))
  _compute(tables, first, 4)
  other = _sequence(range(4), scope='other')
  other.pages, other.num_computed = first.pages, 4
  tables.allocator.share(first.pages)
  with pytest.raises(AssertionError):
    tables.check([first, other])
