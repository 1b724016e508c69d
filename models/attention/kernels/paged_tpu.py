"""Attention over pages on TPU: JAX's Pallas kernel, ragged paged attention.

`attend` is a port of `models.execution.Execution`. The kernel takes sequences
with any number of queries, which are the last positions of the sequence. It
fetches one tile of pages while it multiplies another. Here, each of the first D
tokens of a call is a sequence with one query, and each chunk of R tokens is a
sequence with R queries.

A chunk holds successive positions, with padding at its end. The kernel gets the
padding first, since the last query of a sequence has its last position. So a
sequence ends at its last real token. The kernel replaces slots past the end by
zeros, but it multiplies every slot before: slots that were never written may
hold NaN of the owner before. Padding may have positions below 0, which see
nothing; the result of padding is undefined, as in every other port.

The kernel adds its mask to the scores, so a key that is NaN also spoils queries
that do not see it. A chunk therefore ends before its first token whose key or
value is not finite: the kernel gets that token and the next ones as padding,
and their results are NaN. One case is left: a token that a local window has
left behind spoils the later queries of its own sequence, which other ports keep
clean. The engine ends such a sequence with an error on every path.

The kernel has one scale for a whole pool, but int8 pages have one scale per
token and head. `models.attention.paged` attends over int8 pages, and
`models.attention.dense` over a dense cache.
"""

from typing import Any, Literal

import jax
from jax.experimental.pallas.ops.tpu.ragged_paged_attention import (
  kernel as kernel_lib,
)
import jax.numpy as jnp

from models import kv_cache
from models.attention import cached, form as form_lib, supports

# Limits of a tile of keys and values. Pages: each is a copy instruction in the
# program, and no entry of JAX's table of tuned sizes has more. Slots: 128 to
# 1,024 are the fastest in that table, at most page sizes. Bytes: two tiles are
# in on-chip memory at a time.
MAX_TILE_PAGES = 16
MAX_TILE_SLOTS = 512
MAX_TILE_BYTES = 2 * 2**20
# Limits of a tile of queries. Rows: the smallest value of that table, and its
# most frequent, because each decoding token costs as much as all rows of a
# tile. Rows times heads: each of them needs 128 floats for its maximum, 128 for
# its sum, 128 for its result, and a score per slot of a tile. Twice as many
# exceed the 16 MiB of on-chip memory that a kernel may use on TPU v5.
MAX_QUERY_ROWS = 32
MAX_QUERIES = 2048


def attend(
  q_BTHC: jax.Array,
  cache: kv_cache.Layer,
  positions_BT: jax.Array,
  form: form_lib.Form,
  *,
  implementation: Literal['kernel', 'reference'] = 'kernel',
) -> jax.Array:
  """Returns the attention output, [B, T, H, C]; see `models.attention.cached`.

  Args:
    q_BTHC: queries, [1, T, H, C] over pages. Pages may be wider than C, with
      zeros in the channels beyond C.
    cache: the cache of one layer, with the keys of this call already written.
    positions_BT: the position of each query; the result of a negative one is
      undefined.
    implementation: reference runs JAX's own reference of the kernel, on any
      device, from the same arguments. It is for tests and cannot be traced.

  Raises:
    ValueError: a call that `supports.PAGED_TPU` refuses.
  """
  is_paged = isinstance(cache, kv_cache.PagedLayer)
  if not is_paged or cache.pages.scale_PQY is not None:
    return cached.attend(q_BTHC, cache, positions_BT, form)
  supports.check(supports.PAGED_TPU, supports.of_call(q_BTHC, cache, form))
  heads, channels = q_BTHC.shape[2:]
  kernel: Any = kernel_lib.ref_ragged_paged_attention
  tiles = {}
  if implementation == 'kernel':
    kernel = kernel_lib.ragged_paged_attention
    tiles = tile_sizes(q_BTHC.shape[1], heads, cache)
  width = cache.pages.kv_PQYC.shape[3]
  positions_T, is_cut_T = _cut(cache, positions_BT[0])
  order_T, back_T = _padding_first(cache, positions_T)
  out_THC = kernel(
    jnp.pad(q_BTHC[0, order_T], ((0, 0), (0, 0), (0, width - channels))),
    cache.pages.kv_PQYC,
    *sequences(cache, positions_T),
    sm_scale=form.scale_of(channels),
    sliding_window=form.window or None,
    soft_cap=form.softcap or None,
    **tiles,
  )
  out_THC = out_THC[back_T, :, :channels]
  return jnp.where(is_cut_T[:, None, None], jnp.nan, out_THC)[None]


