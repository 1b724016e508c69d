"""Plain causal grouped-query attention, for training, prefill and decode.

`attend` is the only entry point; `models/attention/cached.py` calls it for a
dense cache. Queries are processed in tiles of R rows. A tile is multiplied only
with the keys that its queries can see: keys at or before its last query and,
with a window, keys within the window of its first query. The rest of the score
matrix is never computed, and no [T, T] array exists.

Reference: grouped-query attention, Ainslie et al., arXiv:2305.13245.
"""

from collections.abc import Callable
from typing import NamedTuple

import jax
import jax.numpy as jnp

from models.attention import finite, form as form_lib

# Tiles of R query rows skip a share (1 - R/T) / 2 of the score matrix. Smaller
# tiles skip more; larger ones multiply bigger matrices and compile less code.
MIN_TILE_ROWS = 64
MAX_TILES = 16
# The same for accelerators, whose compilers take seconds for each tile: with
# all 16 tiles of a row of 4096 tokens apart, the backward pass of one layer is
# 278 kernels. Tiles beyond FEW_TILES are the steps of loops.
MIN_WIDE_ROWS = 256
FEW_TILES = 4

# Finite: a row with every key masked gives zeros and finite gradients, where
# -inf would give NaN.
_MASKED = -1e30

Dropout = Callable[[jax.Array], jax.Array]


