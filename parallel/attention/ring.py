"""Ring attention: keys travel, queries stay.

Every device sends the keys it holds to the next one and works on them
meanwhile; after a round all have met, and none ever held more than its own and
a neighbour's: memory is O(T / n) (Liu et al., arXiv:2310.01889). The backward
pass goes round once more, and the gradients of keys travel with them.

With tokens in `context.balanced_order` a device i of n has two chunks of a
row's 2n, `lo` = i and `hi` = 2n - 1 - i. Of the keys of another device, lo and
hi see the lo ones, and only those, if that device is earlier (j < i); hi alone
sees both chunks if it is later. That is two chunk pairs, without a mask, either
way: which two is a selection of operands, so that all devices do the same work
and none waits for another. To be called with the mesh axis `context` in scope.

With a window all chunks know their places in the row, and masks hide what is
out of reach; the keys travel all the same.
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
  queries, keys = _placed(queries, keys, num_shards, shape)
  attend_piece = functools.partial(partial.attend, shape=shape)
  lo, hi = partial.halves(queries, partial.QUERY_AXIS)
  own_lo, own_hi = partial.halves(keys, partial.KEY_AXIS)
  held = _pass_on(keys, num_shards)
  parts = (
    attend_piece(*_causal(lo, own_lo)),
    partial.merge(attend_piece(hi, own_lo), attend_piece(*_causal(hi, own_hi))),
  )

  def add(parts, held, hops):
    part_lo, part_hi = parts
    is_earlier = jax.lax.axis_index(_AXIS) >= hops
    held_lo, held_hi = partial.halves(held, partial.KEY_AXIS)
    first = attend_piece(_select(is_earlier, lo, hi), held_lo)
    second = attend_piece(hi, _select(is_earlier, held_lo, held_hi))
    merged = partial.merge(_select(is_earlier, part_lo, part_hi), first)
    part_lo = _select(is_earlier, merged, part_lo)
    part_hi = _select(is_earlier, part_hi, merged)
    return part_lo, partial.merge(part_hi, second)

  def hop(carry, hops):
    parts, held = carry
    # Sent on before it is used: the link works while the device does.
    arriving = _pass_on(held, num_shards)
    return (add(parts, held, hops), arriving), None

  (parts, held), _ = jax.lax.scan(
    hop, (parts, held), jnp.arange(1, num_shards - 1)
  )
  part_lo, part_hi = add(parts, held, num_shards - 1)
  return partial.whole(
    partial.finish(part_lo), partial.finish(part_hi), partial.QUERY_AXIS
  )


def gradients(
  queries: partial.Queries,
  keys: partial.Keys,
  saved: partial.Saved,
  num_shards: int,
  shape: partial.Shape = partial.PLAIN,
) -> tuple[jax.Array, tuple[jax.Array, jax.Array]]:
  """Returns dq and (dk, dv) of a device's queries and keys, float32."""
  queries, keys = _placed(queries, keys, num_shards, shape)
  gradients_of = functools.partial(partial.gradients, shape=shape)
  lo, hi = partial.halves(queries, partial.QUERY_AXIS)
  saved_lo, saved_hi = partial.halves(saved, partial.QUERY_AXIS)
  own_lo, own_hi = partial.halves(keys, partial.KEY_AXIS)
  held = _pass_on(keys, num_shards)
  dlo, dkeys_lo = gradients_of(*_causal(lo, own_lo), saved_lo)
  dhi, dkeys_too = gradients_of(hi, own_lo, saved_hi)
  dhi_too, dkeys_hi = gradients_of(*_causal(hi, own_hi), saved_hi)
  dqueries = dlo, dhi + dhi_too
  dkeys = _add(dkeys_lo, dkeys_too), dkeys_hi

  def add(carry, held, hops):
    (dlo, dhi), dkeys = carry
    # The sums of these keys so far, from the device that had them before.
    dkeys_lo, dkeys_hi = _pass_on(dkeys, num_shards)
    is_earlier = jax.lax.axis_index(_AXIS) >= hops
    held_lo, held_hi = partial.halves(held, partial.KEY_AXIS)
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
  dkeys_lo, dkeys_hi = _pass_on(dkeys, num_shards)  # home
  return (
    partial.whole(dlo, dhi, partial.QUERY_AXIS),
    partial.whole(dkeys_lo, dkeys_hi, partial.KEY_AXIS),
  )


def _pass_on(tree, num_shards):
  """Sends to the next device; returns what the device before sent."""
  ring = [(i, (i + 1) % num_shards) for i in range(num_shards)]
  return jax.tree.map(lambda x: jax.lax.ppermute(x, _AXIS, ring), tree)


def _placed(queries, keys, num_shards, shape):
  """Tells queries and keys their places in the row, where a window asks."""
  if not shape.window:
    return queries, keys
  chunk = jnp.arange(keys.k_BKSC.shape[2] // 2)
  device = jax.lax.axis_index(_AXIS)
  index = jnp.concatenate(
    [
      device * len(chunk) + chunk,
      (2 * num_shards - 1 - device) * len(chunk) + chunk,
    ]
  )
  return queries._replace(index_T=index), keys._replace(index_S=index)


def _causal(queries, keys):
  """Marks queries and keys of the same chunk with their order."""
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
  """Adds the term to one of the two."""
  nothing = jax.tree.map(jnp.zeros_like, term)
  return (
    _add(first, _select(is_first, term, nothing)),
    _add(second, _select(is_first, nothing, term)),
  )