def sequences(
  cache: kv_cache.PagedLayer, positions_T: jax.Array
) -> tuple[jax.Array, jax.Array, jax.Array, jax.Array]:
  """Returns a call's tokens as the sequences of the kernel, B = D + X.

  Returns:
    The length of each sequence up to its last query, [B]; the pages of each,
    [B, L]; the bounds of their queries among the tokens of the call, [B + 1];
    and the number of sequences, [1].
  """
  num_decodes, num_chunks = (
    table.shape[0] for table in (cache.decode_table_DL, cache.chunk_table_XL)
  )
  rows = cache.chunk_tokens(positions_T.shape[0])
  queries_B = [1] * num_decodes + [rows] * num_chunks
  last_B = jnp.concatenate(
    [
      positions_T[:num_decodes],
      jnp.max(positions_T[num_decodes:].reshape(num_chunks, rows), axis=1),
    ]
    if rows
    else [positions_T[:num_decodes]]
  )
  # A sequence without a token (position -1) still gets a slot: the kernel
  # fetches a tile of every sequence, and waits for it where it is used.
  lengths_B = jnp.maximum(last_B + 1, 1)
  ends = jnp.cumsum(jnp.asarray([0, *queries_B], jnp.int32))
  table_BL = jnp.concatenate([cache.decode_table_DL, cache.chunk_table_XL])
  count = jnp.asarray([num_decodes + num_chunks], jnp.int32)
  return lengths_B.astype(jnp.int32), table_BL, ends.astype(jnp.int32), count


def _cut(
  cache: kv_cache.PagedLayer, positions_T: jax.Array
) -> tuple[jax.Array, jax.Array]:
  """Ends chunks before their first token that is not finite.

  Returns:
    The positions, -1 for tokens that are cut off, and which tokens are, [T].
  """
  num_decodes = cache.decode_table_DL.shape[0]
  rows = cache.chunk_tokens(positions_T.shape[0])
  positions_XR = positions_T[num_decodes:].reshape(-1, max(rows, 1))
  pool = cache.pages.kv_PQYC
  page_size = pool.shape[1]
  slots_XR = jnp.maximum(positions_XR, 0)
  page_XR = jnp.take_along_axis(
    cache.chunk_table_XL, slots_XR // page_size, axis=1
  )
  kv_XRYC = pool[page_XR, slots_XR % page_size].astype(jnp.float32)
  is_bad_XR = ~jnp.all(jnp.isfinite(kv_XRYC), axis=(2, 3)) & (positions_XR >= 0)
  is_cut_XR = jax.lax.cummax(is_bad_XR.astype(jnp.int32), axis=1) > 0
  is_cut_T = jnp.concatenate(
    [jnp.zeros((num_decodes,), jnp.bool_), is_cut_XR.reshape(-1)]
  )
  return jnp.where(is_cut_T, -1, positions_T), is_cut_T


def _padding_first(
  cache: kv_cache.PagedLayer, positions_T: jax.Array
) -> tuple[jax.Array, jax.Array]:
  """Returns the order of tokens with padding first in chunks, and its inverse.

  Both are [T].
  """
  num_decodes = cache.decode_table_DL.shape[0]
  rows = cache.chunk_tokens(positions_T.shape[0])
  place_T = jnp.arange(positions_T.shape[0])
  if not rows:
    return place_T, place_T
  first_X1 = place_T[num_decodes::rows][:, None]
  is_real_XR = positions_T[num_decodes:].reshape(-1, rows) >= 0
  length_X1 = jnp.sum(is_real_XR, axis=1, keepdims=True)

  def turned(by_X1):
    places_XR = first_X1 + (jnp.arange(rows)[None, :] + by_X1) % rows
    return jnp.concatenate([place_T[:num_decodes], places_XR.reshape(-1)])

  return turned(length_X1), turned(-length_X1)


def tile_sizes(
  time: int, heads: int, cache: kv_cache.PagedLayer
) -> dict[str, int]:
  """Returns the pages and the query rows that are in on-chip memory at a time.

  The sizes are the largest that fit. JAX's default looks them up for the first
  device of this process, which is another device when a program is compiled
  ahead of time.
  """
  pool = cache.pages.kv_PQYC
  _, page_size, _, width = pool.shape
  tile_heads, tile_rows = kernel_lib.get_min_heads_per_blk(
    heads, pool.shape[2], pool.dtype, pool.dtype
  )
  slot_bytes = tile_rows * width * pool.dtype.itemsize
  slots = min(MAX_TILE_SLOTS, MAX_TILE_BYTES // slot_bytes)
  pages = min(MAX_TILE_PAGES, max(1, slots // page_size))
  rows = max(1, min(MAX_QUERY_ROWS, MAX_QUERIES // tile_heads))
  return {
    'num_kv_pages_per_block': min(pages, cache.decode_table_DL.shape[1]),
    'num_queries_per_block': min(rows, time),
  }
