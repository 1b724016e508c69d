"""Layouts: one Hugging Face tensor, and the leaves of our model in it.

PyTorch stores matrices as [out, in], and our kernels are [in, out]. Some
families join the matrices of several projections, some of them head by head. A
layout splits one of their tensors into our leaves, and joins them again.
"""

from collections.abc import Callable, Sequence
import dataclasses

import numpy as np

Shape = tuple[int, ...]


@dataclasses.dataclass(frozen=True)
class Layout:
  """The conversion of one of their tensors to our leaves, and back."""

  read: Callable[[np.ndarray], tuple[np.ndarray, ...]]
  write: Callable[..., np.ndarray]
  shape: Callable[..., Shape]  # their tensor's shape from our leaves' shapes
  # Whether each row of their tensor is one row (column) of our leaf. Such a
  # tensor can be read in pieces.
  is_rows: bool = False
  is_columns: bool = False
  # Whether their tensor and our leaves have one matrix of each expert in a row.
  is_stacked: bool = False


def _theirs(*shapes: Shape) -> Shape:
  """Returns the shape of the transposed leaves, joined along the rows."""
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
  """Returns the layout of several matrices, or biases, in one tensor.

  Args:
    sizes: rows of each matrix in one head.
    heads: number of heads; each has the rows of all matrices.
    order: order[i] is the index of their row that becomes row i; None keeps the
      order.
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


def stacked(num: int) -> Layout:
  """Returns the layout of `num` matrices of all experts in one tensor.

  Theirs is [experts, out of all matrices, in], ours are [experts, in, out].
  """

  def read(x):
    return tuple(part.swapaxes(1, 2) for part in np.split(x, num, axis=1))

  def write(*leaves):
    return np.concatenate([leaf.swapaxes(1, 2) for leaf in leaves], axis=1)

  def shape(*shapes):
    experts, width, _ = shapes[0]
    return (experts, sum(each[2] for each in shapes), width)

  return Layout(read, write, shape, is_stacked=True)


def columns(num: int) -> Layout:
  """Returns the layout of `num` matrices [in, out], or biases, side by side."""

  def read(x):
    return tuple(np.split(x, num, axis=-1))

  def write(*leaves):
    return np.concatenate(leaves, axis=-1)

  def shape(*shapes):
    return (*shapes[0][:-1], sum(each[-1] for each in shapes))

  return Layout(read, write, shape)


def halves_of_pairs(heads: int, before: int, rotated: int) -> list[int]:
  """Returns the order of rows that puts rotated channels first, in halves.

  In their tensor, each head has `before` rows that are not rotated and then
  `rotated` rows, in which neighbours are a pair. In ours, each head has the
  first channels of all pairs, then the second channels, then the other rows.
  """
  pairs = before + np.arange(rotated)
  head = np.concatenate([pairs[0::2], pairs[1::2], np.arange(before)])
  size = before + rotated
  rows = np.arange(heads)[:, None] * size + head[None, :]
  return rows.reshape(-1).tolist()
