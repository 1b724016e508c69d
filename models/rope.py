"""Rotary position embedding (RoFormer, arXiv:2104.09864, equation 34).

Channel i is paired with channel i + C/2 (the layout of Llama checkpoints),
which differs from the paper's neighbouring pairs by a permutation only.
"""

import jax
import jax.numpy as jnp


def angles(positions_BT: jax.Array, head_width: int, base: float) -> jax.Array:
  """Returns the rotation angle of each pair of channels, radians, [B, T, C/2].

  Computed once per forward pass and shared by all layers, in float32: a
  bfloat16 angle is wrong by whole turns after a few hundred positions.
  """
  pairs = jnp.arange(head_width // 2, dtype=jnp.float32)
  frequencies = base ** (-2.0 * pairs / head_width)
  positions = positions_BT.astype(jnp.float32)[:, :, None]
  return positions * frequencies[None, None, :]


def rotate(x_BTHC: jax.Array, angles_BTc: jax.Array) -> jax.Array:
  """Rotates each pair of channels of every head by its angle."""
  cos, sin = (f(angles_BTc)[:, :, None, :] for f in (jnp.cos, jnp.sin))
  first, second = jnp.split(x_BTHC.astype(jnp.float32), 2, axis=-1)
  rotated = jnp.concatenate(
    [first * cos - second * sin, second * cos + first * sin], axis=-1
  )
  return rotated.astype(x_BTHC.dtype)
