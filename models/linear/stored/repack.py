"""Blocks of a GGUF file as a kernel whose scales lie apart.

The numbers are the same, bit for bit. Kernels of GPU and TPU read codes side by
side, where blocks have their scales between them. Codes of 5 and 6 bits, and of
a code book, take 8 bits; so do those of 2 and 3 bits, whose tiles of 16 are too
small for packed codes.
"""

from collections.abc import Callable, Mapping
from typing import NamedTuple

import jax
import jax.numpy as jnp

from models.linear.stored import (
  block_kinds,
  blocks as blocks_lib,
  kernel as kernel_lib,
  packing,
  super_blocks,
)


class _Parts(NamedTuple):
  """Codes [..., weights] of each block, scales and minima [..., tiles]."""

  form: str
  codes: jax.Array
  scales: jax.Array
  mins: jax.Array | None = None


def repacked(w_IO: blocks_lib.Blocks) -> kernel_lib.Kernel:
  """Returns a kernel of the numbers of blocks."""
  kind = block_kinds.KINDS[w_IO.kind]
  data = jnp.asarray(w_IO.data)
  parts = _PARTS[w_IO.kind](data.reshape((*data.shape[:-1], -1, kind.bytes)))

  def rows(array: jax.Array | None) -> jax.Array | None:
    if array is None:
      return None
    return array.reshape((*data.shape[:-1], -1))

  codes = rows(parts.codes)
  assert codes is not None
  if parts.form in kernel_lib.PACKED:
    codes = packing.pack(codes)
  else:
    codes = codes.astype(jnp.int8)
  return kernel_lib.Kernel.make(
    codes,
    rows(parts.scales),
    form=parts.form,
    tile=(1, kind.weights // parts.scales.shape[-1]),
    mins=rows(parts.mins),
  )


def _float16(two: jax.Array) -> jax.Array:
  """Returns float16 [..., 1] of the bytes [..., 2]."""
  return jax.lax.bitcast_convert_type(two, jnp.float16)[..., None]


def _signed(codes: jax.Array, zero: int) -> jax.Array:
  return codes.astype(jnp.int8) - jnp.int8(zero)


def _q8_0(block: jax.Array) -> _Parts:
  values = jax.lax.bitcast_convert_type(block[..., 2:], jnp.int8)
  return _Parts('int8', values, _float16(block[..., :2]))


def _q4_0(block: jax.Array) -> _Parts:
  codes = super_blocks.planes(block[..., 2:], 16, 4)
  return _Parts('int4', _signed(codes, 8), _float16(block[..., :2]))


def _q4_1(block: jax.Array) -> _Parts:
  codes = super_blocks.planes(block[..., 4:], 16, 4)
  least = super_blocks.float16(block[..., 2:4])
  return _Parts('uint4', codes, _float16(block[..., :2]), least)


def _q5_0(block: jax.Array) -> _Parts:
  codes = super_blocks.codes_of_5(block[..., 2:6], block[..., 6:])
  return _Parts('int8', _signed(codes, 16), _float16(block[..., :2]))


def _q5_1(block: jax.Array) -> _Parts:
  codes = super_blocks.codes_of_5(block[..., 4:8], block[..., 8:])
  least = super_blocks.float16(block[..., 2:4])
  return _Parts('int8', codes, _float16(block[..., :2]), least)


def _iq4_nl(block: jax.Array) -> _Parts:
  codes = super_blocks.planes(block[..., 2:], 16, 4)
  return _Parts('int8', _in_book(codes), _float16(block[..., :2]))


def _in_book(codes: jax.Array) -> jax.Array:
  return jnp.take(jnp.asarray(super_blocks.BOOK, jnp.int8), codes, mode='clip')


def _iq4_xs(block: jax.Array) -> _Parts:
  scales, codes = super_blocks.scales_and_codes_of_iq4_xs(block)
  return _Parts('int8', _in_book(codes), scales)


def _q2_k(block: jax.Array) -> _Parts:
  scales, least, codes = super_blocks.parts_of_q2_k(block)
  return _Parts('int8', codes, scales, -least)


def _q3_k(block: jax.Array) -> _Parts:
  scales, codes = super_blocks.parts_of_q3_k(block)
  return _Parts('int8', codes, scales)


def _q4_k(block: jax.Array) -> _Parts:
  scales, least = super_blocks.scales_and_minima(block)
  codes = super_blocks.planes(block[..., 16:], 32, 4)
  return _Parts('uint4', codes, scales, -least)


def _q5_k(block: jax.Array) -> _Parts:
  scales, least = super_blocks.scales_and_minima(block)
  return _Parts('int8', super_blocks.codes_of_q5_k(block), scales, -least)


def _q6_k(block: jax.Array) -> _Parts:
  scales, codes = super_blocks.parts_of_q6_k(block)
  return _Parts('int8', codes, scales)


_PARTS: Mapping[str, Callable[[jax.Array], _Parts]] = {
  'Q8_0': _q8_0,
  'Q4_0': _q4_0,
  'Q4_1': _q4_1,
  'Q5_0': _q5_0,
  'Q5_1': _q5_1,
  'IQ4_NL': _iq4_nl,
  'Q2_K': _q2_k,
  'Q3_K': _q3_k,
  'Q4_K': _q4_k,
  'Q5_K': _q5_k,
  'Q6_K': _q6_k,
  'IQ4_XS': _iq4_xs,
}
