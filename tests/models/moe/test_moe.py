"""Mixtures of experts, against NumPy, closed forms and the dense MLP.

test_transformer has decode parity and causality of whole models,
test_against_transformers has logits against another library.
"""

import dataclasses
import functools

from flax import linen as nn
import jax
import jax.numpy as jnp
import numpy as np
import pytest

from models import execution, flops, model_config, transformer
from models.layers import mlp
from models.linear import invariant
from models.linear.stored import tree as stored_tree
from models.moe import layer
from tests.helpers import tiny_models
from tests.helpers.open_weights import stored_params

ROWS, TIME = 3, 10


def _moe(config, seed=0, dtype=jnp.float32):
  """Returns a module, random params of a wide scale, and rows."""
  module = layer.Moe(config, dtype, execution.Execution())
  x_BTD = np.random.default_rng(seed).normal(
    size=(ROWS, TIME, config.model_width)
  )
  x_BTD = jnp.asarray(x_BTD, jnp.float32)
  shapes = jax.eval_shape(module.init, jax.random.key(0), x_BTD)
  rng = np.random.default_rng(seed + 1)
  params = jax.tree.map(
    lambda leaf: jnp.asarray(rng.normal(0, 0.3, leaf.shape), leaf.dtype), shapes
  )
  return module, params, x_BTD


def _numpy_mlp(x_D, kernels, kind):
  up_F = x_D @ kernels['up']
  if kind == 'swiglu':
    gate_F = x_D @ kernels['gate']
    return (gate_F / (1 + np.exp(-gate_F)) * up_F) @ kernels['down']
  return np.asarray(nn.gelu(up_F, approximate=True)) @ kernels['down']


def _numpy_moe(config, params, x_BTD):
  """Returns the output token by token, and the chosen experts."""
  tree = jax.tree.map(lambda x: np.asarray(x, np.float64), params['params'])
  out_BTD, chosen_BTA = np.zeros(x_BTD.shape), []
  for b, t in np.ndindex(*x_BTD.shape[:2]):
    x_D = np.asarray(x_BTD[b, t], np.float64)
    logits_E = x_D @ tree['router']['kernel']
    probs_E = np.exp(logits_E) / np.exp(logits_E).sum()
    chosen_A = np.argsort(-probs_E, kind='stable')[: config.num_active_experts]
    scale = probs_E[chosen_A].sum() if config.norm_topk else 1.0
    for expert in chosen_A:
      kernels = {
        name.removeprefix('expert_'): leaf['kernel'][expert]
        for name, leaf in tree.items()
        if name.startswith('expert_')
      }
      gate = probs_E[expert] / scale
      out_BTD[b, t] += gate * _numpy_mlp(x_D, kernels, config.mlp)
    if config.num_shared_experts:
      shared = {name: leaf['kernel'] for name, leaf in tree['shared'].items()}
      out_BTD[b, t] += _numpy_mlp(x_D, shared, config.mlp)
    chosen_BTA.append(chosen_A)
  return out_BTD, np.array(chosen_BTA)


@pytest.mark.fast_cases(3)
@pytest.mark.parametrize(
  'overrides',
  [
    {},
    {'norm_topk': False, 'num_shared_experts': 0},
    {'mlp': 'gelu', 'num_active_experts': 1},
    {'num_experts': 3, 'num_active_experts': 3},
  ],
  ids=['swiglu', 'probabilities, none shared', 'gelu, one active', 'all'],
)
def test_a_mixture_is_a_loop_over_experts(overrides):
  config = tiny_models.mixture(**overrides)
  config.validate()
  module, params, x_BTD = _moe(config)
  y_BTD, sums = jax.jit(module.apply)(params, x_BTD)
  expected_BTD, chosen = _numpy_moe(config, params, x_BTD)
  # float32 sums of 24 and 20 terms, against float64, on values of order 3.
  np.testing.assert_allclose(y_BTD, expected_BTD, atol=2e-5)
  counts_E = np.bincount(chosen.reshape(-1), minlength=config.num_experts)
  np.testing.assert_array_equal(sums['expert_load'], counts_E)


@pytest.mark.fast_cases(2)
@pytest.mark.parametrize('scheme', ['int8', 'ordered', 'mixed'])
@pytest.mark.parametrize(
  'ports', [execution.Execution(), invariant.execution()], ids=['fast', 'inv']
)
def test_experts_in_fewer_bits_compute_as_their_floats(scheme, ports):
  config = tiny_models.mixture()
  module, floats, x_BTD = _moe(config)
  module = module.clone(execution=ports)
  kind = 'nf4' if scheme == 'mixed' else scheme
  params = stored_params.stored(floats, kind)
  if scheme == 'mixed':  # a kernel of floats beside the others
    params['params']['expert_gate'] = floats['params']['expert_gate']
  assert stored_tree.is_stored(params['params']['expert_up']['kernel'])
  found_BTD, sums = jax.jit(module.apply)(params, x_BTD)
  whole = stored_params.whole(params)
  expected_BTD, same = jax.jit(module.apply)(whole, x_BTD)
  # float32 sums of 24 and 20 terms in another order, on values of order 3.
  np.testing.assert_allclose(found_BTD, expected_BTD, atol=2e-5)
  np.testing.assert_array_equal(sums['expert_load'], same['expert_load'])


