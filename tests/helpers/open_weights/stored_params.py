"""Variables of a model whose kernels are in fewer bits."""

from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from models import axes
from models.linear.stored import (
  block_kinds,
  blocks as blocks_lib,
  kernel as kernel_lib,
  round as rounding,
  tree as stored_tree,
)

_TABLES = ('embed', 'head')


def stored(
  params: Any,
  scheme: str,
  *,
  has_tables: bool = True,
) -> Any:
  """Returns the variables with every kernel that can be, in a scheme.

  Args:
    params: in floats.
    scheme: of `round.SCHEMES`, or 'ordered': uint4 with columns in a random
      order, or 'Q8_0': blocks, of rows that 32 divides.
    has_tables: whether embedding and head are stored, too.
  """

  def leaf(path, x):
    collection, *_, owner, kind = axes.names(path)
    is_kernel = kind == 'kernel' and owner not in stored_tree.WHOLE
    is_table = has_tables and kind == 'embedding' and owner in _TABLES
    if collection != 'params' or not (is_kernel or is_table):
      return x
    return kernel(jnp.swapaxes(x, -1, -2) if is_table else x, scheme)

  return jax.tree_util.tree_map_with_path(leaf, params)


def kernel(w_IO: jax.Array, scheme: str) -> Any:
  """Returns a kernel [..., in, out] in a scheme, see `stored`."""
  if scheme == 'Q8_0':
    return _blocks(w_IO)
  if scheme != 'ordered':
    return rounding.by_scheme(w_IO, scheme)
  made = rounding.by_scheme(w_IO, 'uint4')
  *leading, rows, _ = w_IO.shape
  order = np.random.default_rng(rows).permutation(rows).astype(np.int32)
  order = jnp.broadcast_to(order, (*leading, rows))
  fields = {name: getattr(made, name) for name in kernel_lib.ARRAYS}
  return kernel_lib.Kernel.make(
    **{**fields, 'order': order}, form=made.form, tile=made.tile
  )


def _blocks(w_IO):
  w_OI = np.swapaxes(np.asarray(w_IO, np.float32), -1, -2)
  tiles = w_OI.reshape((*w_OI.shape[:-1], -1, 32))
  scales = (np.abs(tiles).max(-1, keepdims=True) / 127).astype(np.float16)
  values = np.rint(tiles / np.maximum(scales, 1e-7)).astype(np.int8)
  parts = [scales.view(np.uint8), values.view(np.uint8)]
  data = np.concatenate(parts, axis=-1)
  assert data.shape[-1] == block_kinds.KINDS['Q8_0'].bytes
  data = data.reshape((*w_OI.shape[:-1], -1))
  return blocks_lib.Blocks.make(jnp.asarray(data), kind='Q8_0')


def whole(params: Any) -> Any:
  """Returns the variables in float32."""
  return stored_tree.whole_kernels(params)
