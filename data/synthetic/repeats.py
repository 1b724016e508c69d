"""Random tokens that repeat: text that only its own past predicts.

A sequence is one block of random ids, repeated until the sequence is full. The
length of the block is random, so a model cannot copy from a fixed distance: it
has to find the last place of the present token, and copy the id after it, as
induction heads do (Olsson et al. 2022, arXiv:2209.11895). Ids of a block are
different from each other, so that place is unique. Before the first repetition,
a token is predicted only by the absence of earlier ids.
"""

import numpy as np


def draw(
  rng: np.random.Generator,
  num_rows: int,
  length: int,
  num_ids: int,
  block: tuple[int, int],
) -> tuple[np.ndarray, np.ndarray]:
  """Returns ids, int32 [B, T], and whether a repetition predicts each of them.

  Args:
    rng: generator that draws the ids.
    num_rows: B.
    length: T.
    num_ids: ids are 0 to num_ids - 1.
    block: least and greatest length of a block.

  Returns:
    The ids, and bool [B, T]: true where the previous token, followed by this
    token, has occurred already.

  Raises:
    ValueError: a block is empty, or longer than there are ids.
  """
  low, high = block
  if not 1 <= low <= high <= num_ids:
    raise ValueError(
      f'block: got {block} with {num_ids} ids, expected 1 <= least <= greatest'
      ' <= the number of ids, as each is in a block once'
    )
  lengths_B = rng.integers(low, high + 1, size=num_rows)
  # A random order of all ids; a block takes its first ids.
  order_BV = np.argsort(rng.random((num_rows, num_ids)), axis=-1)
  places_BT = np.arange(length) % lengths_B[:, None]
  ids_BT = np.take_along_axis(order_BV, places_BT, axis=-1).astype(np.int32)
  return ids_BT, np.arange(length) > lengths_B[:, None]
