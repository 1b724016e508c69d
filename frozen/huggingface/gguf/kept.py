"""Blocks of a GGUF file that stay as they are, and their way back to a file.

A row of blocks moves as a whole: to the order of our heads and back. So the
bytes of a block never change, and an export has the bytes of the file.
"""

from collections.abc import Mapping, Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from frozen.huggingface import layouts, tensor_map
from models.linear.native import (
  choice as native_choice,
  product as native_product,
)
from models.linear.stored import (
  block_kinds,
  blocks as blocks_lib,
  product,
  tree as stored_tree,
)

_TABLES = ('embed/embedding', 'head/embedding')


def blocks(
  tensors: Mapping[str, Any],
  pieces: Sequence[tensor_map.Piece],
) -> dict[str, blocks_lib.Blocks]:
  """Returns the kernels and tables that keep their blocks, by path.

  The others become floats: vectors, matrices of experts and of routers, and
  kinds that are not computed with.

  Args:
    tensors: of `gguf.tensors`, by name.
    pieces: the tensor map.
  """
  found = {}
  for piece in pieces:
    tensor = tensors[piece.theirs]
    if _can_be_kept(tensor, piece):
      parts = _turned(piece.layout.read(np.array(tensor.data)), piece)
      for path, part in zip(piece.ours, parts, strict=True):
        data = np.ascontiguousarray(part)
        found[path] = blocks_lib.Blocks.make(data, kind=tensor.kind)
  return found


def fast_ones(
  kept: Mapping[str, blocks_lib.Blocks],
) -> tuple[dict[str, blocks_lib.Blocks], list[str]]:
  """Returns the kernels with which this machine computes fast, and notes.

  Native code multiplies by blocks faster than by floats at every batch size
  that was measured; plain JAX is several times slower.
  """
  if not kept:
    return {}, []
  chosen = native_choice.choose(
    'auto', dict(kept), jnp.float32, jax.default_backend()
  )
  if chosen.port is product.in_blocks:
    return {}, [
      f'matrices become floats, since products are in {chosen.reason};'
      ' --weights=kept keeps their blocks nevertheless'
    ]
  found = {
    path: kernel
    for path, kernel in kept.items()
    if not native_product.refusal(kernel, jnp.float32)
  }
  return found, [
    f'{len(found)} of {len(kept)} matrices keep their blocks, since products'
    f' are {chosen.reason}; --weights=float dequantises all, for a machine'
    ' with an accelerator or without a compiler'
  ]


def _can_be_kept(tensor: Any, piece: tensor_map.Piece) -> bool:
  is_matrix = tensor.kind in block_kinds.KINDS and len(tensor.shape) == 2
  return is_matrix and all(map(_is_product, piece.ours))


def _is_product(path: str) -> bool:
  """Returns whether a leaf is only multiplied by, as `stored/` can."""
  *_, owner, kind = path.split('/')
  is_float = owner in stored_tree.WHOLE or owner.startswith('expert_')
  return path in _TABLES or (kind == 'kernel' and not is_float)


def _turned(parts: Sequence[Any], piece: tensor_map.Piece) -> list[Any]:
  # A layout turns matrices [out, in], but rows of bytes stay rows.
  is_turned = piece.layout is not layouts.AS_IT_IS
  return [part.T if is_turned else part for part in parts]


def kind_of(leaves: Sequence[Any]) -> str:
  """Returns the kind of block that leaves share; '' if any is floats."""
  kinds = {leaf.kind if is_blocks(leaf) else '' for leaf in leaves}
  return kinds.pop() if len(kinds) == 1 else ''


def is_blocks(leaf: Any) -> bool:
  """Returns whether a leaf keeps the blocks of a GGUF file."""
  return isinstance(leaf, blocks_lib.Blocks)


def rows(piece: tensor_map.Piece, leaves: Sequence[Any]) -> np.ndarray:
  """Returns the bytes of a tensor, uint8 [out, bytes of a row]."""
  parts = _turned([np.asarray(leaf.data) for leaf in leaves], piece)
  return np.ascontiguousarray(piece.layout.write(*parts))
