"""Rematerialisation: the same numbers from less memory.

tests/training/test_ahead_of_time.py shows that `offload` reaches host memory,
for devices that have another memory than the host.
"""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from models import execution, remat, transformer
from models.linear import plain
from tests.helpers import tiny_models
from training.objectives import next_token, port

BATCH = tiny_models.batch(
  batch_size=8, row_length=64, num_segments=2, num_padding=3
)


@functools.cache
def _parts(policy, scan_layers, dtype, **ports):
  config = tiny_models.llama_like(
    scan_layers=scan_layers, num_layers=4, model_width=64, mlp_width=128,
    head_width=16, max_length=64,
  )  # fmt: skip
  model = transformer.Transformer(
    config, dtype, execution.Execution(remat=policy, **ports)
  )
  init = jax.jit(model.init)

  def loss(params):
    return next_token.NextToken()(params, BATCH, port.Model(model))[0]

  shapes = jax.eval_shape(init, jax.random.key(0), jnp.zeros((1, 1), jnp.int32))
  return init, jax.jit(jax.value_and_grad(loss)).lower(shapes).compile()


def _value_and_gradients(policy, scan_layers, dtype, **ports):
  init, run = _parts(policy, scan_layers, dtype, **ports)
  params = init(jax.random.key(0), jnp.zeros((1, 1), jnp.int32))
  return run(params)


@pytest.mark.fast_cases(1)
@pytest.mark.parametrize(
  'scan_layers', [True, pytest.param(False, marks=pytest.mark.slow)]
)
@pytest.mark.parametrize('policy', ['minimal', 'full', 'offload'])
def test_losses_and_gradients_are_those_of_storing_everything(
  policy, scan_layers
):
  expected = _value_and_gradients('none', scan_layers, jnp.float32)
  got = _value_and_gradients(policy, scan_layers, jnp.float32)
  # The loss is computed from the same operations in the same order.
  np.testing.assert_array_equal(got[0], expected[0])
  # Made again inside another loop, results may be fused, and so rounded,
  # otherwise: a few units in the last place of sums of hundreds.
  jax.tree.map(
    lambda a, b: np.testing.assert_allclose(
      a, b, rtol=1e-5, atol=1e-6 * float(jnp.max(jnp.abs(b)))
    ),
    got[1],
    expected[1],
  )


@pytest.mark.slow
@pytest.mark.parametrize('policy', ['none', 'minimal', 'full'])
def test_layers_apart_and_activations_made_again_train_the_same(policy):
  expected = _value_and_gradients('none', True, jnp.float32)
  got = _value_and_gradients(
    policy, True, jnp.float32, is_unrolled=True, recomputes_activation=True
  )
  np.testing.assert_allclose(got[0], expected[0], rtol=1e-6)
  jax.tree.map(
    # Fused, and so rounded, otherwise: see above.
    lambda a, b: np.testing.assert_allclose(
      a, b, rtol=1e-5, atol=1e-6 * float(jnp.max(jnp.abs(b)))
    ),
    got[1],
    expected[1],
  )


def _temp_bytes(policy, dtype=jnp.float32):
  _, run = _parts(policy, True, dtype)
  return run.memory_analysis().temp_size_in_bytes


def test_each_policy_stores_less_than_the_one_before():
  stored = [_temp_bytes(policy) for policy in ('none', 'minimal', 'full')]
  assert stored[0] > 1.3 * stored[1] > 1.3 * 1.3 * stored[2]


def _residuals(policy, dtype):
  """Returns (shape, dtype) of the residuals of one layer."""
  config = tiny_models.llama_like()

  def layer(x_BTD, w_DF, v_FD):
    x_BTD = remat.named_input(x_BTD)
    hidden_BTF = jnp.sin(plain.linear(x_BTD, w_DF, None, dtype))
    return jnp.sin(plain.linear(hidden_BTF, v_FD, None, dtype))

  if policy != 'none':
    layer = jax.checkpoint(layer, policy=remat.policy(policy))
  x = jnp.ones((2, 16, config.model_width), dtype)
  w = jnp.ones((config.model_width, config.mlp_width))
  _, pull = jax.vjp(layer, x, w, w.T)
  return {
    (leaf.shape[-1], leaf.dtype.name)
    for leaf in jax.tree.leaves(pull)
    if leaf.ndim == 3
  }


def test_minimal_keeps_products_in_the_dtype_of_activations():
  """Not in the float32 of the accumulator, which has twice the bytes."""
  config = tiny_models.llama_like()
  kept = _residuals('minimal', jnp.bfloat16)
  assert kept == {
    (config.model_width, 'bfloat16'),  # the input, and the second product
    (config.mlp_width, 'bfloat16'),
  }
  assert _residuals('full', jnp.bfloat16) == {(config.model_width, 'bfloat16')}


def test_an_unknown_policy_is_refused():
  with pytest.raises(ValueError, match="got 'some', expected one of none"):
    remat.policy('some')


@pytest.mark.slow
def test_bfloat16_passes_stay_near_float32_ones():
  """The loss to 8 bits; each gradient to a few rounding errors per layer."""
  loss, grads = _value_and_gradients('none', True, jnp.bfloat16)
  expected, expected_grads = _value_and_gradients('none', True, jnp.float32)
  assert loss.dtype == jnp.float32
  np.testing.assert_allclose(loss, expected, rtol=2**-9)
  # Activations are rounded to 2^-9 at most some ten times on the way through
  # each of 4 layers, and back: sqrt(2 * 10 * 4) * 2^-9 = 1.7 % at random.
  for got, reference in zip(
    jax.tree.leaves(grads), jax.tree.leaves(expected_grads), strict=True
  ):
    assert got.dtype == jnp.float32
    error = float(jnp.linalg.norm(got - reference))
    assert error < 0.03 * float(jnp.linalg.norm(reference))
