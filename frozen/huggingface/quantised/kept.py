"""Matrices of a quantised checkpoint as stored kernels: their codes stay.

Codes and scales keep their bits. A layout changes only their place: the order
of heads, and of matrices that one tensor joins.

The matrices of all experts of a layer become one kernel, if all are quantised
alike. The symmetric codes of 4 bits of some become the unsigned codes of the
others, with the same numbers.
"""

from collections.abc import Mapping, Sequence
from typing import Any, NamedTuple

import jax
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

  The others become floats: matrices of routers, and some that no stored kernel
  holds.

  Args:
    tensors: tensors of `quantised.opening`, by name.
    pieces: the tensor map.

  Raises:
    ValueError: a tensor is damaged.
  """
  found: dict[str, kernel_lib.Kernel] = {}
  names, floats = set(), {}
  experts: dict[str, list[tensor_map.Piece]] = {}
  for piece in pieces:
    if piece.expert is not None:
      experts.setdefault(piece.ours[0], []).append(piece)
      continue
    tensor = tensors[piece.theirs]
    if tensor.dtype != parts_lib.DTYPE:
      continue
    if not all(map(gguf_kept.is_product, piece.ours)):
      why = 'routers and the matrices that latent attention folds'
    else:
      matrix = tensor.matrix()
      why = matrix.why_not_stored()
      if not why:
        found |= _stored(matrix, piece)
        names.add(piece.theirs)
        continue
    floats.setdefault(why, []).append(piece.theirs)
  for path, each in experts.items():
    quantised = [
      piece for piece in each if tensors[piece.theirs].dtype == parts_lib.DTYPE
    ]
    theirs = [piece.theirs for piece in quantised]
    if len(quantised) == len(each):
      kernel = _of_experts([(tensors[x.theirs], x) for x in each])
      if isinstance(kernel, kernel_lib.Kernel):
        found[path] = kernel
        names.update(theirs)
        continue
      floats.setdefault(kernel, []).extend(theirs)
    elif quantised:
      why = 'other experts of their layer are floats'
      floats.setdefault(why, []).extend(theirs)
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


def _of_experts(
  each: Sequence[tuple[Any, tensor_map.Piece]],
) -> kernel_lib.Kernel | str:
  """Returns the kernel of all experts, or why there is none.

  Args:
    each: tensor and piece of each expert, in their order.
  """
  found = []
  for tensor, piece in each:
    matrix = tensor.matrix()
    if why := matrix.why_not_stored():
      return why
    (kernel,) = _stored(matrix, piece).values()
    found.append(kernel)
  found = _alike(found)
  if len({_described(kernel) for kernel in found}) > 1:
    return 'the experts of their layer are quantised in different ways'
  return jax.tree.map(lambda *arrays: np.stack(arrays), *found)


def _alike(found: list[kernel_lib.Kernel]) -> list[kernel_lib.Kernel]:
  """Returns kernels of the same numbers that have the same arrays."""
  has_mins = any(kernel.mins is not None for kernel in found)
  has_order = any(kernel.order is not None for kernel in found)
  made = []
  for kernel in found:
    fields = {name: getattr(kernel, name) for name in kernel_lib.ARRAYS}
    form = kernel.form
    if has_mins and kernel.mins is None:
      middle = 8 if form == 'int4' else 0
      if form == 'int4':  # codes plus 8: the highest bit of each changes
        form, fields['values'] = 'uint4', kernel.values ^ np.uint8(0x88)
      fields['mins'] = -middle * np.asarray(kernel.scales, np.float32)
    if has_order and kernel.order is None:
      fields['order'] = np.arange(kernel.shape[0], dtype=np.int32)
    made.append(kernel_lib.Kernel.make(**fields, form=form, tile=kernel.tile))
  return made


def _described(kernel: kernel_lib.Kernel) -> tuple[Any, ...]:
  dtypes = [(str(x.dtype), x.shape) for x in jax.tree.leaves(kernel)]
  return kernel.form, kernel.tile, *dtypes, jax.tree.structure(kernel)
