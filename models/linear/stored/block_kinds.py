"""Kinds of GGUF blocks: the numbers that the bytes of a block stand for.

A block holds consecutive numbers of a row, with its scales. Where the bytes
hold two codes each, the low bits are the first half of the block.

Reference: the package gguf, `gguf.quants`; ggml's `ggml-common.h`.
"""

from collections.abc import Callable, Mapping
import dataclasses

import jax
import jax.numpy as jnp


@dataclasses.dataclass(frozen=True)
class Kind:
  """The layout of a kind of block."""

  weights: int  # of a block
  bytes: int
  # (uint8 [..., bytes]) -> float32 [..., weights]
  decode: Callable[[jax.Array], jax.Array]


def _float16(two: jax.Array) -> jax.Array:
  """Returns float32 [..., 1] of the bytes [..., 2] of a float16."""
  half = jax.lax.bitcast_convert_type(two, jnp.float16)
  return half[..., None].astype(jnp.float32)


def _halves(packed: jax.Array) -> jax.Array:
  """Returns codes: the low bits of all bytes, then the high bits."""
  return jnp.concatenate([packed & 0xF, packed >> 4], axis=-1)


def _q8_0(block: jax.Array) -> jax.Array:
  values = jax.lax.bitcast_convert_type(block[..., 2:], jnp.int8)
  return _float16(block[..., :2]) * values.astype(jnp.float32)


def _q4_0(block: jax.Array) -> jax.Array:
  values = _halves(block[..., 2:]).astype(jnp.float32) - 8
  return _float16(block[..., :2]) * values


def _q4_1(block: jax.Array) -> jax.Array:
  scaled = _float16(block[..., :2]) * _halves(block[..., 4:])
  return scaled + _float16(block[..., 2:4])


KINDS: Mapping[str, Kind] = {
  'Q8_0': Kind(32, 34, _q8_0),
  'Q4_0': Kind(32, 18, _q4_0),
  'Q4_1': Kind(32, 20, _q4_1),
}
