"""Every row has a source, and every source its share, for any weights."""

import fractions

import hypothesis
from hypothesis import strategies as st
import numpy as np
import pytest

from data import source_mix

ROWS = 600
WEIGHTS = st.floats(1e-4, 1e4, allow_nan=False)


def _check(phases, shares, bound, first=0):
  """Checks every prefix: shares to `bound` rows, and rows in order."""
  sources, indices = source_mix.assign(phases, np.arange(first, first + ROWS))
  taken = source_mix.taken_before(phases, first)
  for i, (source, index) in enumerate(zip(sources, indices, strict=True)):
    assert index == taken[source]
    taken[source] += 1
    num = first + i + 1
    for count, share in zip(taken, shares, strict=True):
      assert abs(count - num * share) < bound
  assert taken == source_mix.taken_before(phases, first + ROWS)


def _shares(weights):
  exact = [fractions.Fraction(repr(w)) for w in weights]
  return [w / sum(exact) for w in exact]


@hypothesis.given(weights=st.lists(WEIGHTS, min_size=1, max_size=3))
@hypothesis.settings(deadline=None, max_examples=25)
def test_up_to_three_sources_are_within_one_row_at_every_prefix(weights):
  _check(source_mix.start(weights), _shares(weights), 1)


@hypothesis.given(weights=st.lists(WEIGHTS, min_size=4, max_size=20))
@hypothesis.settings(deadline=None, max_examples=15)
def test_many_sources_are_within_two_rows_at_every_prefix(weights):
  _check(source_mix.start(weights), _shares(weights), 2)


def test_far_rows_have_their_shares_too():
  weights = [0.7, 0.2, 0.1]
  _check(source_mix.start(weights), _shares(weights), 1, first=10**15)


def test_sources_take_turns():
  sources, indices = source_mix.assign(source_mix.start([1, 1]), np.arange(6))
  assert sorted(sources[:2]) == sorted(sources[2:4]) == [0, 1]
  assert sorted(zip(sources.tolist(), indices.tolist(), strict=True)) == [
    (source, index) for source in (0, 1) for index in range(3)
  ]


def test_decimal_weights_are_what_they_look_like():
  sources, _ = source_mix.assign(source_mix.start([0.7, 0.3]), np.arange(1000))
  other, _ = source_mix.assign(source_mix.start([7, 3]), np.arange(1000))
  np.testing.assert_array_equal(sources, other)
  assert (sources == 0).sum() == 700


def test_other_weights_change_nothing_before_them():
  phases = source_mix.start([0.5, 0.5])
  changed = source_mix.changed(phases, [0.9, 0.1], 101)
  rows = np.arange(400)
  before, after = (
    source_mix.assign(phases, rows),
    source_mix.assign(changed, rows),
  )
  for old, new in zip(before, after, strict=True):
    np.testing.assert_array_equal(new[:101], old[:101])
  # Each source goes on with its own next row, and has the new share.
  for source in (0, 1):
    indices = after[1][after[0] == source]
    np.testing.assert_array_equal(indices, np.arange(len(indices)))
  assert abs((after[0][101:] == 0).sum() - 299 * 0.9) < 1


def test_the_same_weights_are_no_change():
  phases = source_mix.start([0.7, 0.3])
  assert source_mix.changed(phases, [7, 3], 50) is phases


def test_a_change_that_no_row_has_seen_is_forgotten():
  phases = source_mix.changed(source_mix.start([1, 1]), [2, 1], 10)
  assert source_mix.changed(phases, [3, 1], 10) == source_mix.changed(
    source_mix.start([1, 1]), [3, 1], 10
  )
  assert source_mix.changed(source_mix.start([1, 1]), [3, 1], 0) == (
    source_mix.start([3, 1])
  )


@pytest.mark.parametrize('num_sources', [1, 2, 50])
def test_a_row_alone_is_what_it_is_among_others(num_sources):
  phases = source_mix.start([1.5**-i for i in range(num_sources)])
  together = source_mix.assign(phases, np.arange(200))
  for row in (0, 1, 77, 199):
    alone = source_mix.assign(phases, np.array([row]))
    assert [x[0] for x in alone] == [x[row] for x in together]
