"""Attention over pages on GPU: a Pallas kernel of our own, lowered by Triton.

`attend` is a port of `models.execution.Execution`. One program takes up to 64
queries that share a key/value head, those of G query heads and of R successive
tokens, finds the pages of one tile of slots after the other in the page table,
and folds the tile in with a running maximum and sum, as the reference in
`models/attention/paged.py` does (Dao et al., arXiv:2205.14135). Tiles that no
query of the program sees are not read, nor are slots beyond the last of them.

Few sequences with long contexts would leave most of a GPU idle: there the tiles
of a program are shared among several, whose results are weighted by their sums
afterwards ("Flash-Decoding for long-context inference", Dao et al. 2023). How
many follows from the shapes of a call: a sequence's last bits may differ from
those it has among more or fewer neighbours. With `num_splits=1` they do not.
"""

import functools

import jax
from jax.experimental import pallas as pl
from jax.experimental.pallas import triton
import jax.numpy as jnp

from models import kv_cache
from models.attention import cached, form as form_lib

# Queries of a program, and warps that it is made of. Tensor cores multiply 16
# rows at least, those of an H100 64 at best. Products of float32 are not theirs
# and take registers: with 64 rows, or half the warps, they do not suffice.
MIN_ROWS = 16
MAX_ROWS, NUM_WARPS = 64, 4
MAX_FLOAT32_ROWS, FLOAT32_WARPS = 32, 8
# Slots of a tile, whatever the page size. Keys and values, twice while the next
# tile is fetched, take 64 KiB in bfloat16 and 128 in float32, of the 163 that a
# program may use on A100 and the 227 on H100. Wider heads: half as many slots.
TILE_SLOTS = 64
MAX_TILE_CHANNELS = 128
MAX_CHANNELS = 256
# Programs that keep a GPU busy, two for each multiprocessor of an H100, and
# slots that are worth a program of their own.
WANTED_PROGRAMS = 264
MIN_SPLIT_SLOTS = 256
# Above 2**32 bytes Pallas addresses an array with 64 bits, else with 32 and a
# sign, which is enough for numbers of two bytes or more.
MAX_INT8_SIZE = 2**31

