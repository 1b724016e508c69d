"""Attention over pages in plain JAX: the reference, for every platform.

A query sees the slots up to its own position. Keys and values are gathered in
tiles of a fixed number of slots. The tiles are folded in one after the other
with a running maximum and sum (Milakov and Gimelshein, arXiv:1805.02867; Dao et
al., arXiv:2205.14135). The loop stops at the longest context among the
sequences that share it, so the cost depends on the tokens in the cache, not on
the width of the page table.

A tile beyond the context of a query does not change the result of that query:
the maximum stays, the sums are multiplied by exp(0) = 1, and zeros are added.
So the result does not depend on the page size, the table width, or the lengths
of other sequences.
"""

import math

import jax
import jax.numpy as jnp

from models import kv_cache
from models.attention import finite, form as form_lib

# Slots per tile. On CPU, a tile of a few sequences fits in the cache of a core:
# measured 2 times as fast as tiles of 128, and 6 times as fast as gathering all
# pages first.
TILE_SLOTS = 64
# Decoding sequences that share a loop. The scheduler sorts them by length, so
# that the sequences of a group end together. One loop over 32 sequences was
# half as fast.
DECODE_GROUP = 4

_MASKED = -1e30  # as in models/attention/dense.py


def attend(
  q_1THC: jax.Array,
  cache: kv_cache.PagedLayer,
  positions_1T: jax.Array,
  form: form_lib.Form,
) -> jax.Array:
  """Returns the attention output, [1, T, H, C]; the port `attend_cached`."""
  num_decodes = cache.decode_table_DL.shape[0]
  num_chunks = cache.chunk_table_XL.shape[0]
  rows = cache.chunk_tokens(q_1THC.shape[1])
  outs = []
  if num_decodes:
    outs.append(
      attend_rows(
        q_1THC[0, :num_decodes, None],
        cache.pages,
        cache.decode_table_DL,
        positions_1T[0, :num_decodes, None],
        form,
        group=math.gcd(num_decodes, DECODE_GROUP),
      )[:, 0]
    )
  if num_chunks:
    heads, channels = q_1THC.shape[2:]
    out_XRHC = attend_rows(
      q_1THC[0, num_decodes:].reshape(num_chunks, rows, heads, channels),
      cache.pages,
      cache.chunk_table_XL,
      positions_1T[0, num_decodes:].reshape(num_chunks, rows),
      form,
      group=1,
    )
    outs.append(out_XRHC.reshape(-1, heads, channels))
  return jnp.concatenate(outs)[None]


def attend_rows(
  q_BRHC: jax.Array,
  pages: kv_cache.Pages,
  table_BL: jax.Array,
  positions_BR: jax.Array,
  form: form_lib.Form,
  *,
  group: int,
) -> jax.Array:
  """Attends from R queries of each of B sequences, [B, R, H, C].

  Args:
    table_BL: the pages of each sequence, in order. Their slots are a multiple
      of TILE_SLOTS.
    positions_BR: the position of each query. A query with a negative position
      is padding: it sees nothing, and its result is undefined.
    group: sequences that share a loop over tiles, a divisor of B.

  Raises:
    ValueError: the slots of a page table are not a whole number of tiles.
  """
  if (slots := table_BL.shape[1] * pages.page_size) % TILE_SLOTS:
    # dynamic_slice would move the last tile back until it fits, and the tile
    # would then hold other positions.
    raise ValueError(
      f'page table: got {table_BL.shape[1]} pages of {pages.page_size} tokens,'
      f' {slots} slots, expected a multiple of {TILE_SLOTS}; widen the table'
      ' with page 0'
    )
  batch, rows, heads, channels = q_BRHC.shape
  num_kv = pages.num_kv_heads
  q_BRKGC = q_BRHC.reshape(batch, rows, num_kv, -1, channels)
  # Scaled before the queries are rounded, as in models/attention/dense.py.
  q_BKGRC = q_BRKGC.transpose(0, 2, 3, 1, 4) * form.scale_of(channels)
  num_queries = heads // num_kv * rows
  q_BKMC = q_BKGRC.astype(q_BRHC.dtype).reshape(
    batch, num_kv, num_queries, channels
  )
  split = batch // group, group

  def one_group(args):
    q_BKMC, table_BL, positions_BR = args
    return _attend_group(q_BKMC, table_BL, positions_BR, pages, form, rows)

  grouped = jax.tree.map(
    lambda x: x.reshape(*split, *x.shape[1:]), (q_BKMC, table_BL, positions_BR)
  )
  if split[0] == 1:
    out = one_group(jax.tree.map(lambda x: x[0], grouped))
  else:
    out = jax.lax.map(one_group, grouped)
  out_BKGRC = out.reshape(batch, num_kv, -1, rows, channels)
  out_BRHC = out_BKGRC.transpose(0, 3, 1, 2, 4).reshape(q_BRHC.shape)
  return out_BRHC.astype(q_BRHC.dtype)


