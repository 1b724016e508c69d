"""Norms, rotary positions, layouts, axes, sizes: each against a closed form."""

import math

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from models import axes, flops, layout, model_config, norms, transformer
from models.attention import rope
from tests.helpers import tiny_models
from training.optimizer import param_groups


def _params(config):
  model = transformer.Transformer(config)
  return jax.jit(model.init)(jax.random.key(0), jnp.zeros((1, 1), jnp.int32))


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


def test_rotation_keeps_lengths_and_depends_on_distance_only():
  q, k = jax.random.normal(jax.random.key(0), (2, 1, 1, 1, 8))

  def score(i, j):
    rotated = [
      rope.rotate(x, rope.angles(jnp.array([[p]]), 8, 10_000.0))
      for x, p in ((q, i), (k, j))
    ]
    np.testing.assert_allclose(
      jnp.linalg.norm(rotated[0]), jnp.linalg.norm(q), rtol=1e-6
    )
    return float(jnp.sum(rotated[0] * rotated[1]))

  assert score(5, 2) == pytest.approx(score(105, 102), abs=1e-4)
  assert abs(score(5, 2) - score(5, 3)) > 1e-3


def test_first_pair_turns_one_radian_per_position():
  """RoFormer equation 15: theta_0 = 1."""
  x_BTHC = jnp.zeros((1, 1, 1, 4)).at[..., 0].set(1.0)
  rotated = rope.rotate(x_BTHC, rope.angles(jnp.array([[2]]), 4, 10_000.0))
  np.testing.assert_allclose(
    rotated[0, 0, 0], [np.cos(2), 0.0, np.sin(2), 0.0], atol=1e-6
  )


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


@pytest.mark.parametrize(
  'make', [tiny_models.llama_like, tiny_models.gpt2_like, tiny_models.stable]
)
@pytest.mark.parametrize('scan', [True, False])
def test_every_parameter_has_axes_and_only_matrices_decay(make, scan):
  params = _params(make(scan_layers=scan))
  names = axes.param_axes(params)
  decayed = param_groups.is_decayed('matrices', params)
  for (path, leaf), is_decayed in zip(
    jax.tree_util.tree_leaves_with_path(params),
    jax.tree.leaves(decayed),
    strict=True,
  ):
    scanned = 'layers' in jax.tree_util.keystr(path)
    assert is_decayed == (leaf.ndim - scanned == 2)
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


def test_matmul_params_are_the_kernels_and_the_head():
  for config in (
    tiny_models.llama_like(),
    tiny_models.gpt2_like(),
    tiny_models.llama_like(qk_norm=True),
  ):
    leaves = jax.tree_util.tree_leaves_with_path(_params(config))
    kernels = sum(
      leaf.size for path, leaf in leaves if 'kernel' in str(path[-1])
    )
    head = config.vocab_size * config.model_width
    assert flops.num_matmul_params(config) == kernels + head
    assert flops.num_params(config) == sum(leaf.size for _, leaf in leaves)


def test_flops_agree_with_the_compiler():
  """On an unrolled forward, whose cost analysis counts every layer."""
  config = tiny_models.llama_like(model_width=64, mlp_width=256, vocab_size=512)
  batch, time = 2, 32
  model = transformer.Transformer(config)
  compiled = (
    jax.jit(model.apply)
    .lower(_params(config), jnp.zeros((batch, time), jnp.int32))
    .compile()
  )
  counted = compiled.cost_analysis()['flops'] / (batch * time)
  # One block of queries: attention is computed in full, not as a triangle.
  analytic = flops.forward_flops_per_token(config, context=time)
  # The compiler counts norms, softmax and rotations too.
  assert analytic < counted < 1.15 * analytic


def test_gpt2_small_has_the_published_size():
  config = tiny_models.gpt2_like(
    vocab_size=50_257,
    num_layers=12,
    model_width=768,
    num_heads=12,
    num_kv_heads=12,
    head_width=64,
    mlp_width=3072,
    max_length=1024,
    scan_layers=True,
  )
  assert flops.num_params(config) == 124_439_808


@pytest.mark.parametrize(
  ('field', 'value', 'message'),
  [
    ('num_layers', 0, 'model.num_layers: got 0, expected a positive integer'),
    ('norm', 'batchnorm', "got 'batchnorm', expected one of rmsnorm"),
    ('mlp', 'mish', "got 'mish', expected one of swiglu, geglu"),
    ('positions', 'none', "got 'none', expected one of rope, learned"),
    ('num_kv_heads', 3, 'expected a divisor of num_heads = 4'),
    ('head_width', 5, 'expected an even number'),
    ('dropout_rate', 1.0, 'expected 0 <= rate < 1'),
    ('init_std', 0.0, 'expected a positive number'),
    ('logit_softcap', -1.0, 'model.logit_softcap: got -1.0, expected a number'),
    ('logit_softcap', math.nan, 'model.logit_softcap: got nan, expected'),
    ('mup_base_width', -1, 'mup_base_width: got -1, expected a positive int'),
    ('mup_base_width', 2.5, 'mup_base_width: got 2.5, expected a positive int'),
    (
      'mup_base_head_width',
      -8,
      'mup_base_head_width: got -8, expected a posit',
    ),
    ('mup_base_head_width', 8, 'got 8 without muP, expected 0; set model.mup'),
  ],
)
def test_impossible_configs_are_refused(field, value, message):
  with pytest.raises(ValueError, match=message):
    tiny_models.llama_like(**{field: value}).validate()


@pytest.mark.parametrize('make', [tiny_models.gpt2_like, tiny_models.stable])
def test_config_survives_json_and_refuses_other_fields(make):
  config = make()
  assert model_config.ModelConfig.from_dict(config.to_dict()) == config
  with pytest.raises(ValueError, match=r"unknown fields \['depth'\]"):
    model_config.ModelConfig.from_dict({**config.to_dict(), 'depth': 3})
