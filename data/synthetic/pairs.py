"""Invented names and descriptions, told in one order or in both.

    forward    0 n1 n2 2 d1 d2 d3
    backward   1 d1 d2 d3 2 n1 n2

Names and descriptions are random ids, all different, so only the rows tell
which name belongs to which description. The first id gives the order, and 2
stands between the parts, as "is" would.

Reference: Berglund et al. 2023, arXiv:2309.12288, experiment 1.
"""

import dataclasses

import numpy as np

FORWARD, BACKWARD, IS = 0, 1, 2
_NAME, _DESCRIPTION = 2, 3  # number of ids in each
ROW_LENGTH = 2 + _NAME + _DESCRIPTION


@dataclasses.dataclass(frozen=True, kw_only=True)
class Pairs:
  """Names, [M, 2], and descriptions, [M, 3], by pair."""

  names: np.ndarray
  descriptions: np.ndarray

  def rows(self, order: int) -> tuple[np.ndarray, np.ndarray]:
    """Returns ids, int32 [M, ROW_LENGTH], and which of them are the answer."""
    parts = self.names, self.descriptions
    asked, answer = parts if order == FORWARD else parts[::-1]
    column = np.ones((len(asked), 1), np.int32)
    ids = np.concatenate(
      [order * column, asked, IS * column, answer], axis=1, dtype=np.int32
    )
    is_answer = np.arange(ROW_LENGTH) > asked.shape[1] + 1
    return ids, np.broadcast_to(is_answer, ids.shape)


def draw(rng: np.random.Generator, num_pairs: int, num_ids: int) -> Pairs:
  """Returns pairs of different names and different descriptions.

  Args:
    rng: generator that draws the pairs.
    num_pairs: M.
    num_ids: ids are 3 to num_ids - 1.

  Raises:
    ValueError: `num_ids` does not give that many different names.
  """
  first = IS + 1
  if num_pairs > (num_ids - first) ** _NAME:
    raise ValueError(
      f'num_pairs: got {num_pairs} with {num_ids} ids, expected at most'
      f' {(num_ids - first) ** _NAME}, the number of different names'
    )

  def different(length: int) -> np.ndarray:
    numbers = rng.choice(
      (num_ids - first) ** length, size=num_pairs, replace=False
    )
    powers = (num_ids - first) ** np.arange(length)
    return first + numbers[:, None] // powers % (num_ids - first)

  return Pairs(names=different(_NAME), descriptions=different(_DESCRIPTION))
