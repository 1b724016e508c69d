"""Sums of the segments of packed rows: one number per document.

In rows of preferences, a unit is two documents side by side: segments 1 and 2,
3 and 4, and so on. The first is the chosen (or labelled) document, the second
the rejected (or mismatched) document. See data/rows.py.
"""

import jax
import jax.numpy as jnp

# Elements of a row's mask [T, segments] that exist at a time.
_MASK_SIZE = 2**18


@jax.custom_vjp
def sums(values_BT: jax.Array, segment_ids_BT: jax.Array) -> jax.Array:
  """Returns the sum of each segment of each row, float32 [B, units, 2].

  Segment 0, which is padding, has no sum. The number of units is static: as
  many as a row has room for. Absent segments have the sum 0. The order of
  tokens in a row, which context parallelism changes, does not matter.
  """
  batch, time = values_BT.shape
  num_segments = 2 * max(1, time // 2)
  # Masked sums, not a scatter, which GPUs add up in no fixed order. A few
  # segments at a time: the mask of a row of 4096 tokens would have 64 MB.
  step = min(num_segments, max(1, _MASK_SIZE // time))

  def of_some(first):
    number_S = first + jnp.arange(step)
    is_in_BTS = segment_ids_BT[:, :, None] == number_S[None, None, :]
    return jnp.sum(jnp.where(is_in_BTS, values_BT[:, :, None], 0.0), axis=1)

  parts = jax.lax.map(of_some, 1 + jnp.arange(0, num_segments, step))
  sums_BS = parts.swapaxes(0, 1).reshape((batch, -1))[:, :num_segments]
  return sums_BS.reshape((batch, -1, 2))


@jax.custom_vjp
def spread(sums_BU2: jax.Array, segment_ids_BT: jax.Array) -> jax.Array:
  """Returns at each token the number of its segment, [B, T]; 0 in padding.

  The transpose of `sums`.
  """
  return _at_tokens(sums_BU2, segment_ids_BT)


def _at_tokens(sums_BU2, segment_ids_BT):
  sums_BS = sums_BU2.reshape((sums_BU2.shape[0], -1))
  places_BT = jnp.maximum(segment_ids_BT - 1, 0)
  found_BT = jnp.take_along_axis(sums_BS, places_BT, axis=1)
  return jnp.where(segment_ids_BT > 0, found_BT, 0.0)


def _forward(values_BT, segment_ids_BT):
  return sums(values_BT, segment_ids_BT), segment_ids_BT


def _backward(segment_ids_BT, grads_BU2):
  # The gradient of a segment goes to each of its tokens.
  return _at_tokens(grads_BU2, segment_ids_BT), None


sums.defvjp(_forward, _backward)


def _spread_forward(sums_BU2, segment_ids_BT):
  return _at_tokens(sums_BU2, segment_ids_BT), segment_ids_BT


def _spread_backward(segment_ids_BT, grads_BT):
  # A gather's own gradient would be a scatter, see `sums`.
  return sums(grads_BT, segment_ids_BT), None


spread.defvjp(_spread_forward, _spread_backward)
