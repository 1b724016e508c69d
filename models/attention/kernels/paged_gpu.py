"""Attention over pages on GPU: a Pallas kernel of this project, by Triton.

`attend` is a port of `models.execution.Execution`. One program computes up to
64 queries that share a key/value head: G query heads times R successive tokens.
It looks up the pages of one tile of slots after the other, and folds each tile
in with a running maximum and sum, as the reference in
`models/attention/paged.py` does (Dao et al., arXiv:2205.14135). A program does
not read tiles that none of its queries sees, nor slots past its last position.

A few sequences with long contexts would leave most of a GPU idle. Then several
programs share the tiles of a sequence, and their results are combined with
their sums as weights ("Flash-Decoding for long-context inference", Dao et al.
2023). The number of programs follows from the shapes of a call. So the last
bits of a sequence may differ when other sequences join; with `num_splits=1`
they do not.
"""

import functools

import jax
from jax.experimental import pallas as pl
from jax.experimental.pallas import triton
import jax.numpy as jnp

from models import kv_cache
from models.attention import cached, form as form_lib, supports

# Queries of a program, and its warps. Tensor cores multiply at least 16 rows;
# an H100's are best at 64. Float32 products do not run on tensor cores
# and need registers: 64 rows, or half the warps, would exceed the registers.
MIN_ROWS = 16
MAX_ROWS, NUM_WARPS = 64, 4
MAX_FLOAT32_ROWS, FLOAT32_WARPS = 32, 8
# Slots of a tile, for every page size. Keys and values of two tiles (the next
# one is fetched meanwhile) take 64 KiB in bfloat16 and 128 KiB in float32. A
# program may use 163 KiB on A100 and 227 KiB on H100. Heads wider than
# MAX_TILE_CHANNELS have tiles of half as many slots.
TILE_SLOTS = 64
MAX_TILE_CHANNELS = 128
# The number of programs that keep a GPU busy, two for each multiprocessor of an
# H100, and the fewest slots that are worth a separate program.
WANTED_PROGRAMS = 264
MIN_SPLIT_SLOTS = 256
_MASKED = -1e30  # as in models/attention/dense.py


def attend(
  q_BTHC: jax.Array,
  cache: kv_cache.Layer,
  positions_BT: jax.Array,
  form: form_lib.Form,
  *,
  num_splits: int | None = None,
  interpret: bool = False,
) -> jax.Array:
  """Returns the attention output, [B, T, H, C]; see `models.attention.cached`.

  Args:
    cache: the cache of one layer, with the keys of this call already written.
      `models.attention.cached` attends over a dense one.
    positions_BT: the position of each query. A query with a negative position
      sees nothing, and its result is zero.
    num_splits: programs that share the tiles of a sequence; None: `splits`.
    interpret: run on any device, slowly; for tests.

  Raises:
    ValueError: a call that `supports.PAGED_GPU` refuses.
  """
  if not isinstance(cache, kv_cache.PagedLayer):
    return cached.attend(q_BTHC, cache, positions_BT, form)
  supports.check(supports.PAGED_GPU, supports.of_call(q_BTHC, cache, form))
  num_decodes = cache.decode_table_DL.shape[0]
  rows = cache.chunk_tokens(q_BTHC.shape[1])
  parts = (
    (cache.decode_table_DL, slice(None, num_decodes), 1),
    (cache.chunk_table_XL, slice(num_decodes, None), rows),
  )
  outs = [
    _attend_rows(
      q_BTHC[0, tokens],
      cache.pages,
      table_BL,
      positions_BT[0, tokens],
      form,
      num_rows=num_rows,
      num_splits=num_splits,
      interpret=interpret,
    )
    for table_BL, tokens, num_rows in parts
    if table_BL.shape[0]
  ]
  return jnp.concatenate(outs)[None]


