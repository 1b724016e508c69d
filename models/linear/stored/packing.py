"""Codes of four bits, two per byte, and the numbers that they stand for.

Column 2i of a row lies in the low bits of byte i, column 2i + 1 in the high
bits. `jnp.int4` is not used for storage: arrays of it take a byte per number on
some devices (qwix issue 328).
"""

import jax
import jax.numpy as jnp

# The quantiles of a normal distribution, with an exact 0: QLoRA,
# arXiv:2305.14314, appendix E.
NF4 = (
  -1.0, -0.6961928009986877, -0.5250730514526367, -0.39491748809814453,
  -0.28444138169288635, -0.18477343022823334, -0.09105003625154495, 0.0,
  0.07958029955625534, 0.16093020141124725, 0.24611230194568634,
  0.33791524171829224, 0.44070982933044434, 0.5626170039176941,
  0.7229568362236023, 1.0,
)  # fmt: skip
# e2m1 of the OCP microscaling formats; the highest bit is the sign.
_FP4_MAGNITUDES = (0.0, 0.5, 1.0, 1.5, 2.0, 3.0, 4.0, 6.0)
FP4 = (*_FP4_MAGNITUDES, *(-value for value in _FP4_MAGNITUDES))
FP4_LARGEST = 6.0


def pack(codes: jax.Array) -> jax.Array:
  """Returns uint8 [..., n / 2] from the low 4 bits of integers [..., n]."""
  codes = codes.astype(jnp.uint8) & 0xF
  return codes[..., ::2] | (codes[..., 1::2] << 4)


def unpack(packed: jax.Array) -> jax.Array:
  """Returns uint8 codes [..., n], 0 to 15, of bytes [..., n / 2]."""
  codes = jnp.stack([packed & 0xF, packed >> 4], axis=-1)
  return codes.reshape((*packed.shape[:-1], -1))


def signed(codes: jax.Array) -> jax.Array:
  """Returns int8, -8 to 7, of codes of 4 bits in two's complement."""
  return (codes.astype(jnp.int8) ^ 8) - 8


def nearest(x: jax.Array, book: tuple[float, ...]) -> jax.Array:
  """Returns the code, uint8, of the number in a book that is nearest to x."""
  order = sorted(range(len(book)), key=lambda code: book[code])
  values = [book[code] for code in order]
  middles = [(a + b) / 2 for a, b in zip(values, values[1:], strict=False)]
  place = jnp.searchsorted(jnp.asarray(middles, x.dtype), x)
  return jnp.asarray(order, jnp.uint8)[place]


def look_up(codes: jax.Array, book: tuple[float, ...]) -> jax.Array:
  """Returns the numbers, float32, of codes in a book."""
  return jnp.take(jnp.asarray(book, jnp.float32), codes, axis=0, mode='clip')
