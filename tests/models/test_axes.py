"""Logical axes of every parameter."""

import jax
import jax.numpy as jnp
import pytest

from models import axes, transformer
from tests.helpers import tiny_models


def _params(config):
  model = transformer.Transformer(config)
  return jax.jit(model.init)(jax.random.key(0), jnp.zeros((1, 1), jnp.int32))


@pytest.mark.fast_cases(2)
@pytest.mark.parametrize(
  'make', [tiny_models.llama_like, tiny_models.gpt2_like, tiny_models.stable]
)
@pytest.mark.parametrize('scan', [True, False])
def test_every_parameter_has_axes(make, scan):
  params = _params(make(scan_layers=scan))
  names = axes.param_axes(params)
  assert names['params']['embed']['embedding'] == ('vocab', 'embed')
  layer = names['params']['layers' if scan else 'layer_1']
  lead = ('layers',) if scan else ()
  assert layer['attention']['key']['kernel'] == (*lead, 'embed', 'kv_heads')
  assert layer['mlp']['down']['kernel'] == (*lead, 'mlp', 'embed')


def test_unknown_parameters_have_no_axes():
  with pytest.raises(ValueError, match='no logical axes for parameter a/b'):
    axes.param_axes({'a': {'b': jnp.zeros(3)}})
  with pytest.raises(ValueError, match='got 1 axes, expected 2'):
    axes.param_axes({'query': {'kernel': jnp.zeros(3)}})
