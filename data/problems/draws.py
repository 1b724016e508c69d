"""Random draws that are the same on every machine and with every Python.

Only `random.Random.random` is used: Python promises that its numbers never
change for a seed (docs.python.org/3/library/random.html#notes-on-
reproducibility), and promises nothing for `randrange`, `choice` or `shuffle`.
"""

from collections.abc import Sequence
import hashlib
import random
from typing import TypeVar

T = TypeVar('T')

_SEEDS = -(2**63), 2**64


def check_seed(name: str, seed: int) -> None:
  """Raises ValueError if `seed` has more than 64 bits."""
  if not _SEEDS[0] <= seed < _SEEDS[1]:
    raise ValueError(
      f'{name}: got {seed}, expected an integer of 64 bits, from {_SEEDS[0]} to'
      f' {_SEEDS[1] - 1}'
    )


class Draws:
  """Random draws for a place (an index, a name) under a seed of 64 bits."""

  def __init__(self, seed: int, *place: int | str):
    """Starts the draws; -1 and 2**64 - 1 are one seed."""
    # A hash, since `random.Random` drops the sign of an integer.
    text = ','.join(map(str, (seed % 2**64, *place)))
    digest = hashlib.sha256(text.encode('utf-8')).digest()
    self._random = random.Random(int.from_bytes(digest))

  def share(self) -> float:
    """Returns a number from 0 to below 1."""
    return self._random.random()

  def between(self, low: int, high: int) -> int:
    """Returns an integer from `low` to `high`, both included."""
    return low + int(self.share() * (high - low + 1))

  def pick(self, items: Sequence[T]) -> T:
    """Returns one of `items`."""
    return items[self.between(0, len(items) - 1)]

  def some(self, items: Sequence[T], num: int) -> list[T]:
    """Returns `num` different places of `items`, in random order."""
    left = list(items)
    return [left.pop(self.between(0, len(left) - 1)) for _ in range(num)]
