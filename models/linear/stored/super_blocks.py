"""Kinds of GGUF blocks of 256 numbers, and kinds with 5 bits or a code book.

A block of 256 numbers has parts of 16 or 32 numbers. The scale of a part has 4
to 8 bits and is multiplied by the float16 scale of the block. Codes of a few
bits lie in planes: a byte holds codes of several numbers, whose places are one
group apart.

Reference: the package gguf, `gguf.quants`; ggml's `ggml-common.h`.
"""

import jax
import jax.numpy as jnp

# IQ4_NL: steps are finer near zero.
BOOK = (
  -127, -104, -83, -65, -49, -35, -22, -10, 1, 13, 25, 38, 53, 69, 89, 113,
)  # fmt: skip


def float16(two: jax.Array) -> jax.Array:
  """Returns float32 [..., 1] of the bytes [..., 2] of a float16."""
  half = jax.lax.bitcast_convert_type(two, jnp.float16)
  return half[..., None].astype(jnp.float32)


def planes(packed: jax.Array, group: int, bits: int) -> jax.Array:
  """Returns codes: of each group of bytes the lowest bits, then the next."""
  shifts = jnp.arange(0, 8, bits, dtype=jnp.uint8)[:, None]
  grouped = packed.reshape((*packed.shape[:-1], -1, 1, group))
  codes = (grouped >> shifts.reshape((1,) * (grouped.ndim - 2) + (-1, 1))) & (
    2**bits - 1
  )
  return codes.reshape((*packed.shape[:-1], -1))


def _parts(numbers: jax.Array, size: int) -> jax.Array:
  """Returns numbers as float32 [..., parts, size]."""
  parts = numbers.reshape((*numbers.shape[:-1], -1, size))
  return parts.astype(jnp.float32)


def _joined(parts: jax.Array) -> jax.Array:
  return parts.reshape((*parts.shape[:-2], -1))


def _fifth(four: jax.Array) -> jax.Array:
  """Returns the fifth bits of 32 codes, in their place, of 4 bytes."""
  return _bits(four) << 4


def _bits(packed: jax.Array) -> jax.Array:
  """Returns the bits of bytes, the lowest of each byte first."""
  bits = (
    packed[..., None]
    >> jnp.arange(8, dtype=jnp.uint8).reshape((1,) * packed.ndim + (8,))
  ) & 1
  return bits.reshape((*packed.shape[:-1], -1))


def codes_of_5(fifth: jax.Array, low: jax.Array) -> jax.Array:
  """Returns codes of 5 bits, of the bytes of the fifth bits and of the rest."""
  return planes(low, 16, 4) | _fifth(fifth)


def q5_0(block: jax.Array) -> jax.Array:
  """Returns the numbers of a block: 5 bits, from -16 to 15, times a scale."""
  codes = codes_of_5(block[..., 2:6], block[..., 6:])
  return float16(block[..., :2]) * (codes.astype(jnp.float32) - 16)


def q5_1(block: jax.Array) -> jax.Array:
  """Returns the numbers of a block: 5 bits, times a scale, plus a minimum."""
  codes = codes_of_5(block[..., 4:8], block[..., 8:])
  scaled = float16(block[..., :2]) * codes.astype(jnp.float32)
  return scaled + float16(block[..., 2:4])


def iq4_nl(block: jax.Array) -> jax.Array:
  """Returns the numbers of a block: places in a book, times a scale."""
  return float16(block[..., :2]) * _look_up(planes(block[..., 2:], 16, 4))


def iq4_xs(block: jax.Array) -> jax.Array:
  """Returns the numbers of a block: as IQ4_NL, with 8 scales of 6 bits."""
  scales, codes = scales_and_codes_of_iq4_xs(block)
  return _joined(scales[..., None] * _parts(_look_up(codes), 32))


def scales_and_codes_of_iq4_xs(
  block: jax.Array,
) -> tuple[jax.Array, jax.Array]:
  """Returns scales, float32 [..., 8], and places in the book."""
  high = planes(block[..., 2:4], 1, 2)
  low = planes(block[..., 4:8], 1, 4)
  scales = (low | (high << 4)).astype(jnp.float32) - 32
  return float16(block[..., :2]) * scales, planes(block[..., 8:], 16, 4)


