"""Ring attention: keys travel around the devices, queries stay.

Every device sends the keys that it holds to the next device, and computes with
them meanwhile. After one round all queries have met all keys. A device never
holds more than its own keys and one neighbour's: memory is O(T / n) (Liu et
al., arXiv:2310.01889). The backward pass goes round once more; the gradients of
the keys travel with the keys.

Tokens are in `context.balanced_order`: device i of n has two of a row's 2n
parts, `lo` = i and `hi` = 2n - 1 - i. For the keys of another device j:

    j < i   lo and hi see the lo keys, and only these
    j > i   hi sees the lo and the hi keys, lo sees none

Either case is two pairs of parts, without a mask. A `select` of operands
chooses the pairs, so that all devices do the same work and no device waits for
another. Call these functions with the mesh axis `context` in scope.

With a window, queries and keys get their indices in the row, and masks hide the
keys out of reach. All keys travel nevertheless.
"""

import functools

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
  queries, keys = _indexed(queries, keys, num_shards, shape)
  attend_part = functools.partial(partial.attend, shape=shape)
  lo, hi = partial.halves(queries, partial.QUERY_AXIS)
  own_lo, own_hi = partial.halves(keys, partial.KEY_AXIS)
  held = _pass_on(keys, num_shards)
  # Own keys first: the only ones that are partly masked without a window.
  results = (
    attend_part(*_causal(lo, own_lo)),
    partial.merge(attend_part(hi, own_lo), attend_part(*_causal(hi, own_hi))),
  )

  def add(results, held, hops):
    result_lo, result_hi = results
    # The held keys come from device (i - hops) mod n.
    is_earlier = jax.lax.axis_index(_AXIS) >= hops
    held_lo, held_hi = partial.halves(held, partial.KEY_AXIS)
    # Of an earlier device: (lo, lo keys) and (hi, lo keys); of a later device:
    # (hi, lo keys) and (hi, hi keys).
    first = attend_part(_select(is_earlier, lo, hi), held_lo)
    second = attend_part(hi, _select(is_earlier, held_lo, held_hi))
    merged = partial.merge(_select(is_earlier, result_lo, result_hi), first)
    result_lo = _select(is_earlier, merged, result_lo)
    result_hi = _select(is_earlier, result_hi, merged)
    return result_lo, partial.merge(result_hi, second)

  def hop(carry, hops):
    results, held = carry
    # Sent before they are used, so that sending overlaps with computing.
    arriving = _pass_on(held, num_shards)
    return (add(results, held, hops), arriving), None

  (results, held), _ = jax.lax.scan(
    hop, (results, held), jnp.arange(1, num_shards - 1)
  )
  # The last keys are not passed on.
  result_lo, result_hi = add(results, held, num_shards - 1)
  return partial.whole(
    partial.finish(result_lo), partial.finish(result_hi), partial.QUERY_AXIS
  )


def gradients(
  queries: partial.Queries,
  keys: partial.Keys,
  saved: partial.Saved,
  num_shards: int,
  shape: partial.Shape = partial.PLAIN,
) -> tuple[jax.Array, tuple[jax.Array, jax.Array]]:
  """Returns dq and (dk, dv) of a device's queries and keys, float32."""
  queries, keys = _indexed(queries, keys, num_shards, shape)
  gradients_of = functools.partial(partial.gradients, shape=shape)
  lo, hi = partial.halves(queries, partial.QUERY_AXIS)
  saved_lo, saved_hi = partial.halves(saved, partial.QUERY_AXIS)
  own_lo, own_hi = partial.halves(keys, partial.KEY_AXIS)
  held = _pass_on(keys, num_shards)
  dlo, dkeys_lo = gradients_of(*_causal(lo, own_lo), saved_lo)
  dhi, dkeys_too = gradients_of(hi, own_lo, saved_hi)
  dhi_too, dkeys_hi = gradients_of(*_causal(hi, own_hi), saved_hi)
  # Both parts of queries see the device's own lo keys.
  dqueries = dlo, dhi + dhi_too
  dkeys = _add(dkeys_lo, dkeys_too), dkeys_hi

  def add(carry, held, hops):
    (dlo, dhi), dkeys = carry
    # The gradients of the held keys so far, from the device before.
    dkeys_lo, dkeys_hi = _pass_on(dkeys, num_shards)
    is_earlier = jax.lax.axis_index(_AXIS) >= hops
    held_lo, held_hi = partial.halves(held, partial.KEY_AXIS)
    # The same two pairs as in the forward pass.
    dq, dfirst = gradients_of(
      _select(is_earlier, lo, hi),
      held_lo,
      _select(is_earlier, saved_lo, saved_hi),
    )
    dq_hi, dsecond = gradients_of(
      hi, _select(is_earlier, held_lo, held_hi), saved_hi
    )
    dlo, dhi = _add_to(is_earlier, dq, dlo, dhi)
    dkeys_lo, dkeys_hi = _add_to(is_earlier, dsecond, dkeys_lo, dkeys_hi)
    return (dlo, dhi + dq_hi), (_add(dkeys_lo, dfirst), dkeys_hi)

  def hop(carry, hops):
    carry, held = carry
    arriving = _pass_on(held, num_shards)
    return (add(carry, held, hops), arriving), None

  (carry, held), _ = jax.lax.scan(
    hop, ((dqueries, dkeys), held), jnp.arange(1, num_shards - 1)
  )
  (dlo, dhi), dkeys = add(carry, held, num_shards - 1)
  # One more hop brings the gradients back to the device of their keys.
  dkeys_lo, dkeys_hi = _pass_on(dkeys, num_shards)
  return (
    partial.whole(dlo, dhi, partial.QUERY_AXIS),
    partial.whole(dkeys_lo, dkeys_hi, partial.KEY_AXIS),
  )


def _pass_on(tree, num_shards):
  """Sends arrays to the next device; returns the previous device's arrays."""
  ring = [(i, (i + 1) % num_shards) for i in range(num_shards)]
  return jax.tree.map(lambda x: jax.lax.ppermute(x, _AXIS, ring), tree)


def _indexed(queries, keys, num_shards, shape):
  """Gives queries and keys their indices in the row if there is a window."""
  if not shape.window:
    return queries, keys
  part = jnp.arange(keys.k_BKSC.shape[2] // 2)
  device = jax.lax.axis_index(_AXIS)
  index = jnp.concatenate(
    [
      device * len(part) + part,
      (2 * num_shards - 1 - device) * len(part) + part,
    ]
  )
  return queries._replace(index_T=index), keys._replace(index_S=index)


def _causal(queries, keys):
  """Gives queries and keys of the same part their order, for the mask."""
  if queries.index_T is not None:
    return queries, keys
  index = jnp.arange(keys.k_BKSC.shape[2])
  return queries._replace(index_T=index), keys._replace(index_S=index)


def _select(condition, if_true, if_false):
  return jax.tree.map(
    lambda a, b: jax.lax.select(condition, a, b), if_true, if_false
  )


def _add(a, b):
  return jax.tree.map(jnp.add, a, b)


def _add_to(is_first, term, first, second):
  """Adds the term to `first` or to `second`; returns both."""
  nothing = jax.tree.map(jnp.zeros_like, term)
  return (
    _add(first, _select(is_first, term, nothing)),
    _add(second, _select(is_first, nothing, term)),
  )
