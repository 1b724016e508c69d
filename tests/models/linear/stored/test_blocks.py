"""GGUF blocks, against the package gguf."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from models.linear.stored import block_kinds, blocks as blocks_lib
from tests.helpers import any_kernels


def _rows(kind):
  return any_kernels.block_bytes(kind, columns=5, num_blocks=3)


@pytest.mark.parametrize('kind', block_kinds.KINDS)
def test_numbers_are_those_of_gguf_bit_for_bit(kind):
  gguf = pytest.importorskip('gguf', reason='requirements-hub.txt')
  data = _rows(kind)
  kernel = blocks_lib.Blocks.make(jnp.asarray(data), kind=kind)
  wanted = gguf.quants.dequantize(data, gguf.GGMLQuantizationType[kind])
  found = jax.jit(lambda kernel: kernel.whole(jnp.float32))(kernel)
  np.testing.assert_array_equal(found, wanted.T)
  weights = block_kinds.KINDS[kind].weights
  assert kernel.shape == (3 * weights, 5)
  assert kernel.bits == 8 * block_kinds.KINDS[kind].bytes / weights
  part = kernel.part(2, 2).whole(jnp.float32)
  np.testing.assert_array_equal(part, found[:, 2:4])


def test_layers_are_stacked_in_front():
  data = jnp.stack([jnp.asarray(_rows('Q4_0'))] * 2)
  stack = blocks_lib.Blocks.make(data, kind='Q4_0')
  assert stack.shape == (2, 96, 5)
  assert stack.nbytes == 2 * 5 * 3 * 18
  np.testing.assert_array_equal(
    stack.whole(jnp.float32)[1],
    blocks_lib.Blocks(data[1], 'Q4_0').whole(jnp.float32),
  )


def test_rows_that_are_no_whole_blocks_are_refused():
  with pytest.raises(ValueError, match=r'got uint8\[5, 53\], expected uint8'):
    blocks_lib.Blocks.make(jnp.zeros((5, 53), jnp.uint8), kind='Q4_0')
  with pytest.raises(ValueError, match='got int8'):
    blocks_lib.Blocks.make(jnp.zeros((5, 54), jnp.int8), kind='Q4_0')
  with pytest.raises(ValueError, match="kind: got 'Q9', expected"):
    blocks_lib.Blocks.make(jnp.zeros((5, 54), jnp.uint8), kind='Q9')
