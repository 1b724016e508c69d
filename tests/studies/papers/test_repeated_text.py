"""The worth of repeated text, from losses of new text that are known."""

import math

import numpy as np
import pytest

from studies.papers import repeated_text


def test_worth_is_the_size_of_new_text_with_the_same_loss():
  sizes = 1, 2, 4, 8
  losses = [3.0 - 0.5 * math.log2(size) for size in sizes]
  for size in (1.5, 3.73, 7.0):
    loss = 3.0 - 0.5 * math.log2(size)
    assert repeated_text.worth(sizes, losses, loss) == pytest.approx(size)
  # Outside of the sizes that were trained, the nearest one.
  assert repeated_text.worth(sizes, losses, 1.0) == pytest.approx(8)
  assert repeated_text.worth(sizes, losses, 4.0) == pytest.approx(1)
  with pytest.raises(ValueError, match='losses: got .* expected them to fall'):
    repeated_text.worth(sizes, [3.0, 2.0, 2.5, 1.0], 2.2)


def test_an_epoch_has_each_row_once():
  rows_NT = np.arange(12)[:, None] + np.zeros((1, 3), int)
  draw = repeated_text.epochs_of(rows_NT, 4)
  rng = np.random.default_rng(0)
  epochs = [
    np.concatenate([draw(rng)[0][:, 0] for _ in range(3)]) for _ in range(3)
  ]
  for order in epochs:
    np.testing.assert_array_equal(np.sort(order), np.arange(12))
  assert not np.array_equal(epochs[0], epochs[1])
  ids_BT, is_trained_BT = draw(rng)
  assert ids_BT.shape == is_trained_BT.shape == (4, 3)
  assert is_trained_BT.all()
  with pytest.raises(ValueError, match='rows: got 12, expected a multiple'):
    repeated_text.epochs_of(rows_NT, 5)
