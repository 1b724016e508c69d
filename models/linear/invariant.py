"""Batch-invariant execution: a token has the same bits in every batch.

XLA chooses the summation order of a matrix product by the shapes of its
operands. On CPU, a row of a product may have different last bits in products of
1, 16 and 32 rows. So the log-probabilities of a token would depend on the
number of other tokens in the step. Here every product has one fixed shape: rows
are taken in tiles of a fixed number of rows, one tile after the other, and the
last tile is padded. The result of a row of a product does not depend on its
place in the tile, nor on the other rows.

The same holds for every operation that sums within a row, such as norms.

The functions are ports of `models.execution.Execution`; `execution()` returns
all of them together. The operations that XLA still schedules freely are
elementwise. This execution is for proofs, evaluation and reproducible serving:
a single token costs a whole tile.

Reference: batch-invariant kernels, He, "Defeating Nondeterminism in LLM
Inference", 2025. Here shapes are fixed instead of writing kernels.
"""

from collections.abc import Callable, Mapping
from typing import Any

from flax import linen as nn
import jax
import jax.numpy as jnp

from models import execution as execution_lib, kv_cache
from models.attention import form as form_lib, paged
from models.linear import isolated, plain
from models.linear.stored import product as stored_product
from models.moe import dispatch

TILE_ROWS = 32  # of matrix products
# Queries of one sequence that attention computes together. A prompt fills such
# a tile; a decode step has one query in it, and padding.
QUERY_ROWS = 8


def execution() -> execution_lib.Execution:
  """Returns an execution whose ports are all batch-invariant."""
  return execution_lib.Execution(
    attend_cached=attend_cached,
    linear=linear,
    exact_linear=exact_linear,
    unembed=unembed,
    by_row=by_row,
    apply_experts=apply_experts,
  )


def linear(
  x: jax.Array, w_IO: jax.Array, bias_O: jax.Array | None, dtype: Any
) -> jax.Array:
  """Returns x[..., I] @ w[I, O] + bias[O], computed and returned in `dtype`."""
  w_IO = w_IO.astype(dtype)
  y = by_row(lambda x_RI: _product(x_RI, w_IO).astype(dtype), x.astype(dtype))
  if bias_O is not None:
    y = y + bias_O.astype(dtype).reshape((1,) * (y.ndim - 1) + (-1,))
  return y


def exact_linear(
  x: jax.Array, w_IO: jax.Array, bias_O: jax.Array | None, dtype: Any
) -> jax.Array:
  """Returns the product in full float32 precision, on every platform."""
  del bias_O
  return by_row(
    lambda x_RI: jnp.matmul(
      x_RI, w_IO.astype(dtype), precision=jax.lax.Precision.HIGHEST
    ),
    x.astype(dtype),
  )


def unembed(hidden: jax.Array, head_VD: jax.Array, dtype: Any) -> jax.Array:
  """Returns float32 logits [..., V] of hidden states [..., D]."""
  head_VD = head_VD.astype(dtype)
  return by_row(
    lambda x_RD: jax.lax.dot_general(
      x_RD,
      head_VD,
      (((1,), (1,)), ((), ())),
      preferred_element_type=jnp.float32,
    ),
    hidden.astype(dtype),
  )


def apply_experts(
  x_BTD: jax.Array,
  ids_BTA: jax.Array,
  gates_BTA: jax.Array,
  kernels: Mapping[str, Any],
  dtype: Any,
  stored: stored_product.Computed | None = None,
  multiply: Any = None,
) -> jax.Array:
  """Returns the sum over a token's experts of gate * expert(x), [B, T, D].

  Every expert multiplies every token, and the results of unselected experts are
  dropped. That is E/A times the work of grouping tokens by expert, but the size
  of a group would depend on all tokens. Kernels in fewer bits have a product
  that takes groups of any size in tiles.

  Args:
    x_BTD: the input.
    ids_BTA: as in `models.moe.dispatch`, like the next two.
    gates_BTA: float32.
    kernels: of all experts.
    dtype: dtype of the computation.
    stored: `Execution.stored`, if kernels are in fewer bits.
    multiply: their port, as in `models.moe.dispatch`; None: `linear`.
  """
  if stored is not None:
    port = linear if multiply is None else multiply
    y_BTAD = _of_groups(x_BTD, ids_BTA, kernels, dtype, stored, port)
    return _summed(y_BTAD, gates_BTA, dtype)

  def expert(y_BTAD, index):
    kernel = {name: plain.matrix(w, index) for name, w in kernels.items()}
    up_BTF = linear(x_BTD, kernel['up'], None, dtype)
    if 'gate' in kernel:
      hidden_BTF = nn.silu(linear(x_BTD, kernel['gate'], None, dtype)) * up_BTF
    else:
      hidden_BTF = nn.gelu(up_BTF, approximate=True)
    out_BTD = linear(hidden_BTF, kernel['down'], None, dtype)
    is_chosen_BTA = ids_BTA == index
    return jnp.where(
      is_chosen_BTA[..., None], out_BTD[:, :, None, :], y_BTAD
    ), None

  num_experts = kernels['down'].shape[0]
  empty_BTAD = jnp.zeros((*ids_BTA.shape, x_BTD.shape[-1]), dtype)
  y_BTAD, _ = jax.lax.scan(expert, empty_BTAD, jnp.arange(num_experts))
  return _summed(y_BTAD, gates_BTA, dtype)


