"""Row order: a permutation in every epoch, a new one in each, and uniform."""

import hypothesis
from hypothesis import strategies as st
import numpy as np
import pytest

from data import row_order


@hypothesis.given(
  size=st.integers(1, 300),
  epoch=st.integers(0, 10**9),
  seed=st.integers(0, 2**63 - 1),
)
@hypothesis.settings(deadline=None)
def test_an_epoch_has_every_number_once(size, epoch, seed):
  indices = np.arange(size) + epoch * size
  result = row_order.shuffled(indices, size, seed)
  assert sorted(result.tolist()) == list(range(size))
  # An index alone gives what it gives among others.
  assert row_order.shuffled(indices[-1:], size, seed) == result[-1:]


@pytest.mark.parametrize('size', [2**16, 2**16 + 1])
def test_large_epochs_around_a_power_of_two(size):
  result = row_order.shuffled(np.arange(size), size, 5)
  assert len(np.unique(result)) == size
  # Neighbours end up anywhere: a third of the size apart on average.
  distance = np.abs(np.diff(result)).mean()
  assert abs(distance / size - 1 / 3) < 0.01


def test_small_epochs_have_all_orders_about_equally_often():
  # 24 orders of 4, 400 each expected of 9600, +- 20: five sigma.
  indices = np.arange(4 * 9600)
  epochs = row_order.shuffled(indices, 4, 1).reshape(-1, 4)
  _, counts = np.unique(epochs, axis=0, return_counts=True)
  assert len(counts) == 24
  assert abs(counts - 400).max() < 100


def test_indices_far_out_work():
  far = np.array([2**61, 2**61 + 1])
  assert (row_order.shuffled(far, 10**12, 3) < 10**12).all()


def test_draws_are_even_and_of_the_seed():
  drawn = row_order.drawn(np.arange(7000), 7, 1)
  counts = np.bincount(drawn, minlength=7)
  assert len(counts) == 7
  assert abs(counts - 1000).max() < 150  # five sigma
  assert (row_order.drawn(np.arange(7000), 7, 2) != drawn).any()


def test_the_order_is_what_it_was():
  """A golden value: newer code must resume a run at the same row."""
  shuffled = row_order.shuffled(np.arange(10), 10, 42)
  assert ' '.join(map(str, shuffled)) == '0 9 6 4 5 3 2 7 8 1'
  drawn = row_order.drawn(np.arange(5), 1000, 42)
  assert ' '.join(map(str, drawn)) == '343 950 446 977 284'
