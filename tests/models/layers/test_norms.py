"""Norms against a closed form."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from models import model_config
from models.layers import norms
from tests.helpers import tiny_models


@pytest.mark.parametrize('kind', model_config.NORMS)
def test_norms_are_computed_in_float32(kind):
  config = tiny_models.llama_like(norm=kind, use_bias=True, norm_epsilon=1e-6)
  x = 100 * jax.random.normal(jax.random.key(0), (2, 3, 8)) + 50
  module = norms.Norm(config)
  params = {'params': {'scale': jnp.arange(1.0, 9.0)}}
  if kind == 'layernorm':
    params['params']['bias'] = jnp.arange(8.0)
  exact = np.asarray(x, np.float64)
  if kind == 'layernorm':
    exact = exact - exact.mean(-1, keepdims=True)
  exact = exact / np.sqrt((exact**2).mean(-1, keepdims=True) + 1e-6)
  exact = exact * np.arange(1.0, 9.0)
  if kind == 'layernorm':
    exact = exact + np.arange(8.0)
  np.testing.assert_allclose(module.apply(params, x), exact, rtol=1e-4)
  half = module.apply(params, x.astype(jnp.bfloat16))
  assert half.dtype == jnp.bfloat16


def test_a_gain_multiplies_what_is_normalised():
  config = tiny_models.gpt2_like()
  x = jax.random.normal(jax.random.key(0), (2, 3, 8))
  params = norms.Norm(config).init(jax.random.key(0), x)
  params = jax.tree.map(lambda leaf: leaf + 0.5, params)
  plain = norms.Norm(config).apply(params, x)
  np.testing.assert_allclose(
    norms.Norm(config, 0.25).apply(params, x), 0.25 * plain, rtol=1e-6
  )
