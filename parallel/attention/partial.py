"""Attention over one part of the keys, and its gradients, on one device.

Context parallelism is built from these functions. Attention over all keys is
merged from attentions over parts of the keys (online softmax: Milakov and
Gimelshein, arXiv:1805.02867). The gradients of a part follow from the
log-sum-exp over all keys (FlashAttention-2, arXiv:2307.08691, algorithm 2).
Scores are float32. They exist for one tile of queries at a time, at most
`MAX_TILE_ROWS` of them.

`Shape` has the settings of `models.attention.form.Form` except the scale: a
window hides keys by their index in the row, a soft-cap bounds scores.

Letters as in `models`: B batch, K key/value heads, G query heads per key/value
head, T queries, R queries of a tile, S keys, C channels per head.
"""

import functools
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp

# Queries of a tile, whose scores exist at once. A larger tile takes more
# memory, a smaller tile reads and writes the gradients of all keys more often.
MAX_TILE_ROWS = 256

# Finite, so that a query that sees no key of this part has finite numbers.
# Merging with a part where it sees a key gives these numbers the weight zero.
_MASKED = -1e30

# The axis of tokens in arrays of queries and of keys. Arrays of fewer axes,
# [B, T] and [T], have tokens last.
QUERY_AXIS = 3
KEY_AXIS = 2


class Shape(NamedTuple):
  """The settings of scores besides their scale. Static."""

  window: int = 0  # visible keys, the query's own included; 0: all before it
  softcap: float = 0.0  # bound of scores; 0: none


PLAIN = Shape()


class Queries(NamedTuple):
  """Queries, already scaled, and the ids that decide which keys they see."""

  q_BKGTC: jax.Array
  segment_ids_BT: jax.Array | None  # None: one segment
  index_T: jax.Array | None = None  # index in the row; None: after all keys


class Keys(NamedTuple):
  """Keys and values, and the ids that decide which queries see them."""

  k_BKSC: jax.Array
  v_BKSC: jax.Array
  segment_ids_BS: jax.Array | None
  index_S: jax.Array | None = None  # index in the row


class Partial(NamedTuple):
  """Attention over a part of the keys, not yet normalised; float32."""

  out_BKGTC: jax.Array  # sum of exp(score - max) * value
  max_BKGT: jax.Array  # of the scores
  sum_BKGT: jax.Array  # of exp(score - max)


class Saved(NamedTuple):
  """Results of attention over all keys, for the gradients of any part."""

  log_sum_BKGT: jax.Array  # log of the sum of exp(score)
  delta_BKGT: jax.Array  # sum over channels of dout * out
  dout_BKGTC: jax.Array


def axis_of(x: jax.Array, axis: int) -> int:
  """Returns the axis of tokens in an array of queries or keys."""
  return min(x.ndim - 1, axis)


def halves(tree: Any, axis: int) -> tuple[Any, Any]:
  """Returns the trees of the first and of the second half of the tokens."""

  def half(x, index):
    return jnp.split(x, 2, axis_of(x, axis))[index]

  return tuple(jax.tree.map(lambda x, i=i: half(x, i), tree) for i in (0, 1))


def whole(first: Any, second: Any, axis: int) -> Any:
  """The inverse of `halves`."""
  return jax.tree.map(
    lambda a, b: jnp.concatenate([a, b], axis_of(a, axis)), first, second
  )


def attend(queries: Queries, keys: Keys, shape: Shape = PLAIN) -> Partial:
  """Returns the attention of the queries over these keys alone.

  With a window, queries and keys need their indices in the row.
  """
  v_BKSC, marks_BKS = _parted(keys.v_BKSC)

  def attend_tile(queries):
    scores_BKGRS, _, is_seen = _scores(queries, keys, shape, marks_BKS)
    max_BKGR = jnp.max(scores_BKGRS, axis=-1)
    weights_BKGRS = jnp.exp(scores_BKGRS - max_BKGR[..., None])
    # Weights are selected, too: for a query that sees no key here, the maximum
    # is _MASKED.
    weights_BKGRS = _selected(is_seen, weights_BKGRS, 0)
    out_BKGRC = _over_keys(weights_BKGRS, v_BKSC)
    return Partial(out_BKGRC, max_BKGR, jnp.sum(weights_BKGRS, axis=-1))

  tiles = jax.lax.map(attend_tile, _split_tiles(queries))
  return jax.tree.map(_join_tiles, tiles)