def _of_groups(x_BTD, ids_BTA, kernels, dtype, stored, port) -> jax.Array:
  """Returns the outputs of the experts of each token, [B, T, A, D]."""

  def grouped(name, x_JI, sizes_E):
    return stored_product.grouped(
      x_JI, kernels[name], sizes_E, dtype, port, stored
    )

  y_MAD = dispatch.outputs(x_BTD, ids_BTA, kernels, dtype, grouped)
  return y_MAD.reshape((*ids_BTA.shape, -1))


def _summed(y_BTAD, gates_BTA, dtype) -> jax.Array:
  def summed(y_BTAD, gates_BTA):
    y_BTD = jnp.zeros((*y_BTAD.shape[:2], y_BTAD.shape[-1]), jnp.float32)
    for a in range(y_BTAD.shape[2]):  # a fixed order of summation
      y_BTD += y_BTAD[:, :, a].astype(jnp.float32) * gates_BTA[:, :, a, None]
    return y_BTD.astype(dtype)

  # Fused with code before or after it, a product and a sum may be one rounding.
  return isolated.call(summed, y_BTAD, gates_BTA)


def attend_cached(
  q_BTHC: jax.Array,
  cache: kv_cache.Layer,
  positions_BT: jax.Array,
  form: form_lib.Form,
) -> jax.Array:
  """Returns the attention output over pages or a dense cache, [B, T, H, C]."""
  if isinstance(cache, kv_cache.PagedLayer):
    return _attend_paged(q_BTHC, cache, positions_BT, form)
  pages, table_BL = _as_pages(cache)
  return _attend_rows(q_BTHC, pages, table_BL, positions_BT, form)


def _attend_paged(q_1THC, cache, positions_1T, form):
  num_decodes = cache.decode_table_DL.shape[0]
  num_chunks = cache.chunk_table_XL.shape[0]
  chunk_tokens = cache.chunk_tokens(q_1THC.shape[1])
  outs = []
  for start, batch, rows, table_BL in (
    (0, num_decodes, 1, cache.decode_table_DL),
    (num_decodes, num_chunks, chunk_tokens, cache.chunk_table_XL),
  ):
    if batch:
      part = slice(start, start + batch * rows)
      q_BRHC = q_1THC[0, part].reshape(batch, rows, *q_1THC.shape[2:])
      positions_BR = positions_1T[0, part].reshape(batch, rows)
      out = _attend_rows(q_BRHC, cache.pages, table_BL, positions_BR, form)
      outs.append(out.reshape(-1, *q_1THC.shape[2:]))
  return jnp.concatenate(outs)[None]


def _attend_rows(q_BTHC, pages, table_BL, positions_BT, form):
  """Attends tile by tile, QUERY_ROWS queries of one sequence at a time."""
  batch, time, heads, channels = q_BTHC.shape
  spare = -time % QUERY_ROWS
  q_BTHC = jnp.pad(q_BTHC, ((0, 0), (0, spare), (0, 0), (0, 0)))
  # Position -1 marks padding, which sees nothing.
  positions_BT = jnp.pad(positions_BT, ((0, 0), (0, spare)), constant_values=-1)
  tiles = (time + spare) // QUERY_ROWS

  def attend(q_BRHC, pages, table_BL, positions_BR):
    return paged.attend_rows(
      q_BRHC, pages, table_BL, positions_BR, form, group=1
    )

  out = isolated.call(
    attend,
    q_BTHC.reshape(batch * tiles, QUERY_ROWS, heads, channels),
    pages,
    jnp.repeat(table_BL, tiles, axis=0),
    positions_BT.reshape(batch * tiles, QUERY_ROWS),
  )
  return out.reshape(batch, -1, heads, channels)[:, :time]


def _as_pages(cache: kv_cache.LayerCache | kv_cache.LatentCache):
  """Returns a dense cache as pages of one tile each, and their page table."""
  slots = paged.TILE_SLOTS
  batch, num_kv, length, channels = cache[0].shape
  # Keys and values alternate on axis Y, as in `kv_cache.Pages`.
  kv = jnp.stack([each.swapaxes(1, 2) for each in cache], axis=3)
  kv = jnp.pad(kv, ((0, 0), (0, -length % slots), *[(0, 0)] * 3))
  kv_PQYC = kv.reshape(-1, slots, len(cache) * num_kv, channels)
  table_BL = jnp.arange(kv_PQYC.shape[0], dtype=jnp.int32).reshape(batch, -1)
  return kv_cache.Pages(kv_PQYC), table_BL


def by_row(function: Callable[[jax.Array], Any], x: jax.Array) -> Any:
  """Applies `function` to the rows of x [..., I], TILE_ROWS at a time.

  Returns:
    The arrays that `function` returns, with the leading axes of x in place of
    their first axis, the axis of the rows.
  """
  rows = x.reshape(-1, x.shape[-1])
  num_rows = rows.shape[0]
  rows = jnp.pad(rows, ((0, -num_rows % TILE_ROWS), (0, 0)))

  def tile(x_RI):
    # XLA removes a loop of one iteration, and would then fuse the tile with the
    # code around it, which may reorder a sum.
    return isolated.call(function, x_RI)

  tiles = jax.lax.map(tile, rows.reshape(-1, TILE_ROWS, x.shape[-1]))

  def flat(y):
    y = y.reshape(-1, *y.shape[2:])[:num_rows]
    return y.reshape(*x.shape[:-1], *y.shape[1:])

  return jax.tree.map(flat, tiles)


def _product(x_RI: jax.Array, w_IO: jax.Array) -> jax.Array:
  return jax.lax.dot_general(
    x_RI, w_IO, (((1,), (0,)), ((), ())), preferred_element_type=jnp.float32
  )