def _look_up(codes: jax.Array) -> jax.Array:
  return jnp.take(jnp.asarray(BOOK, jnp.float32), codes, mode='clip')


def q2_k(block: jax.Array) -> jax.Array:
  """Returns the numbers of a block: 2 bits, 16 scales and minima of 4 bits."""
  scales, least, codes = parts_of_q2_k(block)
  return _joined(scales[..., None] * _parts(codes, 16) - least[..., None])


def parts_of_q2_k(
  block: jax.Array,
) -> tuple[jax.Array, jax.Array, jax.Array]:
  """Returns scales and minima, float32 [..., 16] each, and codes."""
  scales = float16(block[..., 80:82]) * (block[..., :16] & 0xF)
  least = float16(block[..., 82:]) * (block[..., :16] >> 4)
  return scales, least, planes(block[..., 16:80], 32, 2)


def q3_k(block: jax.Array) -> jax.Array:
  """Returns the numbers of a block: 3 bits, 16 scales of 6 bits."""
  scales, codes = parts_of_q3_k(block)
  return _joined(scales[..., None] * _parts(codes, 16))


def parts_of_q3_k(block: jax.Array) -> tuple[jax.Array, jax.Array]:
  """Returns scales, float32 [..., 16], and codes from -4 to 3, float32."""
  low = planes(block[..., 96:104], 8, 4)
  high = planes(block[..., 104:108], 4, 2)
  scales = (low | (high << 4)).astype(jnp.float32) - 32
  # The third bit is 1 for a number that is not lowered by 4.
  third = planes(block[..., :32], 32, 1) << 2
  codes = (planes(block[..., 32:96], 32, 2) | third).astype(jnp.float32) - 4
  return float16(block[..., 108:]) * scales, codes


def q4_k(block: jax.Array) -> jax.Array:
  """Returns the numbers of a block: 4 bits, 8 scales and minima of 6 bits."""
  scales, least = scales_and_minima(block)
  codes = _parts(planes(block[..., 16:], 32, 4), 32)
  return _joined(scales[..., None] * codes - least[..., None])


def q5_k(block: jax.Array) -> jax.Array:
  """Returns the numbers of a block: as Q4_K, with a fifth bit."""
  scales, least = scales_and_minima(block)
  codes = _parts(codes_of_q5_k(block), 32)
  return _joined(scales[..., None] * codes - least[..., None])


def codes_of_q5_k(block: jax.Array) -> jax.Array:
  """Returns codes of 5 bits."""
  fifth = planes(block[..., 16:48], 32, 1) << 4
  return planes(block[..., 48:], 32, 4) | fifth


def scales_and_minima(block: jax.Array) -> tuple[jax.Array, jax.Array]:
  """Returns the scales and minima of 8 parts, float32 [..., 8] each."""
  first, second, rest = (block[..., i : i + 4] for i in (4, 8, 12))
  scales = [first & 0x3F, (rest & 0xF) | ((first >> 2) & 0x30)]
  least = [second & 0x3F, (rest >> 4) | ((second >> 2) & 0x30)]
  return (
    float16(block[..., :2]) * jnp.concatenate(scales, axis=-1),
    float16(block[..., 2:4]) * jnp.concatenate(least, axis=-1),
  )


def q6_k(block: jax.Array) -> jax.Array:
  """Returns the numbers of a block: 6 bits, 16 scales of 8 bits."""
  scales, codes = parts_of_q6_k(block)
  return _joined(scales[..., None] * _parts(codes, 16))


def parts_of_q6_k(block: jax.Array) -> tuple[jax.Array, jax.Array]:
  """Returns scales, float32 [..., 16], and codes from -32 to 31, float32."""
  high = planes(block[..., 128:192], 32, 2) << 4
  codes = (planes(block[..., :128], 64, 4) | high).astype(jnp.float32) - 32
  scales = jax.lax.bitcast_convert_type(block[..., 192:208], jnp.int8)
  return float16(block[..., 208:]) * scales.astype(jnp.float32), codes
