"""How a tensor of theirs holds parameters of ours.

PyTorch stores matrices [out, in], ours are [in, out]; some families join the
matrices of several projections, some of them head by head. A layout cuts one
tensor of theirs into leaves of ours, and joins these again.
"""

from collections.abc import Callable, Sequence
import dataclasses

import numpy as np

Shape = tuple[int, ...]


@dataclasses.dataclass(frozen=True)
class Layout:
  """A tensor's way in and out."""

  read: Callable[[np.ndarray], tuple[np.ndarray, ...]]
  write: Callable[..., np.ndarray]
  shape: Callable[..., Shape]  # of theirs, from the shapes of ours
  # Whether rows of theirs are rows (columns) of ours, one by one: such a tensor
  # can be read in pieces.
  is_rows: bool = False
  is_columns: bool = False


def _theirs(*shapes: Shape) -> Shape:
  """Returns the shape of the transposed leaves, one above the other."""
  return (sum(shape[-1] for shape in shapes), *shapes[0][:-1])


AS_IT_IS = Layout(
  lambda x: (x,), lambda leaf: leaf, lambda shape: shape, is_rows=True
)
TRANSPOSED = Layout(
  lambda x: (x.T,), lambda leaf: leaf.T, _theirs, is_columns=True
)


def joined(
  sizes: Sequence[int], *, heads: int = 1, order: Sequence[int] | None = None
) -> Layout:
  """Several matrices in one, or the biases of several.

  Args:
    sizes: rows of each, of one head.
    heads: how often the rows of all of them follow each other.
    order: which row of theirs is the i-th of those; None: the i-th.
  """
  cuts = np.cumsum(sizes)[:-1]

  def read(x):
    if order is not None:
      x = x[list(order)]
    x = x.reshape((heads, -1, *x.shape[1:]))
    parts = np.split(x, cuts, axis=1)
    return tuple(part.reshape((-1, *x.shape[2:])).T for part in parts)

  def write(*leaves):
    parts = [leaf.T for leaf in leaves]
    parts = [part.reshape((heads, -1, *part.shape[1:])) for part in parts]
    x = np.concatenate(parts, axis=1)
    x = x.reshape((-1, *x.shape[2:]))
    if order is not None:
      back = np.empty_like(x)
      back[list(order)] = x
      return back
    return x

  return Layout(read, write, _theirs)


def columns(num: int) -> Layout:
  """Several matrices [in, out] side by side, or their biases."""

  def read(x):
    return tuple(np.split(x, num, axis=-1))

  def write(*leaves):
    return np.concatenate(leaves, axis=-1)

  def shape(*shapes):
    return (*shapes[0][:-1], sum(each[-1] for each in shapes))

  return Layout(read, write, shape)


def halves_of_pairs(heads: int, before: int, rotated: int) -> list[int]:
  """Returns the order of rows that puts rotated channels first, in halves.

  Theirs has, for each head, `before` rows that are not rotated, and `rotated`
  ones of which neighbours are a pair; ours has a pair's first channels, then
  its second ones, then the rest.
  """
  pairs = before + np.arange(rotated)
  head = np.concatenate([pairs[0::2], pairs[1::2], np.arange(before)])
  size = before + rotated
  rows = np.arange(heads)[:, None] * size + head[None, :]
  return rows.reshape(-1).tolist()
