"""Kinds of GGUF blocks: how the bytes of a block become numbers.

A block holds consecutive numbers of a row, with its scales. Where the bytes
hold two codes each, the low bits are the first half of the block.

Reference: the package gguf, `gguf.quants`; ggml's `ggml-common.h`.
"""

from collections.abc import Callable, Mapping
import dataclasses

import jax
import jax.numpy as jnp

from models.linear.stored import super_blocks


@dataclasses.dataclass(frozen=True)
class Kind:
  """The layout of a kind of block."""

  weights: int  # of a block
  bytes: int
  # (uint8 [..., bytes]) -> float32 [..., weights]
  decode: Callable[[jax.Array], jax.Array]


def _halves(packed: jax.Array) -> jax.Array:
  """Returns codes: the low bits of all bytes, then the high bits."""
  return jnp.concatenate([packed & 0xF, packed >> 4], axis=-1)


def _q8_0(block: jax.Array) -> jax.Array:
  values = jax.lax.bitcast_convert_type(block[..., 2:], jnp.int8)
  return super_blocks.float16(block[..., :2]) * values.astype(jnp.float32)


def _q4_0(block: jax.Array) -> jax.Array:
  values = _halves(block[..., 2:]).astype(jnp.float32) - 8
  return super_blocks.float16(block[..., :2]) * values


def _q4_1(block: jax.Array) -> jax.Array:
  scaled = super_blocks.float16(block[..., :2]) * _halves(block[..., 4:])
  return scaled + super_blocks.float16(block[..., 2:4])


KINDS: Mapping[str, Kind] = {
  'Q8_0': Kind(32, 34, _q8_0),
  'Q4_0': Kind(32, 18, _q4_0),
  'Q4_1': Kind(32, 20, _q4_1),
  'Q5_0': Kind(32, 22, super_blocks.q5_0),
  'Q5_1': Kind(32, 24, super_blocks.q5_1),
  'IQ4_NL': Kind(32, 18, super_blocks.iq4_nl),
  'Q2_K': Kind(256, 84, super_blocks.q2_k),
  'Q3_K': Kind(256, 110, super_blocks.q3_k),
  'Q4_K': Kind(256, 144, super_blocks.q4_k),
  'Q5_K': Kind(256, 176, super_blocks.q5_k),
  'Q6_K': Kind(256, 210, super_blocks.q6_k),
  'IQ4_XS': Kind(256, 136, super_blocks.iq4_xs),
}
