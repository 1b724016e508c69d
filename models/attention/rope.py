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
  *,
  max_length: int = 0,
  has_cache: bool = False,
  segment_ids_BT: jax.Array | None = None,
) -> jax.Array:
  """Returns the rotation angle of each pair of channels, radians, [B, T, C/2].

  Angles are computed once per forward pass and shared by all layers. They are
  float32: a bfloat16 angle is wrong by whole turns after a few hundred
  positions.

  Args:
    rotary_width: channels that are rotated, an even number.
    scaling: scaling of the frequencies; None: no scaling.
    max_length: `ModelConfig.max_length`, which chooses the table of `longrope`.
    has_cache: whether the pass has a cache, so that more text may follow; see
      `models.attention.rope_scaling` for `dynamic`.
    segment_ids_BT: the document of each token of a packed row; None: each row
      is one document.
  """
  positions = positions_BT.astype(jnp.float32)[:, :, None]
  scaling = scaling or rope_scaling.RopeScaling()
  fixed = rope_scaling.stretched(base, rotary_width, scaling, max_length)
  if scaling.kind != 'dynamic':
    return positions * jnp.asarray(fixed)[None, None, :]
  lengths = positions + 1
  if not has_cache:
    lengths = _document_lengths(lengths, segment_ids_BT)
  return positions * _of_lengths(lengths, base, rotary_width, scaling)


def _document_lengths(ends_BT1, segment_ids_BT):
  """Returns the length of the document of each token, [B, T or 1, 1]."""
  if segment_ids_BT is None:
    return jnp.max(ends_BT1, axis=1, keepdims=True)
  # Not by segment number: the numbers are arbitrary. The compiler fuses the
  # comparison into the maximum, so nothing of size T^2 is stored.
  is_same_BTS = segment_ids_BT[:, :, None] == segment_ids_BT[:, None, :]
  ends_B1S = ends_BT1[:, None, :, 0]
  return jnp.max(jnp.where(is_same_BTS, ends_B1S, 0.0), axis=2, keepdims=True)


def _of_lengths(lengths, base, width, scaling):
  """Returns the frequencies for texts of lengths [B, T or 1, 1]."""
  original = scaling.original_length
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
