"""The same bits for a token, whoever it is computed with.

XLA chooses how to add up a matrix product by the shapes of the operands: on CPU
a row of a product of 1, 16 and 32 rows may have three different last bits. So a
token's log-probabilities would depend on how many others are in the step. Here
every product has one shape, whatever the call's: rows are taken in tiles of a
fixed number, the last one padded, one tile after the other. Which row of a tile
a token has, and what the other rows hold, does not matter to a matrix product.

The same goes for whatever adds up within a row, like norms.

These are ports of `models.execution.Execution`; `execution()` has all of them.
What is left to XLA is element by element. Made for proofs, evaluation and
reproducible serving: a single token costs a whole tile.

The idea is that of batch-invariant kernels (He, "Defeating Nondeterminism in
LLM Inference", 2025), by fixing shapes rather than by writing kernels.
"""

from collections.abc import Callable, Mapping
from typing import Any

from flax import linen as nn
import jax
import jax.numpy as jnp

from models import execution as execution_lib, kv_cache
from models.attention import form as form_lib, paged

TILE_ROWS = 32  # of matrix products
# Queries of one sequence that attention handles together; each in its place of
# a tile, whether a prompt brings many of them or a decode step one.
QUERY_ROWS = 8


def execution() -> execution_lib.Execution:
  """Returns the execution of which every port is invariant."""
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
  """Returns x[..., I] @ w[I, O] + bias[O], multiplied in and as `dtype`."""
  w_IO = w_IO.astype(dtype)
  y = by_row(lambda x_RI: _product(x_RI, w_IO).astype(dtype), x.astype(dtype))
  if bias_O is not None:
    y = y + bias_O.astype(dtype).reshape((1,) * (y.ndim - 1) + (-1,))
  return y


def exact_linear(
  x: jax.Array, w_IO: jax.Array, bias_O: jax.Array | None, dtype: Any
) -> jax.Array:
  """Returns the product in full float32 precision, whatever the backend."""
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
  kernels: Mapping[str, jax.Array],
  dtype: Any,
) -> jax.Array:
  """Returns the sum over a token's experts of gate * expert(x), [B, T, D].

  Every expert multiplies every token and what was not asked for is dropped: E/A
  times the work of grouping tokens, whose groups depend on all of them.
  """
  num_active = ids_BTA.shape[-1]

  def expert(y_BTAD, item):
    index, kernel = item
    up_BTF = linear(x_BTD, kernel['up'], None, dtype)
    if 'gate' in kernel:
      hidden_BTF = nn.silu(linear(x_BTD, kernel['gate'], None, dtype)) * up_BTF
    else:
      hidden_BTF = nn.gelu(up_BTF, approximate=True)
    out_BTD = linear(hidden_BTF, kernel['down'], None, dtype)
    is_asked_BTA = ids_BTA == index
    return jnp.where(
      is_asked_BTA[..., None], out_BTD[:, :, None, :], y_BTAD
    ), None

  num_experts = kernels['down'].shape[0]
  empty_BTAD = jnp.zeros((*ids_BTA.shape, x_BTD.shape[-1]), dtype)
  y_BTAD, _ = jax.lax.scan(
    expert, empty_BTAD, (jnp.arange(num_experts), dict(kernels))
  )
  y_BTD = jnp.zeros(x_BTD.shape, jnp.float32)
  for a in range(num_active):  # in this order, always
    y_BTD += y_BTAD[:, :, a].astype(jnp.float32) * gates_BTA[:, :, a, None]
  return y_BTD.astype(dtype)


def attend_cached(
  q_BTHC: jax.Array,
  cache: kv_cache.Layer,
  positions_BT: jax.Array,
  form: form_lib.Form,
) -> jax.Array:
  """Attends over pages or a dense cache: see `models.attention.cached`."""
  if isinstance(cache, kv_cache.PagedLayer):
    return _attend_paged(q_BTHC, cache, positions_BT, form)
  pages, table_BL = _as_pages(cache)
  return _attend_rows(q_BTHC, pages, table_BL, positions_BT, form)