@pytest.mark.parametrize('kind', ['swiglu', 'gelu'])
def test_identical_experts_are_the_dense_mlp(kind):
  """Outputs and gradients, for any router."""
  config = tiny_models.mixture(mlp=kind, num_shared_experts=0)
  module, params, x_BTD = _moe(config)
  tree = {
    name: {'kernel': leaf['kernel'][:1]}
    for name, leaf in params['params'].items()
    if name.startswith('expert_')
  }
  dense_config = tiny_models.llama_like(mlp=kind, mlp_width=config.expert_width)
  dense = mlp.Mlp(dense_config, jnp.float32, execution.Execution())
  dense_tree = {
    name.removeprefix('expert_'): {'kernel': leaf['kernel'][0]}
    for name, leaf in tree.items()
  }
  same_tree = jax.tree.map(
    lambda w: jnp.repeat(w, config.num_experts, axis=0), tree
  ) | {'router': params['params']['router']}
  weights_BTD = jax.random.normal(jax.random.key(7), x_BTD.shape)

  def loss(apply, tree, x_BTD):
    y_BTD = apply({'params': tree}, x_BTD)
    y_BTD = y_BTD[0] if isinstance(y_BTD, tuple) else y_BTD
    return jnp.sum(y_BTD * weights_BTD), y_BTD

  def run(apply, tree):
    grad = jax.value_and_grad(
      functools.partial(loss, apply), argnums=(0, 1), has_aux=True
    )
    return jax.jit(grad)(tree, x_BTD)

  (_, y_BTD), (grads, dx_BTD) = run(module.apply, same_tree)
  (_, dense_BTD), (dense_grads, dense_dx_BTD) = run(dense.apply, dense_tree)
  # The same terms in other orders; values of order 3, gradients of order 10.
  np.testing.assert_allclose(y_BTD, dense_BTD, atol=1e-5)
  np.testing.assert_allclose(dx_BTD, dense_dx_BTD, atol=3e-5)
  for name, leaf in dense_grads.items():
    total = jnp.sum(grads[f'expert_{name}']['kernel'], axis=0)
    np.testing.assert_allclose(total, leaf['kernel'], atol=5e-5)
  # All experts saying the same, it does not matter who is asked.
  np.testing.assert_allclose(grads['router']['kernel'], 0.0, atol=3e-5)


def _sums(config, logits_BTE, is_real_BT=None):
  @jax.jit
  def sums(logits_BTE):
    ids_BTA, _ = layer.route(config, logits_BTE)
    return layer.routing_sums(config, logits_BTE, ids_BTA, is_real_BT)

  return sums(jnp.asarray(logits_BTE, jnp.float32))


def test_a_router_without_preference_has_losses_of_one_and_log_squared():
  config = tiny_models.mixture(balance_loss_weight=0.5, router_z_weight=0.25)
  sums = _sums(config, np.zeros((ROWS, TIME, 8)))
  num_tokens = ROWS * TIME
  assert float(sums['balance_loss']) == pytest.approx(num_tokens, rel=1e-6)
  z = num_tokens * np.log(8) ** 2
  assert float(sums['router_z_loss']) == pytest.approx(z, rel=1e-6)
  loss = 0.5 * num_tokens + 0.25 * z
  assert float(sums['loss']) == pytest.approx(loss, rel=1e-6)


def test_a_router_with_one_favourite_has_the_largest_balance_loss():
  config = tiny_models.mixture(num_active_experts=1)
  logits_BTE = np.zeros((ROWS, TIME, 8))
  logits_BTE[..., 5] = 50.0  # its probability is 1 to the last bit
  sums = _sums(config, logits_BTE)
  assert float(sums['balance_loss']) == pytest.approx(8 * ROWS * TIME)
  np.testing.assert_array_equal(sums['expert_load'][5], ROWS * TIME)
  np.testing.assert_array_equal(jnp.sum(sums['expert_load']), ROWS * TIME)


def test_balance_is_judged_within_each_row():
  """Each row prefers another expert: even over the batch, uneven in a row."""
  config = tiny_models.mixture(num_active_experts=1)
  logits_BTE = 50.0 * np.eye(8)[:, None, :] * np.ones((1, TIME, 1))
  sums = _sums(config, logits_BTE)
  np.testing.assert_array_equal(sums['expert_load'], TIME)
  assert float(sums['balance_loss']) == pytest.approx(8 * 8 * TIME)


def test_balance_loss_follows_deepseek_v3():
  """Equations 17 to 20 of arXiv:2412.19437, token by token, for one row."""
  config = tiny_models.mixture()
  logits_TE = np.random.default_rng(0).normal(size=(TIME, 8))
  probs_TE = np.exp(logits_TE) / np.exp(logits_TE).sum(1, keepdims=True)
  is_chosen_TE = np.argsort(np.argsort(-probs_TE, axis=1), axis=1) < 3
  f_E = 8 / (3 * TIME) * is_chosen_TE.sum(0)
  expected = TIME * np.sum(f_E * probs_TE.mean(0))
  sums = _sums(config, logits_TE[None])
  assert float(sums['balance_loss']) == pytest.approx(expected, rel=1e-5)


