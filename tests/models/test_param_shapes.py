"""Shapes that are traced once equal those of `init`."""

import jax
import jax.numpy as jnp
import pytest

from models import param_shapes, transformer
from tests.helpers import tiny_models

_MIXTURE = {'num_experts': 4, 'num_active_experts': 2, 'expert_width': 8}
MODELS = {
  'uniform': tiny_models.llama_like(),
  'scanned': tiny_models.llama_like(scan_layers=True),
  'mixture': tiny_models.llama_like(**_MIXTURE, num_dense_layers=1),
}


@pytest.mark.parametrize('name', MODELS)
def test_shapes_are_those_of_init(name):
  config = MODELS[name]
  expected = jax.eval_shape(
    transformer.Transformer(config).init,
    jax.random.key(0),
    jnp.zeros((1, 1), jnp.int32),
  )
  assert param_shapes.of(config) == expected


def test_what_a_caller_changes_is_its_own():
  config = MODELS['uniform']
  del param_shapes.of(config)['params']['embed']
  assert 'embed' in param_shapes.of(config)['params']
