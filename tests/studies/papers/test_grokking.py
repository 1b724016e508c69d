"""Grokking: frequencies of logits that are known, and the order of events."""

import numpy as np
import pytest

from data.synthetic import modular
from studies.papers import grokking

P = 11
KEYS = 2, 5


def cosines(keys, height=3.0):
  """Returns logits that add modulo P by these frequencies, [P^2, P]."""
  ids_BT, _ = modular.rows(P)
  sums_B = ids_BT[:, 0] + ids_BT[:, 1]
  turns_BC = sums_B[:, None] - np.arange(P)
  return sum(height * np.cos(2 * np.pi * k / P * turns_BC) for k in keys)


def test_rows_are_all_additions_once():
  ids_BT, is_sum_BT = modular.rows(7)
  assert ids_BT.shape == is_sum_BT.shape == (49, 4)
  assert len({(a, b) for a, b, *_ in ids_BT.tolist()}) == 49
  np.testing.assert_array_equal(ids_BT[:, :2].sum(axis=1) % 7, ids_BT[:, 3])
  assert (ids_BT[:, 2] == 7).all()
  assert modular.num_ids(7) == 8
  with pytest.raises(ValueError, match='modulus: got 1'):
    modular.rows(1)


def test_logits_are_taken_apart_by_frequency():
  waves = grokking.Waves(P)
  logits_BC = cosines(KEYS)
  parts_KBC = waves.parts(logits_BC)
  np.testing.assert_allclose(parts_KBC.sum(axis=0), logits_BC, atol=1e-9)
  for k in range(1, P // 2 + 1):
    expected_BC = cosines([k]) if k in KEYS else 0 * logits_BC
    np.testing.assert_allclose(parts_KBC[k - 1], expected_BC, atol=1e-9)
  np.testing.assert_allclose(
    waves.variances(logits_BC), np.square(parts_KBC).sum(axis=(1, 2)), atol=1e-6
  )
  # A function of a alone is no wave over a + b.
  a_B = np.arange(P * P) // P
  other_BC = np.cos(2 * np.pi * 2 / P * a_B)[:, None] * np.ones(P)
  np.testing.assert_allclose(waves.parts(other_BC), 0, atol=1e-9)
  with pytest.raises(ValueError, match='modulus: got 10'):
    grokking.Waves(10)


def memory(is_trained_B, height=6.0):
  """Returns logits that know the trained pairs only."""
  ids_BT, _ = modular.rows(P)
  right_BC = ids_BT[:, 3:] == np.arange(P)
  return height * (right_BC & is_trained_B[:, None])


def test_a_run_that_memorises_first_is_told_apart_from_one_that_does_not():
  ids_BT, _ = modular.rows(P)
  is_trained_B = np.random.default_rng(0).random(P * P) < 0.4
  by_heart_BC = memory(is_trained_B)
  nothing_BC = np.zeros((P * P, P))
  # The waves come below the memory first, then stand alone.
  course = grokking.of_logits(
    [0, 100, 200, 300, 400],
    [
      nothing_BC,
      by_heart_BC,
      by_heart_BC - 6 + cosines(KEYS, 0.4),
      by_heart_BC * 0.1 + cosines(KEYS, 3.0),
      cosines(KEYS, 9.0),
    ],
    ids_BT[:, 3],
    is_trained_B,
  )
  assert course.num_keys == len(KEYS)
  assert course.explained == pytest.approx(1.0)
  np.testing.assert_allclose(course.known_N[1:], 1.0)
  assert course.held_out_N[1] < 0.3
  np.testing.assert_allclose(course.held_out_N[3:], 1.0)
  # Without the waves, the last model knows nothing, and the second everything.
  assert course.excluded_N[-1] == pytest.approx(np.log(P))
  assert course.excluded_N[1] < 0.1
  told = grokking.told(course)
  # Waves of the right sum generalise as soon as they are there.
  assert told['delay'] == 2.0
  assert told['known'] == told['held_out'] == 1.0
  # Held-out pairs in step 200, and the memory is gone in step 300.
  assert told['lead'] == -100.0

  never = grokking.told(
    grokking.of_logits(
      [0, 100, 200],
      [nothing_BC, by_heart_BC, by_heart_BC],
      ids_BT[:, 3],
      is_trained_B,
    )
  )
  assert never['held_out'] < 0.3
  assert never['explained'] < 0.9
