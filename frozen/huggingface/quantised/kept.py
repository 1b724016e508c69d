"""Matrices of a quantised checkpoint as stored kernels: their codes stay.

Codes and scales keep their bits. A layout changes only their place: the order
of heads, and of matrices that one tensor joins.
"""

from collections.abc import Mapping, Sequence
from typing import Any, NamedTuple

import numpy as np

from frozen.huggingface import fast_kernels, layouts, tensor_map
from frozen.huggingface.gguf import kept as gguf_kept
from frozen.huggingface.quantised import (
  matrix as matrix_lib,
  parts as parts_lib,
)
from models.linear.stored import kernel as kernel_lib


class Kept(NamedTuple):
  """The matrices that stay quantised, and the others."""

  kernels: dict[str, kernel_lib.Kernel]  # by path
  names: frozenset[str]  # names of their tensors
  notes: list[str]  # on the matrices that become floats


def kernels(
  tensors: Mapping[str, Any], pieces: Sequence[tensor_map.Piece]
) -> Kept:
  """Returns the kernels and tables that stay quantised.

  The others become floats: matrices of experts and of routers, and some that no
  stored kernel holds.

  Args:
    tensors: tensors of `quantised.opening`, by name.
    pieces: the tensor map.

  Raises:
    ValueError: a tensor is damaged.
  """
  found: dict[str, kernel_lib.Kernel] = {}
  names, floats = set(), {}
  for piece in pieces:
    tensor = tensors[piece.theirs]
    if tensor.dtype != parts_lib.DTYPE:
      continue
    if piece.expert is not None or not all(
      map(gguf_kept.is_product, piece.ours)
    ):
      why = 'experts, routers and the matrices that latent attention folds'
    else:
      matrix = tensor.matrix()
      why = matrix.why_not_stored()
      if not why:
        found |= _stored(matrix, piece)
        names.add(piece.theirs)
        continue
    floats.setdefault(why, []).append(piece.theirs)
  notes = [
    f'{len(which)} quantised matrices became floats, such as {which[0]}: {why}'
    for why, which in floats.items()
  ]
  return Kept(found, frozenset(names), notes)


def fast(kept: Kept, pieces: Sequence[tensor_map.Piece]) -> Kept:
  """Returns the matrices that stay quantised because that is fast here.

  Args:
    kept: all that can stay quantised.
    pieces: the tensor map.
  """
  found, notes = fast_kernels.choose(kept.kernels)
  whole = [
    piece
    for piece in pieces
    if piece.theirs in kept.names and found.keys() >= set(piece.ours)
  ]
  return Kept(
    {path: found[path] for piece in whole for path in piece.ours},
    frozenset(piece.theirs for piece in whole),
    [*kept.notes, *notes],
  )


def _stored(
  matrix: matrix_lib.Matrix, piece: tensor_map.Piece
) -> dict[str, kernel_lib.Kernel]:
  """Returns the kernel of each leaf that a tensor holds."""
  is_whole = piece.layout in (layouts.AS_IT_IS, layouts.TRANSPOSED)

  def select(rows: np.ndarray) -> tuple[np.ndarray, ...]:
    # A layout turns matrices [out, in], but rows of codes stay rows.
    return tuple(part.T for part in piece.layout.read(rows))

  stored = matrix.stored(None if is_whole else select)
  return {
    path: kernel_lib.Kernel.make(**fields)
    for path, fields in zip(piece.ours, stored, strict=True)
  }
