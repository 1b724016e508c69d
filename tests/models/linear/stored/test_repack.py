"""Blocks as kernels whose scales lie apart: the same numbers."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from models.linear.kernels import stored_gpu, stored_tpu
from models.linear.stored import block_kinds, product, repack
from tests.helpers import any_kernels


@pytest.mark.parametrize('kind', block_kinds.KINDS)
def test_the_numbers_are_those_of_the_blocks_bit_for_bit(kind):
  blocks = any_kernels.kernel(kind, 512, 7)
  found = repack.repacked(blocks)
  assert found.shape == blocks.shape
  # Products and sums are not fused outside of a compiled function.
  with jax.disable_jit():
    np.testing.assert_array_equal(
      found.rows(jnp.float32), blocks.rows(jnp.float32)
    )
  assert found.bits <= {'Q4_0': 4.5, 'Q4_1': 5.5, 'Q4_K': 6}.get(kind, 12)


@pytest.mark.fast_cases(4)
@pytest.mark.parametrize('module', [stored_gpu, stored_tpu])
@pytest.mark.parametrize('kind', block_kinds.KINDS)
def test_kernels_of_accelerators_multiply_by_them(kind, module):
  blocks = any_kernels.kernel(kind, 512, 20)
  found = repack.repacked(blocks)
  assert not module.refusal(found, 'float32')
  x_RI = jnp.asarray(np.random.default_rng(1).normal(size=(3, 512)), 'float32')
  y_RO = product.linear(
    x_RI, found, None, jnp.float32, computed=module.Port(interpret=True)
  )
  whole_IO = np.asarray(blocks.whole(jnp.float32))
  # A number and its minimum are summed apart, and may cancel.
  magnitudes = np.abs(x_RI) @ np.abs(whole_IO).max(
    axis=0, keepdims=True
  ).repeat(512, 0)
  assert np.all(np.abs(y_RO - x_RI @ whole_IO) < 2e-6 * magnitudes + 1e-30)


def test_matrices_of_experts_stay_apart():
  one = any_kernels.kernel('Q4_K', 256, 6)
  stack = jax.tree.map(lambda x: jnp.stack([x, jnp.roll(x, 1, axis=0)]), one)
  found = repack.repacked(stack)
  assert found.shape == (2, 256, 6)
  np.testing.assert_array_equal(
    found.matrix(1).rows(jnp.float32), stack.matrix(1).rows(jnp.float32)
  )