def splits(num_programs: int, num_slots: int) -> int:
  """Returns the number of programs that share the tiles of each program."""
  wanted = -(-WANTED_PROGRAMS // num_programs)
  return max(1, min(wanted, num_slots // MIN_SPLIT_SLOTS))


def _attend_rows(
  q_THC,
  pages: kv_cache.Pages,
  table_BL,
  positions_T,
  form: form_lib.Form,
  *,
  num_rows: int,
  num_splits: int | None,
  interpret: bool,
):
  """Attends from `num_rows` successive tokens of each sequence, [T, H, C]."""
  num_tokens, heads, channels = q_THC.shape
  num_kv = pages.kv_PQYC.shape[2] // 2
  num_queries = heads // num_kv * num_rows
  max_rows, num_warps = MAX_ROWS, NUM_WARPS
  if q_THC.dtype == jnp.float32:
    max_rows, num_warps = MAX_FLOAT32_ROWS, FLOAT32_WARPS
    if channels > MAX_TILE_CHANNELS:
      max_rows //= 2
  tile_rows = min(max_rows, max(MIN_ROWS, pl.next_power_of_2(num_queries)))
  grid = table_BL.shape[0], num_kv, pl.cdiv(num_queries, tile_rows)
  if num_splits is None:
    num_slots = table_BL.shape[1] * pages.page_size
    num_splits = splits(grid[0] * grid[1] * grid[2], num_slots)
  # Partial results are added up in float32; a single one is final.
  dtype = q_THC.dtype if num_splits == 1 else jnp.float32
  out, log_sum = pl.pallas_call(
    functools.partial(
      _kernel,
      form=form,
      num_rows=num_rows,
      num_groups=heads // num_kv,
      tile_rows=tile_rows,
    ),
    grid=(*grid, num_splits),
    out_shape=(
      jax.ShapeDtypeStruct((num_splits, *q_THC.shape), dtype),
      jax.ShapeDtypeStruct((num_splits, num_tokens, heads), jnp.float32),
    ),
    # Without these parameters, the version of JAX decides whether Triton or
    # another compiler lowers the kernel.
    compiler_params=triton.CompilerParams(num_warps=num_warps, num_stages=2),
    interpret=interpret,
    name='paged_attention',
  )(q_THC, pages.kv_PQYC, pages.scale_PQY, table_BL, positions_T)
  if num_splits == 1:
    return out[0]
  weight = jax.nn.softmax(log_sum, axis=0)
  return jnp.sum(weight[..., None] * out, axis=0).astype(q_THC.dtype)


def _kernel(
  q_ref,
  kv_ref,
  scale_ref,
  table_ref,
  position_ref,
  out_ref,
  log_sum_ref,
  *,
  form: form_lib.Form,
  num_rows: int,
  num_groups: int,
  tile_rows: int,
):
  """Computes one program: a sequence, a head, and a share of the tiles.

  Refs are whole arrays in main memory: q [T, H, C], kv [P, Q, Y, C], scale
  [P, Q, Y] or None, table [B, L], position [T]. The outputs have the share as
  their first axis: [_, T, H, C] and [_, T, H].
  """
  sequence, head, tile, share = (pl.program_id(axis) for axis in range(4))
  channels = q_ref.shape[2]
  query_M = tile * tile_rows + jnp.arange(tile_rows)
  # Queries past the last one belong to the next sequence: the mask keeps this
  # program from reading or writing them.
  is_query_M = query_M < num_rows * num_groups
  token_M = sequence * num_rows + jax.lax.div(query_M, num_groups)
  head_M = head * num_groups + jax.lax.rem(query_M, num_groups)
  channel_1C = jnp.arange(pl.next_power_of_2(max(channels, MIN_ROWS)))[None, :]
  is_place_MC = is_query_M[:, None] & (channel_1C < channels)
  position_M = triton.load(position_ref.at[token_M], mask=is_query_M, other=-1)
  q_MC = triton.load(
    q_ref.at[token_M[:, None], head_M[:, None], channel_1C],
    mask=is_place_MC,
    other=0,
  )
  scale = form.scale_of(channels)
  tile_slots = TILE_SLOTS
  if channels > MAX_TILE_CHANNELS:
    tile_slots //= 2
  last = jnp.max(position_M)

  def fold(tile, state):
    position_S = tile * tile_slots + jnp.arange(tile_slots)
    is_held_S = position_S <= last
    page_size = kv_ref.shape[1]
    page_S = triton.load(
      table_ref.at[sequence, jax.lax.div(position_S, page_size)],
      mask=is_held_S,
      other=0,
    )
    slot_S = jax.lax.rem(position_S, page_size)
    k_SC, v_SC = (
      _load(kv_ref, scale_ref, (page_S, slot_S, row), is_held_S, q_MC)
      for row in (2 * head, 2 * head + 1)
    )
    scores_MS = form_lib.capped_scores(_dot(q_MC, k_SC, 1) * scale, form)
    is_seen_MS = form_lib.sees(position_S[None, :], position_M[:, None], form)
    return _fold(state, scores_MS, is_seen_MS, v_SC)

  start, stop = _share_of_tiles(position_M, tile_slots, form.window)
  m_M, l_M, sum_MC = jax.lax.fori_loop(
    start,
    stop,
    fold,
    (
      jnp.full((tile_rows,), _MASKED, jnp.float32),
      jnp.zeros((tile_rows,), jnp.float32),
      jnp.zeros(q_MC.shape, jnp.float32),
    ),
  )
  l_M = jnp.where(l_M == 0, 1.0, l_M)  # a query that saw nothing gets zeros
  triton.store(
    out_ref.at[share, token_M[:, None], head_M[:, None], channel_1C],
    (sum_MC / l_M[:, None]).astype(out_ref.dtype),
    mask=is_place_MC,
  )
  triton.store(
    log_sum_ref.at[share, token_M, head_M], m_M + jnp.log(l_M), mask=is_query_M
  )


def _load(kv_ref, scale_ref, place, is_held_S, q_MC):
  """Returns the keys or the values of a tile, [S, C]; empty slots are zero."""
  page_S, slot_S, row = place
  channel_1C = jnp.arange(q_MC.shape[1])[None, :]
  x_SC = triton.load(
    kv_ref.at[page_S[:, None], slot_S[:, None], row, channel_1C],
    mask=is_held_S[:, None] & (channel_1C < kv_ref.shape[3]),
    other=0,
  )
  if scale_ref is not None:
    scale_S = triton.load(
      scale_ref.at[page_S, slot_S, row], mask=is_held_S, other=0
    )
    x_SC = x_SC.astype(jnp.float32) * scale_S[:, None]
  return x_SC.astype(q_MC.dtype)


def _fold(state, scores_MS, is_seen_MS, v_SC):
  """Adds a tile to the running maximum, sum of weights, and weighted sum."""
  m_M, l_M, sum_MC = state
  # As `models.attention.finite`, with operations that Triton can lower: x * 0
  # is NaN where x is not finite, and so is the sum.
  zero_SC = v_SC.astype(jnp.float32) * 0
  v_SC = jnp.where(zero_SC == 0, v_SC, 0)
  scores_MS += jnp.sum(zero_SC, axis=1)[None, :]
  scores_MS = jnp.where(is_seen_MS, scores_MS, _MASKED)
  new_m_M = jnp.maximum(m_M, jnp.max(scores_MS, axis=1))
  # The maximum of a query that has seen nothing yet is the masked score itself:
  # without this test, masked keys would weigh exp(0) = 1.
  p_MS = jnp.where(is_seen_MS, jnp.exp(scores_MS - new_m_M[:, None]), 0.0)
  keep_M = jnp.exp(m_M - new_m_M)
  sum_MC = keep_M[:, None] * sum_MC + _dot(p_MS.astype(v_SC.dtype), v_SC, 0)
  return new_m_M, keep_M * l_M + jnp.sum(p_MS, axis=1), sum_MC


def _share_of_tiles(position_M, tile_slots: int, window: int):
  """Returns the first tile of this program, and one past its last."""
  stop = jax.lax.div(jnp.max(position_M) + tile_slots, tile_slots)
  start = jnp.int32(0)
  if window:
    # Padding (position -1) sees nothing, and must not widen the range.
    far = jnp.iinfo(jnp.int32).max
    nearest = jnp.min(jnp.where(position_M < 0, far, position_M))
    first = jax.lax.div(jnp.maximum(nearest - window + 1, 0), tile_slots)
    start = jnp.minimum(first, stop)
  share, num_shares = pl.program_id(3), pl.num_programs(3)
  size = jax.lax.div(stop - start + num_shares - 1, num_shares)
  start = jnp.minimum(start + share * size, stop)
  return start, jnp.minimum(start + size, stop)


def _dot(a, b, b_axis: int):
  """Returns a product in float32. HIGHEST keeps float32 operands from TF32."""
  return jax.lax.dot_general(
    a,
    b,
    (((1,), (b_axis,)), ((), ())),
    precision=jax.lax.Precision.HIGHEST,
    preferred_element_type=jnp.float32,
  )