_DTYPES = 'float32', 'bfloat16', 'float16'
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
  """Returns the attention output, [B, T, H, C]; see `cached_attention`.

  Args:
    q_BTHC: queries, [1, T, H, C] over pages.
    cache: one layer's, already written to; a dense one is attended by
      `cached_attention`.
    positions_BT: of each query; a negative one sees nothing and gets zeros.
    form: how scores are made.
    num_splits: programs that share a sequence's tiles; None: by shapes.
    interpret: run on any device, slowly; for tests.

  Raises:
    ValueError: heads or dtypes that the kernel is not made for.
  """
  if not isinstance(cache, kv_cache.PagedLayer):
    return cached.attend(q_BTHC, cache, positions_BT, form)
  problem = shape_problem(q_BTHC, cache)
  if problem:
    raise ValueError(f'paged attention on GPU: {problem}')
  num_decodes = cache.decode_table_DL.shape[0]
  rows = cache.num_block_rows(q_BTHC.shape[1])
  parts = (
    (cache.decode_table_DL, slice(None, num_decodes), 1),
    (cache.block_table_XL, slice(num_decodes, None), rows),
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


def shape_problem(q_1THC: jax.Array, cache: kv_cache.PagedLayer) -> str:
  """Returns why the kernel does not take a call, or ''; shapes are enough."""
  channels, dtype = q_1THC.shape[3], q_1THC.dtype.name
  stored = cache.pages.kv_PQYC.dtype.name
  if channels > MAX_CHANNELS:
    return (
      f'got heads of {channels} channels, expected at most {MAX_CHANNELS};'
      ' attend by cached_attention.attend'
    )
  is_scaled = cache.pages.scale_PQY is not None
  if dtype not in _DTYPES or stored not in (
    ('int8',) if is_scaled else _DTYPES
  ):
    return (
      f'got queries in {dtype} and pages in {stored}, expected'
      f' {", ".join(_DTYPES)}, or pages in int8 with their scales; attend by'
      ' cached_attention.attend'
    )
  size = cache.pages.kv_PQYC.size
  if is_scaled and MAX_INT8_SIZE <= size <= 2 * MAX_INT8_SIZE:
    return (
      f'got {size} numbers in a pool of int8, expected fewer than'
      f' {MAX_INT8_SIZE}, or more than twice that; change the number of pages'
    )
  return ''


def splits(num_programs: int, num_slots: int) -> int:
  """Returns how many programs share the tiles of each of `num_programs`."""
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
  block_rows = min(max_rows, max(MIN_ROWS, pl.next_power_of_2(num_queries)))
  grid = table_BL.shape[0], num_kv, pl.cdiv(num_queries, block_rows)
  if num_splits is None:
    num_slots = table_BL.shape[1] * pages.page_size
    num_splits = splits(grid[0] * grid[1] * grid[2], num_slots)
  # Parts of a result are added up in float32, a whole one is final.
  dtype = q_THC.dtype if num_splits == 1 else jnp.float32
  out, log_sum = pl.pallas_call(
    functools.partial(
      _kernel,
      form=form,
      num_rows=num_rows,
      num_groups=heads // num_kv,
      block_rows=block_rows,
    ),
    grid=(*grid, num_splits),
    out_shape=(
      jax.ShapeDtypeStruct((num_splits, *q_THC.shape), dtype),
      jax.ShapeDtypeStruct((num_splits, num_tokens, heads), jnp.float32),
    ),
    # Without these, which compiler lowers a kernel depends on JAX's version.
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
  block_rows: int,
):
  """One program: queries of one sequence and head, over a share of its tiles.

  Refs are whole arrays in main memory, [T, H, C], [P, Q, Y, C], [P, Q, Y] or
  None, [B, L], [T], and with the share first [_, T, H, C] and [_, T, H].
  """
  sequence, head, block, share = (pl.program_id(axis) for axis in range(4))
  channels = q_ref.shape[2]
  query_M = block * block_rows + jnp.arange(block_rows)
  # Queries beyond the last would be the next sequence's: never read or written.
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
    return _fold(state, jnp.where(is_seen_MS, scores_MS, _MASKED), v_SC)

  start, stop = _share_of_tiles(position_M, tile_slots, form.window)
  m_M, l_M, sum_MC = jax.lax.fori_loop(
    start,
    stop,
    fold,
    (
      jnp.full((block_rows,), _MASKED, jnp.float32),
      jnp.zeros((block_rows,), jnp.float32),
      jnp.zeros(q_MC.shape, jnp.float32),
    ),
  )
  l_M = jnp.where(l_M == 0, 1.0, l_M)  # nothing was seen: zeros
  triton.store(
    out_ref.at[share, token_M[:, None], head_M[:, None], channel_1C],
    (sum_MC / l_M[:, None]).astype(out_ref.dtype),
    mask=is_place_MC,
  )
  triton.store(
    log_sum_ref.at[share, token_M, head_M], m_M + jnp.log(l_M), mask=is_query_M
  )


def _load(kv_ref, scale_ref, place, is_held_S, q_MC):
  """Returns keys or values of a tile, [S, C], zeros where nothing is held."""
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


def _fold(state, scores_MS, v_SC):
  """Adds a tile to the running maximum, sum of weights, and weighted sum."""
  m_M, l_M, sum_MC = state
  new_m_M = jnp.maximum(m_M, jnp.max(scores_MS, axis=1))
  # A query that saw nothing yet has the masked score for its maximum: without
  # the test, what is masked would weigh exp(0).
  p_MS = jnp.where(
    scores_MS == _MASKED, 0.0, jnp.exp(scores_MS - new_m_M[:, None])
  )
  keep_M = jnp.exp(m_M - new_m_M)
  sum_MC = keep_M[:, None] * sum_MC + _dot(p_MS.astype(v_SC.dtype), v_SC, 0)
  return new_m_M, keep_M * l_M + jnp.sum(p_MS, axis=1), sum_MC


def _share_of_tiles(position_M, tile_slots: int, window: int):
  """Returns this program's first tile, and the one after its last."""
  stop = jax.lax.div(jnp.max(position_M) + tile_slots, tile_slots)
  start = jnp.int32(0)
  if window:
    # Padding (-1) sees nothing and must not widen the range.
    far = jnp.iinfo(jnp.int32).max
    nearest = jnp.min(jnp.where(position_M < 0, far, position_M))
    first = jax.lax.div(jnp.maximum(nearest - window + 1, 0), tile_slots)
    start = jnp.minimum(first, stop)
  share, num_shares = pl.program_id(3), pl.num_programs(3)
  size = jax.lax.div(stop - start + num_shares - 1, num_shares)
  start = jnp.minimum(start + share * size, stop)
  return start, jnp.minimum(start + size, stop)


def _dot(a, b, b_axis: int):
  """A product in float32; of float32 operands, not in TF32's 10 bits."""
  return jax.lax.dot_general(
    a,
    b,
    (((1,), (b_axis,)), ((), ())),
    precision=jax.lax.Precision.HIGHEST,
    preferred_element_type=jnp.float32,
  )
