"""Context parallelism: the tokens of a row split across devices."""

import numpy as np


def balanced_order(time: int, num_shards: int) -> np.ndarray | None:
  """Returns which token lies in each place of a row, or None for all as is.

  Cut evenly, a causal row gives its last device most of the work. Here device
  i of n holds chunks i and 2n - 1 - i of 2n, which adds up to the same work on
  every one.

  Raises:
    ValueError: the row does not divide into 2n chunks.
  """
  if num_shards == 1:
    return None
  if time % (2 * num_shards):
    raise ValueError(
      f'data.row_length: got {time}, expected a multiple of 2 x'
      f' parallel.context = {2 * num_shards}; change one of them'
    )
  chunks = np.arange(time).reshape(2 * num_shards, -1)
  order = [[i, 2 * num_shards - 1 - i] for i in range(num_shards)]
  return chunks[np.array(order).reshape(-1)].reshape(-1)
