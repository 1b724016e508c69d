"""Attention over pages on TPU: JAX's Pallas kernel, ragged paged attention.

`attend` is a port of `models.execution.Execution`. The kernel takes sequences
of any number of queries, the last positions of each, and fetches one block of
pages while it multiplies another. Here each of the first D tokens is a sequence
with one query, and each block of R tokens one with R.

A block's rows are successive positions with padding at the end. The kernel is
told that the block ends R positions after it begins, so that every row that
means something has the position it should. Rows of padding see slots that
nothing was written to, of the sequence's own pages, or where its table ends of
its first page again; what comes of them means nothing, as in any other port.

The kernel has one scale for a whole pool, pages in int8 have one per token and
head. These are attended by `models.attention.paged`, and a dense cache by
`models.attention.dense`.
"""

from typing import Any, Literal

import jax
from jax.experimental.pallas.ops.tpu.ragged_paged_attention import (
  kernel as kernel_lib,
)
import jax.numpy as jnp

from models import kv_cache
from models.attention import cached, form as form_lib

# Channels of a page, no more and no less: the kernel (of jax 0.10) reads every
# other row of a page, which the compiler can do at the width of a register.
LANES = 128
# A block of keys and values: pages, each of them a copy in the program, slots,
# and bytes, of which there are two at a time. No entry of JAX's table of tuned
# sizes has more pages; at most page sizes 128 to 1,024 slots are the fastest.
MAX_BLOCK_PAGES = 16
MAX_BLOCK_SLOTS = 512
MAX_BLOCK_BYTES = 2 * 2**20
# A block of queries: rows, the least in that table and the most frequent, as
# each decoding token costs as much as a block's rows; and rows times heads. A
# head's row takes 128 floats each for maximum, sum and result, and as many
# scores as a block has slots: twice as many rows exceed the 16 MiB of on-chip
# memory that a kernel may use on TPU v5.
MAX_QUERY_ROWS = 32
MAX_QUERIES = 2048
# Heads of a block that is not all of them: rows of a vector register.
HEADS_MULTIPLE = 8
# Entries of the page table, each sequence's padded to lanes. It is in scalar
# memory, 1 MiB, of which lengths and the like need a part.
MAX_TABLE_ENTRIES = 240 * 1024


def attend(
  q_BTHC: jax.Array,
  cache: kv_cache.Layer,
  positions_BT: jax.Array,
  form: form_lib.Form,
  *,
  implementation: Literal['kernel', 'reference'] = 'kernel',
) -> jax.Array:
  """Returns the attention output, [B, T, H, C]; see `cached_attention`.

  Args:
    q_BTHC: queries, [1, T, H, C] over pages. Pages may be wider than C, with
      zeros beyond it.
    cache: one layer's, already written to.
    positions_BT: of each query; what a negative one gets means nothing.
    form: how scores are made.
    implementation: reference computes the same anywhere, by JAX's own account
      of what its kernel does, from the same arguments; for tests, and not to
      be traced.

  Raises:
    ValueError: pages, queries or tables that the kernel does not take.
  """
  if not isinstance(cache, kv_cache.PagedLayer) or _is_int8(cache):
    return cached.attend(q_BTHC, cache, positions_BT, form)
  problem = shape_problem(q_BTHC, cache)
  if problem:
    raise ValueError(f'ragged paged attention: {problem}')
  heads, channels = q_BTHC.shape[2:]
  kernel: Any = kernel_lib.ref_ragged_paged_attention
  blocks = {}
  if implementation == 'kernel':
    kernel = kernel_lib.ragged_paged_attention
    blocks = block_sizes(q_BTHC.shape[1], heads, cache)
  width = cache.pages.kv_PQYC.shape[3]
  out_THC = kernel(
    jnp.pad(q_BTHC[0], ((0, 0), (0, 0), (0, width - channels))),
    cache.pages.kv_PQYC,
    *sequences(cache, positions_BT[0]),
    sm_scale=form.scale_of(channels),
    sliding_window=form.window or None,
    soft_cap=form.softcap or None,
    **blocks,
  )
  return out_THC[None, :, :, :channels]


