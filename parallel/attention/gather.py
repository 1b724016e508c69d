"""Attention over gathered keys: every device collects all keys of its rows.

Simpler than a ring, with one collective instead of n - 1. The price is memory
for all keys and values of a layer while the layer is computed. Tokens are in
`context.balanced_order`: the earlier of a device's two parts lies in the first
half of the row and needs the keys of that half only. Call these functions with
the mesh axis `context` in scope.
"""

import jax
import jax.numpy as jnp

from parallel.attention import partial

_AXIS = 'context'


def attend(
  queries: partial.Queries,
  keys: partial.Keys,
  num_shards: int,
  shape: partial.Shape = partial.PLAIN,
) -> tuple[jax.Array, jax.Array]:
  """Returns the output and log-sum-exp of a device's queries, float32."""
  lo, hi = _with_index(queries, num_shards)
  keys = _gathered(keys, num_shards)
  first_half, _ = partial.halves(keys, partial.KEY_AXIS)
  return partial.whole(
    partial.finish(partial.attend(lo, first_half, shape)),
    partial.finish(partial.attend(hi, keys, shape)),
    partial.QUERY_AXIS,
  )


def gradients(
  queries: partial.Queries,
  keys: partial.Keys,
  saved: partial.Saved,
  num_shards: int,
  shape: partial.Shape = partial.PLAIN,
) -> tuple[jax.Array, tuple[jax.Array, jax.Array]]:
  """Returns dq and (dk, dv) of a device's queries and keys, float32."""
  lo, hi = _with_index(queries, num_shards)
  saved_lo, saved_hi = partial.halves(saved, partial.QUERY_AXIS)
  keys = _gathered(keys, num_shards)
  first_half, _ = partial.halves(keys, partial.KEY_AXIS)
  dlo, dkeys_lo = partial.gradients(lo, first_half, saved_lo, shape)
  dhi, dkeys_hi = partial.gradients(hi, keys, saved_hi, shape)

  def scatter(d_BKSC, dlo_BKSC):
    # The lo queries saw the first half of the keys only.
    first, second = partial.halves(d_BKSC, partial.KEY_AXIS)
    d_BKSC = jnp.concatenate([first + dlo_BKSC, second], partial.KEY_AXIS)
    # Sums over all devices; each device keeps the gradients of its own keys.
    return jax.lax.psum_scatter(
      _to_balanced(d_BKSC, num_shards),
      _AXIS,
      scatter_dimension=partial.KEY_AXIS,
      tiled=True,
    )

  dkeys = jax.tree.map(scatter, dkeys_hi, dkeys_lo)
  return partial.whole(dlo, dhi, partial.QUERY_AXIS), dkeys


def _with_index(queries, num_shards):
  """Returns a device's two parts of queries, with their indices in the row."""
  lo, hi = partial.halves(queries, partial.QUERY_AXIS)
  part_T = jnp.arange(lo.q_BKGTC.shape[3])
  device = jax.lax.axis_index(_AXIS)
  start = device * len(part_T)
  start_hi = (2 * num_shards - 1 - device) * len(part_T)
  return lo._replace(index_T=start + part_T), hi._replace(
    index_T=start_hi + part_T
  )


def _gathered(keys: partial.Keys, num_shards: int) -> partial.Keys:
  """Returns the keys of all devices, in the order of the row."""

  def collect(x):
    axis = partial.axis_of(x, partial.KEY_AXIS)
    x = jax.lax.all_gather(x, _AXIS, axis=axis, tiled=True)
    x = x.reshape((*x.shape[:axis], num_shards, 2, -1, *x.shape[axis + 1 :]))
    # The hi parts lie in reverse: device 0 holds the last part of the row.
    lo, hi = jnp.moveaxis(x, axis + 1, 0)
    x = jnp.concatenate([lo, jnp.flip(hi, axis)], axis)
    return x.reshape((*x.shape[:axis], -1, *x.shape[axis + 2 :]))

  keys = jax.tree.map(collect, keys)
  return keys._replace(index_S=jnp.arange(keys.k_BKSC.shape[2]))


def _to_balanced(x_BKSC: jax.Array, num_shards: int) -> jax.Array:
  """Returns keys in `context.balanced_order`: the inverse of `_gathered`."""
  batch, num_kv, size, channels = x_BKSC.shape
  x = x_BKSC.reshape(batch, num_kv, 2, num_shards, -1, channels)
  pairs = jnp.stack([x[:, :, 0], jnp.flip(x[:, :, 1], 2)], axis=3)
  return pairs.reshape(batch, num_kv, size, channels)