def _attend_group(q_BKMC, table_BL, positions_BR, pages, form, rows: int):
  """Returns the output of B sequences, float32 [B, K, M, C], by one loop."""
  batch, num_kv, num_queries, channels = q_BKMC.shape
  repeats = num_queries // rows
  position_B1M = jnp.tile(positions_BR, (1, repeats))[:, None, :]

  def fold(tile, state):
    """Adds a tile to the maximum m, the sum l and the weighted sum."""
    m_BKM, l_BKM, out_BKMC = state
    k_BKSC, v_BKSC = (
      x[..., :channels]
      for x in _gather_tile(pages, table_BL, tile, q_BKMC.dtype)
    )
    v_BKSC, marks_BKS = finite.parted(v_BKSC)
    scores_BKMS = form_lib.capped_scores(
      jnp.einsum(
        'BKMC,BKSC->BKMS', q_BKMC, k_BKSC, preferred_element_type=jnp.float32
      ),
      form,
    )
    scores_BKMS += marks_BKS[:, :, None]
    slot_S = tile * TILE_SLOTS + jnp.arange(TILE_SLOTS)
    is_seen = form_lib.sees(
      slot_S[None, None, None, :], position_B1M[..., None], form
    )
    scores_BKMS = jnp.where(is_seen, scores_BKMS, _MASKED)
    new_m_BKM = jnp.maximum(m_BKM, jnp.max(scores_BKMS, axis=-1))
    # Weights are selected by the mask: a query that has seen no key so far has
    # the maximum _MASKED, and would give masked keys the weight exp(0).
    p_BKMS = jnp.where(is_seen, jnp.exp(scores_BKMS - new_m_BKM[..., None]), 0)
    # Sums so far are relative to the old maximum.
    keep_BKM = jnp.exp(m_BKM - new_m_BKM)
    out_BKMC = keep_BKM[..., None] * out_BKMC + jnp.einsum(
      'BKMS,BKSC->BKMC',
      p_BKMS.astype(v_BKSC.dtype),
      v_BKSC,
      preferred_element_type=jnp.float32,
    )
    return new_m_BKM, keep_BKM * l_BKM + jnp.sum(p_BKMS, axis=-1), out_BKMC

  first, stop = _tile_range(positions_BR, form)
  shape = batch, num_kv, num_queries
  _, l_BKM, out_BKMC = jax.lax.fori_loop(
    first,
    stop,
    fold,
    (jnp.full(shape, _MASKED), jnp.zeros(shape), jnp.zeros((*shape, channels))),
  )
  # If a group has only padding, its loop saw no tile and its sum is 0.
  return out_BKMC / jnp.where(l_BKM == 0, 1.0, l_BKM)[..., None]


def _tile_range(positions_BR, form: form_lib.Form):
  """Returns the first tile that any query sees, and one past the last."""
  stop = jnp.max(positions_BR) // TILE_SLOTS + 1
  if not form.window:
    return 0, stop
  # Padding (position -1) sees nothing, and must not widen the range.
  far = jnp.iinfo(positions_BR.dtype).max
  nearest = jnp.min(jnp.where(positions_BR < 0, far, positions_BR))
  first = jnp.maximum(nearest - form.window + 1, 0) // TILE_SLOTS
  return jnp.minimum(first, stop), stop


def _gather_tile(pages: kv_cache.Pages, table_BL, tile, dtype):
  """Returns the keys and the values of one tile, each [B, K, S, C]."""
  num_pages, page_size, num_heads, channels = pages.kv_PQYC.shape
  batch = table_BL.shape[0]
  # A tile is several pages or a part of one page. A unit is the smaller of the
  # two, so that both cases gather whole units.
  unit = min(page_size, TILE_SLOTS)
  parts = page_size // unit
  if parts > 1:
    page_B1 = jax.lax.dynamic_slice_in_dim(table_BL, tile // parts, 1, axis=1)
    unit_BU = page_B1 * parts + tile % parts
  else:
    per_tile = TILE_SLOTS // unit
    unit_BU = jax.lax.dynamic_slice_in_dim(
      table_BL, tile * per_tile, per_tile, axis=1
    )

  def gather(pool):
    units = pool.reshape(num_pages * parts, unit, *pool.shape[2:])
    return units[unit_BU].reshape(batch, TILE_SLOTS, *pool.shape[2:])

  kv_BSYC = gather(pages.kv_PQYC)
  if pages.scale_PQY is not None:
    scale_BSY = gather(pages.scale_PQY)
    kv_BSYC = kv_cache.numbers(kv_BSYC) * scale_BSY[..., None]
  kv_BSYC = kv_cache.loaded(kv_BSYC, dtype)
  if num_heads == 1:  # latent attention: the keys are the values
    kv_B1SC = kv_BSYC.swapaxes(1, 2)
    return kv_B1SC, kv_B1SC
  kv_BSK2C = kv_BSYC.reshape(batch, TILE_SLOTS, num_heads // 2, 2, channels)
  k_BKSC, v_BKSC = (kv_BSK2C[:, :, :, i].swapaxes(1, 2) for i in (0, 1))
  return k_BKSC, v_BKSC