def attend(
  q_BTHC: jax.Array,
  k_BKSC: jax.Array,
  v_BKSC: jax.Array,
  *,
  slots_BT: jax.Array | None = None,
  segment_ids_BT: jax.Array | None = None,
  dropout: Dropout | None = None,
  form: form_lib.Form = form_lib.Form(),
  min_rows: int = MIN_TILE_ROWS,
  max_apart: int = MAX_TILES,
) -> jax.Array:
  """Returns the attention output, [B, T, H, C], in the dtype of the queries.

  Args:
    q_BTHC: queries; head h uses key/value head h // (H / K).
    k_BKSC: keys, one per slot.
    v_BKSC: values, one per slot. They may have another C than the keys; the
      output has the C of the values.
    slots_BT: the slot of each query; a query sees the slots up to its own.
      None if the keys belong to this call: S = T, and query t is in slot t.
    segment_ids_BT: queries and keys of different segments do not see each
      other. Only without `slots_BT`: a cache holds one document per sequence.
    dropout: applied to the attention weights.
    min_rows: the fewest rows of a tile.
    max_apart: the most tiles that the program computes separately. If there are
      more, neighbouring tiles are steps of a loop over the same keys, so some
      keys are multiplied in vain. With dropout tiles are larger instead: a loop
      would drop the same weights in each step.
  """
  batch, time, heads, channels = q_BTHC.shape
  num_kv = k_BKSC.shape[1]
  q_BTKGC = q_BTHC.reshape(batch, time, num_kv, heads // num_kv, channels)
  q_BKGTC = q_BTKGC.transpose(0, 2, 3, 1, 4) * form.scale_of(channels)
  operands = _parted(q_BKGTC, k_BKSC, v_BKSC)
  if slots_BT is not None:
    slot_S = jnp.arange(k_BKSC.shape[2], dtype=slots_BT.dtype)
    mask_BTS = form_lib.sees(slot_S[None, None, :], slots_BT[:, :, None], form)
    out_BKGTC = _attend_rows(operands, mask_BTS, dropout, form)
  else:
    most = MAX_TILES if dropout is None else max_apart
    rows = tile_rows(time, min_rows, most)
    # All tiles of a band are multiplied with the keys of its last tile.
    band = rows * -(-time // (rows * max_apart))
    out_BKGTC = _attend_causal(
      operands, segment_ids_BT, dropout, form, (rows, band)
    )
  out_BTKGC = out_BKGTC.transpose(0, 3, 1, 2, 4)
  return out_BTKGC.reshape(batch, time, heads, v_BKSC.shape[3])


def tile_rows(
  time: int, min_rows: int = MIN_TILE_ROWS, max_tiles: int = MAX_TILES
) -> int:
  """Returns R, the query rows of a tile, for a call of `time` tokens."""
  return max(min_rows, -(-time // max_tiles))


class _Operands(NamedTuple):
  """Finite queries, keys and values, and the marks of `finite.parted`."""

  q_BKGRC: jax.Array
  k_BKSC: jax.Array
  v_BKSC: jax.Array
  marks_BKGR: jax.Array  # of queries
  marks_BKS: jax.Array  # of keys and values


def _parted(q_BKGRC, k_BKSC, v_BKSC) -> _Operands:
  # Queries and keys are also replaced: gradients of keys are sums over queries,
  # and gradients of queries are sums over keys.
  q_BKGRC, marks_BKGR = finite.parted(q_BKGRC)
  k_BKSC, marks_BKS = finite.parted(k_BKSC)
  v_BKSC, more_BKS = finite.parted(v_BKSC)
  return _Operands(q_BKGRC, k_BKSC, v_BKSC, marks_BKGR, marks_BKS + more_BKS)


def _attend_causal(operands, segment_ids_BT, dropout, form, sizes):
  """Attends tile by tile, each over the keys that it can see.

  Args:
    sizes: rows of a tile, and rows of a band of tiles.
  """
  time, (rows, band) = operands.q_BKGRC.shape[3], sizes
  outs = []
  for start in range(0, time, band):
    stop = min(start + band, time)
    # The first key that the first query of the band sees.
    first = max(0, start - form.window + 1) if form.window else 0

    def tile(begin, size, first=first, stop=stop):
      return _attend_tile(
        operands, segment_ids_BT, dropout, form, (begin, size), (first, stop)
      )

    whole = (stop - start) // rows
    if whole > 1:
      begins = start + rows * jnp.arange(whole)
      out_NBKGRC = jax.lax.map(lambda begin: tile(begin, rows), begins)
      outs.extend(out_NBKGRC[n] for n in range(whole))
    elif whole:
      outs.append(tile(start, rows))
    if rest := (stop - start) % rows:
      outs.append(tile(stop - rest, rest))
  return jnp.concatenate(outs, axis=3)


def _attend_tile(operands, segment_ids_BT, dropout, form, tile, keys):
  """Attends for some queries over some keys.

  Args:
    tile: the first query, which may be traced, and the number of queries.
    keys: index of the first key, and one past the last key.
  """
  q_BKGTC, k_BKTC, v_BKTC, marks_BKGT, marks_BKT = operands
  (begin, size), (first, stop) = tile, keys

  def queries(x, axis):
    if isinstance(begin, int):
      return jax.lax.slice_in_dim(x, begin, begin + size, axis=axis)
    return jax.lax.dynamic_slice_in_dim(x, begin, size, axis)

  query_R = begin + jnp.arange(size)
  mask = form_lib.sees(
    jnp.arange(first, stop)[None, :], query_R[:, None], form
  )[None]
  if segment_ids_BT is not None:
    query_segments = queries(segment_ids_BT, 1)[:, :, None]
    mask = mask & (query_segments == segment_ids_BT[:, None, first:stop])
  return _attend_rows(
    _Operands(
      queries(q_BKGTC, 3),
      k_BKTC[:, :, first:stop],
      v_BKTC[:, :, first:stop],
      queries(marks_BKGT, 3),
      marks_BKT[:, :, first:stop],
    ),
    mask,
    dropout,
    form,
  )


def _attend_rows(operands: _Operands, mask_BRS, dropout, form):
  """Returns the attention of one tile, whose float32 scores are an array."""
  q_BKGRC, k_BKSC, v_BKSC, marks_BKGR, marks_BKS = operands
  batch, num_kv, groups, rows, channels = q_BKGRC.shape
  # Groups and rows become one axis, so that there is one matrix product per
  # sequence and head. With separate axes, one of size 1, XLA:CPU would
  # transpose the keys instead.
  queries = q_BKGRC.reshape(batch, num_kv, groups * rows, channels)
  scores = jax.lax.dot_general(
    queries,
    k_BKSC,
    (((3,), (3,)), ((0, 1), (0, 1))),
    preferred_element_type=jnp.float32,
  )
  # Softmax in float32, for any dtype of the queries.
  scores_BKGRS = form_lib.capped_scores(
    scores.reshape(batch, num_kv, groups, rows, -1), form
  )
  scores_BKGRS += marks_BKGR[..., None] + marks_BKS[:, :, None, None]
  is_seen_BKGRS = mask_BRS[:, None, None]
  scores_BKGRS = jnp.where(is_seen_BKGRS, scores_BKGRS, _MASKED)
  # The second selection changes no finite weight. A query with a score of NaN
  # has weights of NaN: their gradients may reach only the keys that it sees.
  probs_BKGRS = jax.nn.softmax(scores_BKGRS, axis=-1)
  probs_BKGRS = jnp.where(is_seen_BKGRS, probs_BKGRS, 0)
  if dropout is not None:
    probs_BKGRS = dropout(probs_BKGRS)
  out = jax.lax.dot_general(
    probs_BKGRS.astype(v_BKSC.dtype).reshape(batch, num_kv, groups * rows, -1),
    v_BKSC,
    (((3,), (2,)), ((0, 1), (0, 1))),
    preferred_element_type=jnp.float32,
  )
  return out.reshape((*q_BKGRC.shape[:4], -1)).astype(q_BKGRC.dtype)