def sequences(
  cache: kv_cache.PagedLayer, positions_T: jax.Array
) -> tuple[jax.Array, jax.Array, jax.Array, jax.Array]:
  """Returns a call's tokens as the sequences that the kernel knows.

  Returns:
    For each of the D + X sequences the positions up to its last query [B] and
    its pages [B, L]; where in the call its queries begin, and where the last
    one's end [B + 1]; and how many there are [1].
  """
  num_decodes, num_blocks = (
    table.shape[0] for table in (cache.decode_table_DL, cache.block_table_XL)
  )
  rows = cache.num_block_rows(positions_T.shape[0])
  queries_B = [1] * num_decodes + [rows] * num_blocks
  starts_B = jnp.concatenate(
    [
      positions_T[:num_decodes],
      positions_T[num_decodes :: max(rows, 1)],
    ]
  )
  # One without a token sees a slot per query, of whichever page it names.
  lengths_B = jnp.maximum(starts_B, 0) + jnp.asarray(queries_B, jnp.int32)
  ends = jnp.cumsum(jnp.asarray([0, *queries_B], jnp.int32))
  table_BL = jnp.concatenate([cache.decode_table_DL, cache.block_table_XL])
  count = jnp.asarray([num_decodes + num_blocks], jnp.int32)
  return lengths_B.astype(jnp.int32), table_BL, ends.astype(jnp.int32), count


def shape_problem(q_1THC: jax.Array, cache: kv_cache.PagedLayer) -> str:
  """Returns why the kernel does not take a call, or ''; shapes are enough."""
  heads, channels = q_1THC.shape[2:]
  pool = cache.pages.kv_PQYC
  _, page_size, num_rows, width = pool.shape
  if channels > width or width != LANES:
    return (
      f'got heads of {channels} channels in pages of {width}, expected pages of'
      f' {LANES}; store narrower heads with zeros beyond them, or attend by'
      ' cached_attention.attend'
    )
  if q_1THC.dtype != pool.dtype or pool.dtype not in (
    jnp.float32, jnp.bfloat16
  ):  # fmt: skip
    return (
      f'got queries in {q_1THC.dtype.name} and pages in {pool.dtype.name},'
      ' expected both in float32 or both in bfloat16; store pages in the dtype'
      ' of the computation'
    )
  # Rows in registers of 32 bits, which come in tiles of eight.
  num_words = num_rows * pool.dtype.itemsize // 4
  if num_words not in (1, 2, 4) and num_words % 8:
    return (
      f'got {num_rows // 2} key/value heads in {pool.dtype.name}, expected 1, 2'
      ' or 4, or a multiple of 8 (float32: of 4); attend by'
      ' cached_attention.attend'
    )
  block_heads, _ = _heads_of_a_block(heads, pool)
  if block_heads != heads and block_heads % HEADS_MULTIPLE:
    return (
      f'got {heads} query heads over {num_rows // 2} key/value heads in'
      f' {pool.dtype.name}, of which a block has {block_heads}, expected a'
      f' multiple of {HEADS_MULTIPLE}; use bfloat16 or attend by'
      ' cached_attention.attend'
    )
  table_DL, table_XL = cache.decode_table_DL, cache.block_table_XL
  num_sequences = table_DL.shape[0] + table_XL.shape[0]
  entries = num_sequences * (-(-table_DL.shape[1] // LANES) * LANES)
  if entries > MAX_TABLE_ENTRIES:
    return (
      f'got a table of {num_sequences} sequences with {table_DL.shape[1]} pages'
      f' of {page_size} tokens each, {entries} entries, expected at most'
      f' {MAX_TABLE_ENTRIES}; serve fewer at a time or in larger pages'
    )
  return ''


def block_sizes(
  time: int, heads: int, cache: kv_cache.PagedLayer
) -> dict[str, int]:
  """Returns pages and rows of queries that are in on-chip memory at a time.

  By what fits: JAX would look them up for the first device of this process,
  which is not the one that a program is compiled for ahead of time.
  """
  pool = cache.pages.kv_PQYC
  _, page_size, _, width = pool.shape
  block_heads, block_rows = _heads_of_a_block(heads, pool)
  slot_bytes = block_rows * width * pool.dtype.itemsize
  slots = min(MAX_BLOCK_SLOTS, MAX_BLOCK_BYTES // slot_bytes)
  pages = min(MAX_BLOCK_PAGES, max(1, slots // page_size))
  rows = max(1, min(MAX_QUERY_ROWS, MAX_QUERIES // block_heads))
  return {
    'num_kv_pages_per_block': min(pages, cache.decode_table_DL.shape[1]),
    'num_queries_per_block': min(rows, time),
  }


def _heads_of_a_block(heads: int, pool) -> tuple[int, int]:
  """Returns query heads, and keys and values of heads, of a block."""
  return kernel_lib.get_min_heads_per_blk(
    heads, pool.shape[2], pool.dtype, pool.dtype
  )


def _is_int8(cache: kv_cache.PagedLayer) -> bool:
  return cache.pages.scale_PQY is not None
