"""Rotary position embedding (RoFormer, arXiv:2104.09864, equation 34).

Channel i is paired with channel i + C/2, the layout of Llama checkpoints. The
paper pairs neighbouring channels, which differs only by a permutation. A model
that rotates only some channels of a head rotates the first ones.
"""

import jax
import jax.numpy as jnp

from models.attention import rope_scaling


def angles(
  positions_BT: jax.Array,
  rotary_width: int,
  base: float,
  scaling: rope_scaling.RopeScaling | None = None,
  cached_length: int = 0,
) -> jax.Array:
  """Returns the rotation angle of each pair of channels, radians, [B, T, C/2].

  Angles are computed once per forward pass and shared by all layers. They are
  float32: a bfloat16 angle is wrong by whole turns after a few hundred
  positions.

  Args:
    rotary_width: channels that are rotated, an even number.
    scaling: of the frequencies; None: no scaling.
    cached_length: `ModelConfig.max_length` in a pass with a cache, 0 in a pass
      without; see `models.attention.rope_scaling`.
  """
  positions = positions_BT.astype(jnp.float32)[:, :, None]
  scaling = scaling or rope_scaling.RopeScaling()
  fixed = jnp.asarray(rope_scaling.stretched(base, rotary_width, scaling))
  frequencies = fixed[None, None, :]
  if scaling.kind in ('dynamic', 'longrope'):
    lengths = positions + 1
    if not cached_length:
      lengths = jnp.max(lengths, axis=1, keepdims=True)
    elif scaling.kind == 'longrope':
      lengths = jnp.full((1, 1, 1), cached_length, jnp.float32)
    frequencies = _of_length(lengths, frequencies, base, rotary_width, scaling)
  return positions * frequencies


def _of_length(lengths, short, base, width, scaling):
  """Returns the frequencies for texts of lengths [B or 1, T or 1, 1]."""
  original = scaling.original_length
  if scaling.kind == 'longrope':
    plain = rope_scaling.frequencies(base, width)
    long = jnp.asarray(plain / jnp.asarray(scaling.long_divisors, jnp.float32))
    return jnp.where(lengths > original, long[None, None, :], short)
  # NTK-aware: with the new base, the slowest pair turns as far over the text as
  # it did over the original length. With a single pair, the base has no effect.
  growth = scaling.factor * jnp.maximum(lengths, original) / original
  growth = growth - (scaling.factor - 1)
  bases = base * growth ** (width / max(width - 2, 1))
  exponents = jnp.arange(0, width, 2, dtype=jnp.float32) / width
  return bases ** -exponents[None, None, :]


def rotate(
  x_BTHC: jax.Array, angles_BTc: jax.Array, amplitude: float = 1.0
) -> jax.Array:
  """Returns x with each pair of channels of every head rotated by its angle.

  Channels past twice the number of angles are not changed.
  """
  cos, sin = (f(angles_BTc)[:, :, None, :] for f in (jnp.cos, jnp.sin))
  if amplitude != 1:
    cos, sin = cos * amplitude, sin * amplitude
  width = 2 * angles_BTc.shape[-1]
  first, second = jnp.split(x_BTHC[..., :width].astype(jnp.float32), 2, axis=-1)
  rotated = jnp.concatenate(
    [first * cos - second * sin, second * cos + first * sin], axis=-1
  )
  rotated = rotated.astype(x_BTHC.dtype)
  if width == x_BTHC.shape[-1]:
    return rotated
  return jnp.concatenate([rotated, x_BTHC[..., width:]], axis=-1)