def merge(a: Partial, b: Partial) -> Partial:
  """Returns the attention of the same queries over the keys of both parts."""
  max_BKGT = jnp.maximum(a.max_BKGT, b.max_BKGT)
  a_BKGT = jnp.exp(a.max_BKGT - max_BKGT)
  b_BKGT = jnp.exp(b.max_BKGT - max_BKGT)
  return Partial(
    a.out_BKGTC * a_BKGT[..., None] + b.out_BKGTC * b_BKGT[..., None],
    max_BKGT,
    a.sum_BKGT * a_BKGT + b.sum_BKGT * b_BKGT,
  )


def finish(partial: Partial) -> tuple[jax.Array, jax.Array]:
  """Returns the output [B, K, G, T, C] and the log-sum-exp [B, K, G, T]."""
  out_BKGTC = partial.out_BKGTC / partial.sum_BKGT[..., None]
  return out_BKGTC, partial.max_BKGT + jnp.log(partial.sum_BKGT)


def gradients(
  queries: Queries, keys: Keys, saved: Saved, shape: Shape = PLAIN
) -> tuple[jax.Array, tuple[jax.Array, jax.Array]]:
  """Returns dq and (dk, dv), float32: the share of these keys and queries."""

  k_BKSC, _ = _parted(keys.k_BKSC)

  def add_tile(totals, tile):
    dk_BKSC, dv_BKSC = totals
    queries, saved = tile
    # A query that is not finite, or sees a key or value that is not, has a
    # log-sum-exp of NaN: marks are needed for `dout` alone.
    q_BKGRC, _ = _parted(queries.q_BKGTC)
    dout_BKGRC, marks_BKGR = _parted(saved.dout_BKGTC)
    scores_BKGRS, slope_BKGRS, is_seen = _scores(queries, keys, shape)
    probs_BKGRS = jnp.exp(scores_BKGRS - saved.log_sum_BKGT[..., None])
    dprobs_BKGRS = _over_channels(saved.dout_BKGTC, keys.v_BKSC)
    # Jacobian of the softmax: dS = P * (dP - delta), where delta is the mean of
    # dP under the weights P.
    dscores_BKGRS = probs_BKGRS * (dprobs_BKGRS - saved.delta_BKGT[..., None])
    dscores_BKGRS = dscores_BKGRS * slope_BKGRS  # through the soft-cap
    dscores_BKGRS = _selected(is_seen, dscores_BKGRS, 0)
    probs_BKGRS = _selected(is_seen, probs_BKGRS + marks_BKGR[..., None], 0)
    dv_BKSC += _over_rows(probs_BKGRS, dout_BKGRC)
    dk_BKSC += _over_rows(dscores_BKGRS, q_BKGRC)
    dq_BKGRC = _over_keys(dscores_BKGRS, k_BKSC)
    return (dk_BKSC, dv_BKSC), dq_BKGRC

  zeros = (
    jnp.zeros(keys.k_BKSC.shape, jnp.float32),
    jnp.zeros(keys.v_BKSC.shape, jnp.float32),
  )
  dkeys, dq = jax.lax.scan(
    add_tile, zeros, (_split_tiles(queries), _split_tiles(saved))
  )
  return _join_tiles(dq), dkeys


def _scores(
  queries: Queries,
  keys: Keys,
  shape: Shape,
  marks_BKS: jax.Array | None = None,
) -> tuple[jax.Array, jax.Array | float, jax.Array | None]:
  """Returns scores [B, K, G, R, S], slopes through the soft-cap, and the mask.

  Scores of invisible keys are `_MASKED`. The slope is the derivative of each
  score by the score before the soft-cap. The mask is None if all is visible.
  """
  scores_BKGRS = _over_channels(queries.q_BKGTC, keys.k_BKSC)
  slope_BKGRS = 1.0
  if shape.softcap:
    tanh_BKGRS = jnp.tanh(scores_BKGRS / shape.softcap)
    scores_BKGRS = shape.softcap * tanh_BKGRS
    slope_BKGRS = 1 - tanh_BKGRS**2
  if marks_BKS is not None:
    scores_BKGRS += marks_BKS[:, :, None, None]
  is_seen = _is_seen(queries, keys, shape)
  return _selected(is_seen, scores_BKGRS, _MASKED), slope_BKGRS, is_seen


