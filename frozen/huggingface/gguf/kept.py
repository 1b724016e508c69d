"""Blocks of a GGUF file that stay as they are, and their way back to a file.

A row of blocks moves as a whole: to the order of our heads and back. So the
bytes of a block never change, and an export has the bytes of the file.
"""

from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np

from frozen.huggingface import layouts, tensor_map
from models.linear.stored import (
  block_kinds,
  blocks as blocks_lib,
  tree as stored_tree,
)

_TABLES = ('embed/embedding', 'head/embedding')


def blocks(
  tensors: Mapping[str, Any],
  pieces: Sequence[tensor_map.Piece],
) -> dict[str, blocks_lib.Blocks]:
  """Returns the kernels and tables that keep their blocks, by path.

  The others become floats: vectors, matrices of routers, and kinds without a
  stored kernel. A tensor of all experts is one kernel.

  Args:
    tensors: tensors of `gguf.tensors`, by name.
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


def _can_be_kept(tensor: Any, piece: tensor_map.Piece) -> bool:
  is_matrix = tensor.kind in block_kinds.KINDS and len(tensor.shape) in (2, 3)
  return is_matrix and all(map(is_product, piece.ours))


def is_product(path: str) -> bool:
  """Returns whether a leaf is only multiplied by, as `stored/` can."""
  *_, owner, kind = path.split('/')
  is_float = owner in stored_tree.WHOLE
  return path in _TABLES or (kind == 'kernel' and not is_float)


def _turned(parts: Sequence[Any], piece: tensor_map.Piece) -> list[Any]:
  # A layout turns matrices [out, in], but rows of bytes stay rows.
  is_turned = piece.layout is not layouts.AS_IT_IS
  return [part.swapaxes(-1, -2) if is_turned else part for part in parts]


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
