"""Sums of the segments of packed rows: one number per document.

In rows of preferences, a unit is two documents side by side: segments 1 and 2,
3 and 4, and so on. The first is the chosen one (or the labelled example), the
second the rejected one (or the mismatched one). See data/rows.py.
"""

import jax
import jax.numpy as jnp


def sums(values_BT: jax.Array, segment_ids_BT: jax.Array) -> jax.Array:
  """Returns the sum of each segment of each row, float32 [B, units, 2].

  Segment 0, which is padding, has no sum. The number of units is static: as
  many as a row has room for. Absent segments have the sum 0.
  """
  batch, time = values_BT.shape
  num_units = max(1, time // 2)
  number_S = 1 + jnp.arange(2 * num_units)
  # A masked sum, not a scatter: GPUs scatter sums in no fixed order. XLA fuses
  # the mask into the sum, so no array [B, T, S] exists. The order of tokens in
  # a row, which context parallelism changes, does not matter.
  is_in_BTS = segment_ids_BT[:, :, None] == number_S[None, None, :]
  sums_BS = jnp.sum(jnp.where(is_in_BTS, values_BT[:, :, None], 0.0), axis=1)
  return sums_BS.reshape((batch, num_units, 2))
