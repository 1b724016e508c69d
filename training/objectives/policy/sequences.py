"""Sums along the completions of packed rows, in any layout of time.

A segment is one completion with its prompt. Its trained tokens have a weight
above 0; tokens between them, as the results of tools, have none. Tokens of a
row may be in any order: a mesh that splits time reorders them.
"""

import jax
import jax.numpy as jnp

from training.objectives import port, segments


def totals(values_BT: jax.Array, batch: port.Batch) -> jax.Array:
  """Returns at each token the sum of its segment, [B, T]; 0 in padding."""
  segment_ids_BT = batch['segment_ids']
  return segments.spread(
    segments.sums(values_BT, segment_ids_BT), segment_ids_BT
  )


def to_go(values_BT: jax.Array, batch: port.Batch) -> jax.Array:
  """Returns the sum from each token to the end of its segment, [B, T]."""
  order = _Order(batch)
  found_BT = _backwards(order.goes_on_BT, order.sorted(values_BT))
  return order.restored(found_BT)


def advantages_and_returns(
  rewards_BT: jax.Array,
  values_BT: jax.Array,
  weights_BT: jax.Array,
  batch: port.Batch,
  *,
  discount: float,
  decay: float,
) -> tuple[jax.Array, jax.Array]:
  """Returns generalised advantage estimates, and the returns, [B, T].

    delta_t = r_t + discount V_{t+1} - V_t
    A_t = delta_t + discount decay A_{t+1}        R_t = A_t + V_t

  t + 1 is the next trained token of the segment, after whose last token the
  value is 0. Both are 0 at tokens that are not trained. A reward at such a
  token counts, undiscounted, for the trained tokens before it.

  Args:
    rewards_BT: the reward after each token.
    values_BT: the value of the text before each target.
    weights_BT: above 0 at trained tokens.
    discount: gamma of the paper.
    decay: lambda of the paper.

  Reference: arXiv:1506.02438, equations 11 to 16.
  """
  order = _Order(batch)
  goes_on_BT = order.goes_on_BT
  is_trained_BT = order.sorted(weights_BT) > 0
  value_BT = jnp.where(is_trained_BT, order.sorted(values_BT), 0.0)
  # Positions up to the next trained token pass on the number after them.
  passes_BT = jnp.where(is_trained_BT, 0.0, goes_on_BT)

  def next_of(numbers_BT):
    here_BT = _backwards(passes_BT, numbers_BT)
    return goes_on_BT * jnp.roll(here_BT, -1, axis=1)

  next_BT = next_of(value_BT)
  reward_BT = order.sorted(rewards_BT)
  reward_BT += next_of(jnp.where(is_trained_BT, 0.0, reward_BT))
  delta_BT = jnp.where(
    is_trained_BT, reward_BT + discount * next_BT - value_BT, 0.0
  )
  kept_BT = goes_on_BT * jnp.where(is_trained_BT, discount * decay, 1.0)
  found_BT = jnp.where(is_trained_BT, _backwards(kept_BT, delta_BT), 0.0)
  return order.restored(found_BT), order.restored(found_BT + value_BT)


class _Order:
  """The tokens of rows, sorted by segment and position."""

  def __init__(self, batch: port.Batch):
    segment_ids_BT = batch['segment_ids']
    self._order_BT = jnp.lexsort((batch['positions'], segment_ids_BT), axis=1)
    self._back_BT = jnp.argsort(self._order_BT, axis=1)
    sorted_BT = self.sorted(segment_ids_BT)
    is_same_BT = sorted_BT == jnp.roll(sorted_BT, -1, axis=1)
    is_last_T = jnp.arange(sorted_BT.shape[1]) == sorted_BT.shape[1] - 1
    # Whether the next place belongs to the same segment: 1 or 0.
    self.goes_on_BT = jnp.where(
      is_same_BT & (sorted_BT > 0) & ~is_last_T[None, :], 1.0, 0.0
    )

  def sorted(self, values_BT: jax.Array) -> jax.Array:
    return jnp.take_along_axis(values_BT, self._order_BT, axis=1)

  def restored(self, values_BT: jax.Array) -> jax.Array:
    return jnp.take_along_axis(values_BT, self._back_BT, axis=1)


def _backwards(factors_BT: jax.Array, values_BT: jax.Array) -> jax.Array:
  """Returns x_t = values_t + factors_t x_{t+1}, where x_T is 0."""

  def joined(later, earlier):
    (later_factor, later_value), (factor, value) = later, earlier
    return later_factor * factor, value + factor * later_value

  _, found_BT = jax.lax.associative_scan(
    joined, (factors_BT, values_BT), reverse=True, axis=1
  )
  return found_BT
