"""Scales that are folded into the weights change no function."""

from flax import traverse_util
import jax
import jax.numpy as jnp
import numpy as np
import pytest

from frozen.quantize import activations, experts, scaling
from models import transformer
from models.linear.stored import round as rounding
from tests.helpers import frozen_dirs, tiny_models

_CONFIGS = {
  'llama': tiny_models.llama_like(),
  'stable': tiny_models.stable(),
  'gpt2': tiny_models.gpt2_like(),
  'biases': tiny_models.llama_like(qkv_bias=True, mlp_bias=True),
  'from_one': tiny_models.llama_like(norm_from_one=True, norm_place='both'),
  'after': tiny_models.llama_like(norm_place='after'),
  'parallel': tiny_models.gpt2_like(parallel_residual=True),
  'mixture': tiny_models.mixture(norm_from_one=True),
  'experts alone': tiny_models.mixture(num_shared_experts=0),
  'attention_only': tiny_models.llama_like(mlp='none', mlp_width=0),
}
_TOKENS_RT = np.random.default_rng(5).integers(0, 61, (3, 20), np.int32)


def _folded(config, dtype, method):
  """Returns the first layer, its input, and what folding makes of it."""
  params = frozen_dirs.params(config, dtype=dtype)['params']
  outer = {name: x for name, x in params.items() if 'layer_' not in name}
  batches = activations.embedded(config, outer, _TOKENS_RT)
  block = activations.block(config, 0)
  layer = params['layer_0']
  moments, routed = activations.inputs_of(block, layer, batches)
  flat = traverse_util.flatten_dict(layer, sep='/')
  folded, moved, scale_D = scaling.scaled(
    flat, moments, config, method=method, scheme='int8',
    experts=None if routed is None else experts.inputs(flat, routed),
  )  # fmt: skip
  assert (scale_D is None) == (routed is None)
  for name in ('up', 'gate') if routed else ():  # left to `experts.quantise`
    path = f'moe/expert_{name}/kernel'
    folded[path] = folded[path].astype(jnp.float32) * scale_D[None, :, None]
  return block, layer, batches, moments, folded, moved


@pytest.mark.fast_cases(4)
@pytest.mark.parametrize('method', ['awq', 'smoothquant'])
@pytest.mark.parametrize('dtype', ['float32', 'bfloat16'])
@pytest.mark.parametrize('name', sorted(_CONFIGS))
def test_a_layer_computes_the_same(name, dtype, method):
  config = _CONFIGS[name]
  block, layer, batches, moments, folded, _ = _folded(config, dtype, method)
  new = traverse_util.unflatten_dict(folded, sep='/')
  (old_batch,) = activations.advance(block, layer, batches)
  (new_batch,) = activations.advance(block, new, batches)
  # Scales of norms are rounded before kernels are multiplied by what is left,
  # so bfloat16 costs nothing but for the biases of norms and of the MLP.
  has_bias = (config.use_bias or config.mlp_bias) and dtype == 'bfloat16'
  # The router's rows are rounded again, too.
  has_bias |= bool(config.num_experts) and dtype == 'bfloat16'
  largest = float(jnp.abs(old_batch.x_BTD).max())
  np.testing.assert_allclose(
    new_batch.x_BTD,
    old_batch.x_BTD,
    rtol=0,
    atol=largest * (2**-7 if has_bias else 1e-5),
  )
  changed = [
    path
    for path, x in traverse_util.flatten_dict(layer, sep='/').items()
    if not np.array_equal(x, folded[path])
  ]
  has_experts = bool(config.num_experts)
  places = scaling.places(config, moments, has_experts)
  assert bool(changed) == bool(places)


@pytest.mark.parametrize('method', ['awq', 'smoothquant'])
def test_moments_are_those_of_the_new_layer(method):
  config = _CONFIGS['llama']
  block, _, batches, _, folded, moved = _folded(config, 'float32', method)
  new = traverse_util.unflatten_dict(folded, sep='/')
  measured, _ = activations.inputs_of(block, new, batches)
  assert measured.keys() == moved.keys()
  for path, expected in measured.items():
    for got, of_kernel in zip(moved[path], expected, strict=True):
      scale = float(jnp.abs(of_kernel).max())
      np.testing.assert_allclose(got, of_kernel, rtol=1e-4, atol=1e-5 * scale)


