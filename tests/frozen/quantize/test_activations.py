"""Moments of kernel inputs equal those of inputs that Flax captures."""

from flax import linen as nn
import jax.numpy as jnp
import numpy as np
import pytest

from frozen.quantize import activations
from models import transformer
from models.layers import mlp
from models.moe import layer as moe_layer
from tests.helpers import frozen_dirs, tiny_models

_CONFIGS = {
  'llama': tiny_models.llama_like(),
  'gpt2': tiny_models.gpt2_like(),
  'mixture': tiny_models.mixture(),
  'windows': tiny_models.llama_like(
    window=8, layer_pattern='lg', rope_local_base=100.0
  ),
}
# More rows than one batch has, and no multiple of it.
_TOKENS_RT = np.random.default_rng(1).integers(0, 61, (6, 24), np.int32)


def _intercepted(config, params):
  """Returns the inputs of every linear layer, [N, I], and the last x."""
  inputs = {}

  def keep(call, args, kwargs, context):
    name = context.module.name
    if context.method_name != '__call__':
      return call(*args, **kwargs)
    if isinstance(context.module, moe_layer.Moe) and args:
      inputs['/'.join(context.module.path)] = np.asarray(args[0], np.float64)
    if isinstance(context.module, mlp.Linear) and name != 'router':
      path = '/'.join((*context.module.path, 'kernel'))
      inputs[path] = np.asarray(args[0], np.float64)
    return call(*args, **kwargs)

  model = transformer.Transformer(config)
  with nn.intercept_methods(keep):
    hidden, _ = model.apply(params, _TOKENS_RT, method='hidden')
  return {
    path: x.reshape(-1, x.shape[-1]) for path, x in inputs.items()
  }, hidden


@pytest.mark.slow
@pytest.mark.parametrize('name', sorted(_CONFIGS))
def test_moments_are_those_of_the_inputs_of_the_whole_model(name):
  config = _CONFIGS[name]
  params = frozen_dirs.params(config)
  inputs, hidden_RTD = _intercepted(config, params)
  layers = params['params']
  outer = {key: x for key, x in layers.items() if 'layer_' not in key}
  batches = activations.embedded(config, outer, _TOKENS_RT)
  for n in range(config.num_layers):
    block, layer = activations.block(config, n), layers[f'layer_{n}']
    moments, routed = activations.inputs_of(block, layer, batches)
    assert (routed is not None) == bool(config.num_experts)
    if routed is not None:
      x_ND = inputs.pop(f'layer_{n}/moe')
      np.testing.assert_allclose(routed.x_ND, x_ND, rtol=0, atol=1e-4)
      logits_NE = x_ND @ np.asarray(layer['moe']['router']['kernel'])
      chosen_NA = np.argsort(-logits_NE)[:, : config.num_active_experts]
      np.testing.assert_array_equal(np.sort(routed.ids_NA), np.sort(chosen_NA))
    for path, got in moments.items():
      x_NI = inputs.pop(f'layer_{n}/{path}')
      expected = (
        x_NI.T @ x_NI / len(x_NI),
        np.abs(x_NI).mean(0),
        np.abs(x_NI).max(0),
      )
      for one, other in zip(got, expected, strict=True):
        scale = np.abs(other).max()
        np.testing.assert_allclose(one, other, rtol=0, atol=1e-4 * scale)
    batches = activations.advance(block, layer, batches)
  assert not inputs, 'every linear layer was seen'
  model = transformer.Transformer(config)
  found = [
    model.apply(params, batch.x_BTD, method='normalised') for batch in batches
  ]
  np.testing.assert_allclose(
    jnp.concatenate(found), hidden_RTD, rtol=0, atol=1e-4 * 10
  )