def _is_seen(queries: Queries, keys: Keys, shape: Shape) -> jax.Array | None:
  """Returns the mask of visible keys, [B or 1, 1, 1, R, S]."""
  masks = []
  if queries.index_T is not None and keys.index_S is not None:
    query_R1, key_1S = queries.index_T[:, None], keys.index_S[None, :]
    masks.append((key_1S <= query_R1)[None])
    if shape.window:
      masks.append((key_1S > query_R1 - shape.window)[None])
  elif shape.window:
    raise ValueError(
      f'got a window of {shape.window} keys without indices in the row,'
      ' expected index_T and index_S'
    )
  if queries.segment_ids_BT is not None and keys.segment_ids_BS is not None:
    masks.append(
      queries.segment_ids_BT[:, :, None] == keys.segment_ids_BS[:, None, :]
    )
  if not masks:
    return None
  return functools.reduce(jnp.logical_and, masks)[:, None, None]


def _selected(is_seen: jax.Array | None, x_BKGRS, other: float) -> jax.Array:
  return x_BKGRS if is_seen is None else jnp.where(is_seen, x_BKGRS, other)


# A masked key has the weight zero, but 0 x NaN is NaN. As in
# `models.attention.finite`: a vector that is not finite becomes zeros, and a
# mark of NaN goes to the scores, where the mask selects.


def _parted(x: jax.Array) -> tuple[jax.Array, jax.Array]:
  """Returns x [..., C] without the vectors that are not finite, and marks."""
  # No constant NaN: a diagnosis would take it for the first NaN of a run.
  marks = jnp.sum(x.astype(jnp.float32) * 0, axis=-1)
  return jnp.where((marks == 0)[..., None], x, 0), marks


# Products in the dtype of keys and values, accumulated in float32. Query heads
# of a group and the queries of a tile are one axis: there is one matrix product
# per batch row and key/value head.


def _over_channels(x_BKGRC: jax.Array, y_BKSC: jax.Array) -> jax.Array:
  return _product(x_BKGRC, y_BKSC, (3, 3)).reshape(
    (*x_BKGRC.shape[:4], y_BKSC.shape[2])
  )


def _over_keys(x_BKGRS: jax.Array, y_BKSC: jax.Array) -> jax.Array:
  return _product(x_BKGRS.astype(y_BKSC.dtype), y_BKSC, (3, 2)).reshape(
    (*x_BKGRS.shape[:4], y_BKSC.shape[3])
  )


def _over_rows(x_BKGRS: jax.Array, y_BKGRC: jax.Array) -> jax.Array:
  return _product(x_BKGRS.astype(y_BKGRC.dtype), _flat(y_BKGRC), (2, 2))


def _product(x_BKGRI, y_BKJL, contracted):
  return jax.lax.dot_general(
    _flat(x_BKGRI),
    y_BKJL,
    (((contracted[0],), (contracted[1],)), ((0, 1), (0, 1))),
    preferred_element_type=jnp.float32,
  )


def _flat(x_BKGRI: jax.Array) -> jax.Array:
  batch, num_kv, groups, rows, size = x_BKGRI.shape
  return x_BKGRI.reshape(batch, num_kv, groups * rows, size)


def num_tiles(rows: int) -> int:
  """Returns the number of equal tiles into which `rows` queries are cut."""
  least = -(-rows // MAX_TILE_ROWS)
  return next(n for n in range(least, rows + 1) if rows % n == 0)


def _split_tiles(tree: Any) -> Any:
  """Cuts the queries into tiles, which become a first axis."""

  def split(x):
    axis = axis_of(x, QUERY_AXIS)
    tiles = num_tiles(x.shape[axis])
    x = x.reshape((*x.shape[:axis], tiles, -1, *x.shape[axis + 1 :]))
    return jnp.moveaxis(x, axis, 0)

  return jax.tree.map(split, tree)


def _join_tiles(x: jax.Array) -> jax.Array:
  """The inverse, for [tiles, B, K, G, R] and [tiles, B, K, G, R, C]."""
  x = jnp.moveaxis(x, 0, 3)
  return x.reshape((*x.shape[:3], -1, *x.shape[5:]))