@pytest.mark.slow
def test_awq_spares_the_channels_that_are_large():
  rng = np.random.default_rng(6)
  w_IO = jnp.asarray(rng.normal(size=(128, 32)), jnp.float32)
  size_I = np.where(np.arange(128) % 16 == 0, 30.0, 1.0)
  x_NI = rng.normal(size=(400, 128)) * size_I
  moments = activations.Moments(
    jnp.asarray(x_NI.T @ x_NI / 400, jnp.float32),
    jnp.asarray(np.abs(x_NI).mean(0), jnp.float32),
    jnp.asarray(np.abs(x_NI).max(0), jnp.float32),
  )
  reader = scaling.Reader((w_IO,), moments.second_II, 1.0)
  scale_I = scaling.awq_scale([reader], moments.mean_I, scheme='int4')

  def error(scale_I):
    kernel = rounding.by_scheme(w_IO * scale_I[:, None], 'int4')
    delta_IO = kernel.whole(jnp.float32) / scale_I[:, None] - w_IO
    return float(scaling.output_error(delta_IO, moments.second_II))

  def tried(power):
    scale_I = moments.mean_I**power
    return error(scale_I / jnp.sqrt(scale_I.max() * scale_I.min()))

  errors = [tried(power) for power in np.arange(20) / 20]
  assert error(scale_I) == pytest.approx(min(errors), rel=1e-3)
  assert min(errors) < 0.8 * errors[0]  # power 0: all scales are 1
  others_I = jnp.delete(scale_I, slice(None, None, 16))
  assert scale_I[::16].min() > 2 * others_I.max()


def test_smoothquant_takes_as_much_from_both():
  w_IO = jnp.asarray([[0.5, -2.0], [0.1, 0.05]], jnp.float32)
  largest_I = jnp.asarray([8.0, 10.0])
  reader = scaling.Reader((w_IO, w_IO / 2), None, 1.0)
  scale_I = scaling.smoothquant_scale([reader], largest_I)
  # Equation 4: then the largest activation and weight of a channel are equal.
  np.testing.assert_allclose(scale_I, [2.0, 10.0], rtol=1e-6)


def test_a_channel_that_is_always_zero_keeps_a_scale():
  w_IO = jax.random.normal(jax.random.key(0), (16, 4))
  moments = activations.Moments(jnp.zeros((16, 16)), *[jnp.zeros(16)] * 2)
  reader = scaling.Reader((w_IO,), moments.second_II, 1.0)
  for method in ('awq', 'smoothquant'):
    scale_I = scaling.scale_of([reader], moments, method=method, scheme='int4')
    assert jnp.isfinite(scale_I).all()
    assert (scale_I > 0).all()


@pytest.mark.slow
def test_the_scales_of_a_model_are_known_in_every_layer():
  config = _CONFIGS['llama']
  params = frozen_dirs.params(config)
  logits, _ = transformer.Transformer(config).apply(params, _TOKENS_RT)
  layers = dict(params['params'])
  outer = {name: x for name, x in layers.items() if 'layer_' not in name}
  batches = activations.embedded(config, outer, _TOKENS_RT)
  for n in range(config.num_layers):
    block, name = activations.block(config, n), f'layer_{n}'
    moments, _ = activations.inputs_of(block, layers[name], batches)
    flat = traverse_util.flatten_dict(layers[name], sep='/')
    flat, *_ = scaling.scaled(
      flat, moments, config, method='awq', scheme='int4'
    )
    layers[name] = traverse_util.unflatten_dict(flat, sep='/')
    batches = activations.advance(block, layers[name], batches)
  got, _ = transformer.Transformer(config).apply({'params': layers}, _TOKENS_RT)
  np.testing.assert_allclose(
    got, logits, rtol=0, atol=1e-4 * jnp.abs(logits).max()
  )
