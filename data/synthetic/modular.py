"""Additions modulo a number, as rows of four ids: a b = c.

All pairs of numbers are one table of p^2 rows, so a split of them is a set of
places in it (Power et al. 2022, arXiv:2201.02177).
"""

import numpy as np


def num_ids(modulus: int) -> int:
  """Returns the number of ids: the numbers below the modulus, and =."""
  return modulus + 1


def rows(modulus: int) -> tuple[np.ndarray, np.ndarray]:
  """Returns all additions, and the place of the sum in a row.

  Row a p + b is a + b = c, with c = (a + b) mod p.

  Args:
    modulus: p, at least 2.

  Returns:
    ids, int32 [p^2, 4], and whether an id is the sum, bool [p^2, 4].

  Raises:
    ValueError: the modulus is below 2.
  """
  if modulus < 2:
    raise ValueError(f'modulus: got {modulus}, expected at least 2')
  a_B, b_B = np.divmod(np.arange(modulus**2), modulus)
  equals_B = np.full_like(a_B, modulus)
  ids_BT = np.stack([a_B, b_B, equals_B, (a_B + b_B) % modulus], axis=-1)
  is_sum_T = np.arange(4) == 3
  return ids_BT.astype(np.int32), np.broadcast_to(is_sum_T, ids_BT.shape)