def _attend_paged(q_1THC, cache, positions_1T, form):
  num_decodes = cache.decode_table_DL.shape[0]
  num_blocks = cache.block_table_XL.shape[0]
  block_rows = cache.num_block_rows(q_1THC.shape[1])
  outs = []
  for start, batch, rows, table_BL in (
    (0, num_decodes, 1, cache.decode_table_DL),
    (num_decodes, num_blocks, block_rows, cache.block_table_XL),
  ):
    if batch:
      part = slice(start, start + batch * rows)
      q_BRHC = q_1THC[0, part].reshape(batch, rows, *q_1THC.shape[2:])
      positions_BR = positions_1T[0, part].reshape(batch, rows)
      out = _attend_rows(q_BRHC, cache.pages, table_BL, positions_BR, form)
      outs.append(out.reshape(-1, *q_1THC.shape[2:]))
  return jnp.concatenate(outs)[None]


def _attend_rows(q_BTHC, pages, table_BL, positions_BT, form):
  """Attends in tiles of QUERY_ROWS queries, each by itself."""
  batch, time, heads, channels = q_BTHC.shape
  spare = -time % QUERY_ROWS
  q_BTHC = jnp.pad(q_BTHC, ((0, 0), (0, spare), (0, 0), (0, 0)))
  positions_BT = jnp.pad(positions_BT, ((0, 0), (0, spare)), constant_values=-1)
  tiles = (time + spare) // QUERY_ROWS
  out = paged.attend_rows(
    q_BTHC.reshape(batch * tiles, QUERY_ROWS, heads, channels),
    pages,
    jnp.repeat(table_BL, tiles, axis=0),
    positions_BT.reshape(batch * tiles, QUERY_ROWS),
    form,
    group=1,
  )
  return out.reshape(batch, -1, heads, channels)[:, :time]


def _as_pages(cache: kv_cache.LayerCache | kv_cache.LatentCache):
  """Returns a dense cache as pages of one tile, and their table."""
  slots = paged.TILE_SLOTS
  batch, num_kv, length, channels = cache[0].shape
  kv = jnp.stack([each.swapaxes(1, 2) for each in cache], axis=3)
  kv = jnp.pad(kv, ((0, 0), (0, -length % slots), *[(0, 0)] * 3))
  kv_PQYC = kv.reshape(-1, slots, len(cache) * num_kv, channels)
  table_BL = jnp.arange(kv_PQYC.shape[0], dtype=jnp.int32).reshape(batch, -1)
  return kv_cache.Pages(kv_PQYC), table_BL


def by_row(function: Callable[[jax.Array], Any], x: jax.Array) -> Any:
  """Applies `function` to the rows of x [..., I], TILE_ROWS at a time.

  Returns:
    What it returns, arrays of which the first axis is that of the rows, with
    the leading axes of x instead.
  """
  rows = x.reshape(-1, x.shape[-1])
  num_rows = rows.shape[0]
  rows = jnp.pad(rows, ((0, -num_rows % TILE_ROWS), (0, 0)))

  def tile(x_RI):
    # A loop of one turn is no loop: without barriers XLA would fuse it with
    # what is around it, and a sum may then be added up in another order.
    x_RI = jax.lax.optimization_barrier(x_RI)
    return jax.lax.optimization_barrier(function(x_RI))

  tiles = jax.lax.map(tile, rows.reshape(-1, TILE_ROWS, x.shape[-1]))

  def flat(y):
    y = y.reshape(-1, *y.shape[2:])[:num_rows]
    return y.reshape(*x.shape[:-1], *y.shape[1:])

  return jax.tree.map(flat, tiles)


def _product(x_RI: jax.Array, w_IO: jax.Array) -> jax.Array:
  return jax.lax.dot_general(
    x_RI, w_IO, (((1,), (0,)), ((), ())), preferred_element_type=jnp.float32
  )
