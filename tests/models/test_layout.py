"""The two layouts of a parameter tree are inverses of each other."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from models import layout, transformer
from tests.helpers import tiny_models


def _params(config):
  model = transformer.Transformer(config)
  return jax.jit(model.init)(jax.random.key(0), jnp.zeros((1, 1), jnp.int32))


@pytest.mark.parametrize(
  'make', [tiny_models.llama_like, tiny_models.gpt2_like]
)
def test_stack_is_the_inverse_of_unstack(make):
  config = make(scan_layers=True)
  params = _params(config)
  apart, apart_config = layout.unstack(params, config)
  assert not apart_config.scan_layers
  assert jax.tree.structure(apart) == jax.tree.structure(_params(apart_config))
  again, again_config = layout.stack(apart, apart_config)
  assert again_config == config
  jax.tree.map(np.testing.assert_array_equal, again, params)
  assert layout.unstack(apart, apart_config) == (apart, apart_config)
  assert layout.stack(params, config) == (params, config)


def test_transposed_kernels_are_the_same_kernels():
  params = _params(tiny_models.llama_like())
  transposed = layout.transpose_kernels(params)
  kernel = params['params']['layer_0']['mlp']['up']['kernel']
  stored = transposed['params']['layer_0']['mlp']['up']['kernel']
  assert stored.kernel_OI.shape == kernel.shape[::-1]
  jax.tree.map(
    np.testing.assert_array_equal, layout.whole_kernels(transposed), params
  )
  assert layout.whole_kernels(params) == params
  again = layout.transpose_kernels(transposed)
  jax.tree.map(
    lambda a, b: np.testing.assert_array_equal(a, b), again, transposed
  )
  on_host = layout.host_kernels(transposed)
  jax.tree.map(np.testing.assert_array_equal, on_host, params)
  view = on_host['params']['layer_0']['mlp']['up']['kernel']
  assert np.shares_memory(view, np.asarray(stored.kernel_OI))