def test_sums_add_up_over_rows_and_do_not_count_padding():
  config = tiny_models.mixture()
  logits_BTE = np.random.default_rng(0).normal(size=(ROWS, TIME, 8))
  is_real_BT = jnp.arange(TIME)[None, :] < jnp.array([TIME, 4, 0])[:, None]
  whole = _sums(config, logits_BTE, is_real_BT)
  rows = [
    _sums(config, logits_BTE[:1]),
    _sums(config, logits_BTE[1:2, :4]),
  ]
  for name, total in whole.items():
    np.testing.assert_allclose(total, rows[0][name] + rows[1][name], rtol=1e-5)
  assert float(jnp.sum(whole['expert_load'])) == 3 * (TIME + 4)


def test_the_balance_loss_pulls_towards_balance():
  """Its gradient lowers the logits of experts with more than their share."""
  config = tiny_models.mixture(num_active_experts=1, balance_loss_weight=1.0)
  config.router_z_weight = 0.0
  logits_BTE = np.random.default_rng(0).normal(size=(1, 64, 8))
  logits_BTE[..., 2] += 3.0
  grad = jax.grad(lambda logits: _sums(config, logits)['loss'])
  slope_E = jnp.sum(grad(jnp.asarray(logits_BTE, jnp.float32)), axis=(0, 1))
  assert slope_E[2] > 0
  assert (np.delete(slope_E, 2) < 0).all()


def test_bfloat16_computes_experts_and_not_the_choice_in_bfloat16():
  config = tiny_models.mixture()
  module, params, x_BTD = _moe(config)
  x_BTD = x_BTD.astype(jnp.bfloat16)
  half = layer.Moe(config, jnp.bfloat16, execution.Execution())
  exact_BTD, sums = jax.jit(module.apply)(params, x_BTD.astype(jnp.float32))
  rounded_BTD, rounded_sums = jax.jit(half.apply)(params, x_BTD)
  assert rounded_BTD.dtype == jnp.bfloat16
  jax.tree.map(np.testing.assert_array_equal, sums, rounded_sums)
  error = np.abs(rounded_BTD.astype(np.float32) - exact_BTD).max()
  # Four roundings to 8 bits, relative to the largest value.
  assert 0 < error < 0.03 * np.abs(exact_BTD).max()


@pytest.mark.parametrize(
  ('overrides', 'message'),
  [
    (
      {'balance_loss_weight': float('nan')},
      'balance_loss_weight: got nan, expected a number >= 0',
    ),
    ({'num_experts': -1}, 'num_experts: got -1, expected a number >= 0'),
    ({'num_experts': 1}, 'num_experts: got 1, expected 0 for a dense'),
    ({'num_active_experts': 9}, 'got 9, expected 1 to num_experts = 8'),
    ({'num_active_experts': 0}, 'got 0, expected 1 to num_experts = 8'),
    (
      {'num_shared_experts': -2},
      'num_shared_experts: got -2, expected a number',
    ),
    ({'expert_width': 0}, 'expert_width: got 0, expected a positive integer'),
    (
      {'mlp_width': 40},
      'mlp_width: got 40 in a mixture of experts, expected 0',
    ),
    (
      {'use_bias': True},
      'use_bias: got True in a mixture of experts, expected',
    ),
    ({'balance_loss_weight': -0.1}, 'balance_loss_weight: got -0.1'),
    (
      {'num_experts': 0, 'mlp_width': 40},
      'num_active_experts: got 3 in a dense model, expected 0; set',
    ),
  ],
)
def test_impossible_mixtures_are_refused(overrides, message):
  with pytest.raises(ValueError, match=message):
    tiny_models.mixture(**overrides).validate()


def test_a_mixture_survives_being_written_down():
  config = tiny_models.mixture()
  assert model_config.ModelConfig.from_dict(config.to_dict()) == config


def test_flops_and_active_params_count_what_a_token_takes():
  config = tiny_models.mixture(num_experts=16, tie_embeddings=False)
  smallest = dataclasses.replace(config, num_experts=3)
  # With three experts in all, every parameter but the router's idle columns.
  idle_router = config.num_layers * config.model_width * 13
  assert flops.num_active_params(config) == (
    flops.num_params(smallest) + idle_router
  )
  assert flops.num_matmul_params(config) == (
    flops.num_matmul_params(smallest) + idle_router
  )
  # Of all that is active only norms and the embedding multiply nothing.
  shapes = jax.eval_shape(
    transformer.Transformer(config).init,
    jax.random.key(0),
    jnp.zeros((1, 1), jnp.int32),
  )['params']
  norms = sum(x.size for x in jax.tree.leaves(shapes) if x.ndim == 1)
  assert flops.num_matmul_params(config) == (
    flops.num_active_params(config) - norms - shapes['embed']['embedding'].size
  )
