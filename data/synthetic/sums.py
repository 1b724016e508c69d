"""Additions as rows of digits, with the sum from either end.

    plain     128+367=0495
    reversed  128+367=5940

Numbers have a fixed number of digits, with zeros in front, and a sum has one
digit more. A model that writes a plain sum needs all carries for its first
digit; from the last digit on, every digit needs two digits and one carry (Lee
et al. 2023, arXiv:2307.03381).
"""

import numpy as np

PLUS, EQUALS = 10, 11
NUM_IDS = 12  # ten digits, + and =


def draw(
  rng: np.random.Generator, num_rows: int, num_digits: int
) -> np.ndarray:
  """Returns pairs of numbers, int64 [B, 2], all pairs alike."""
  return rng.integers(10**num_digits, size=(num_rows, 2))


def rows(
  pairs_B2: np.ndarray, num_digits: int, *, is_reversed: bool
) -> tuple[np.ndarray, np.ndarray]:
  """Returns additions as ids, int32 [B, 3 n + 3], and the place of the sum.

  Args:
    pairs_B2: numbers below 10^n.
    num_digits: n.
    is_reversed: whether the last digit of the sum comes first.

  Raises:
    ValueError: a number has more digits, or is negative.
  """
  if pairs_B2.min() < 0 or pairs_B2.max() >= 10**num_digits:
    raise ValueError(
      f'numbers: got {pairs_B2.min()} to {pairs_B2.max()}, expected 0 to'
      f' {10**num_digits - 1} with {num_digits} digits'
    )
  sums = _digits(pairs_B2.sum(axis=-1), num_digits + 1)
  sign = np.ones((len(pairs_B2), 1), np.int32)
  ids_BT = np.concatenate(
    [
      _digits(pairs_B2[:, 0], num_digits),
      PLUS * sign,
      _digits(pairs_B2[:, 1], num_digits),
      EQUALS * sign,
      sums[:, ::-1] if is_reversed else sums,
    ],
    axis=-1,
    dtype=np.int32,
  )
  is_sum_T = np.arange(ids_BT.shape[1]) >= 2 * num_digits + 2
  return ids_BT, np.broadcast_to(is_sum_T, ids_BT.shape)


def _digits(numbers_B: np.ndarray, num_digits: int) -> np.ndarray:
  """Returns decimal digits [B, num_digits], the first one first."""
  powers = 10 ** np.arange(num_digits - 1, -1, -1)
  return numbers_B[:, None] // powers % 10
