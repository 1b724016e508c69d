"""8-bit products: their error against float products, and that models learn."""

import functools
import sys

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

from models import execution, transformer
from models.linear import plain, quantized
from tests.helpers import tiny_models
from training import state as state_lib, step
from training.objectives import next_token
from training.optimizer import chain

pytest.importorskip('qwix', reason='needs requirements-quant.txt')

PRODUCTS = {'int8': quantized.int8, 'fp8': quantized.fp8}
# Rounding to n bits below the leading one errs by at most 2^-(n+1) of a value,
# uniformly: 2^-(n+1) / sqrt(3) of it on average. Two such operands, and for
# int8 a scale set by the largest of 64 normal values, 2.5 of their deviations.
# int8: sqrt(2) * 2.5 / 127 / sqrt(12) = 0.8 %; e4m3: sqrt(2) * 2^-4 / sqrt(3)
# = 5 % at the worst mantissa; with e5m2 gradients up to 8 %.
FORWARD_ERROR = {'int8': 0.015, 'fp8': 0.05}
GRADIENT_ERROR = {'int8': 0.015, 'fp8': 0.08}


def _relative_error(got, expected):
  return float(
    jnp.linalg.norm((got - expected).ravel())
    / jnp.linalg.norm(expected.ravel())
  )


@pytest.mark.parametrize('form', quantized.FORMATS)
@pytest.mark.parametrize('use_bias', [True, False])
def test_values_and_gradients_are_near_the_float_product(form, use_bias):
  keys = jax.random.split(jax.random.key(0), 4)
  x = jax.random.normal(keys[0], (4, 32, 64))
  w = jax.random.normal(keys[1], (64, 48)) / 8
  bias = jax.random.normal(keys[2], (48,)) if use_bias else None
  dy = jax.random.normal(keys[3], (4, 32, 48))

  def run(product):
    y, pull = jax.vjp(lambda x, w, b: product(x, w, b, jnp.float32), x, w, bias)
    return y, *pull(dy)

  y, dx, dw, dbias = jax.jit(run, static_argnums=0)(PRODUCTS[form])
  y_float, dx_float, dw_float, dbias_float = jax.jit(run, static_argnums=0)(
    plain.linear
  )
  assert 0 < _relative_error(y, y_float) < FORWARD_ERROR[form]
  assert 0 < _relative_error(dx, dx_float) < GRADIENT_ERROR[form]
  assert _relative_error(dw, dw_float) < GRADIENT_ERROR[form]
  if form == 'int8':  # the weight's gradient is not quantised
    np.testing.assert_allclose(dw, dw_float, rtol=1e-4, atol=1e-4)
  if use_bias:
    np.testing.assert_allclose(dbias, dbias_float, rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize('form', quantized.FORMATS)
def test_rows_of_zeros_give_zeros(form):
  """The scale of padding, or of a dead channel, is 0 and must not divide."""
  x = jnp.zeros((2, 3, 8)).at[0, 0].set(1.0)
  w = jnp.zeros((8, 4)).at[:, 0].set(1.0)
  y, pull = jax.vjp(lambda x, w: PRODUCTS[form](x, w, None, jnp.float32), x, w)
  gradients = pull(jnp.zeros_like(y))
  np.testing.assert_allclose(y[0, 0], [8.0, 0, 0, 0], rtol=0.01)
  assert not np.any(np.asarray(y)[1])
  assert all(np.all(np.isfinite(g)) for g in gradients)


@pytest.mark.parametrize('form', quantized.FORMATS)
def test_operands_reach_the_multiplier_in_eight_bits(form):
  x, w = jnp.ones((2, 4, 8), jnp.bfloat16), jnp.ones((8, 6))

  def loss(x, w):
    return jnp.sum(PRODUCTS[form](x, w, None, jnp.bfloat16))

  text = str(jax.make_jaxpr(jax.grad(loss, (0, 1)))(x, w))
  narrow = {'int8': 'i8', 'fp8': 'f8_e4m3fn'}[form]
  assert narrow in text
  y = PRODUCTS[form](x, w, None, jnp.bfloat16)
  assert y.dtype == jnp.bfloat16


def _train(form, *, num_steps=20, **model_fields):
  model = transformer.Transformer(
    tiny_models.llama_like(scan_layers=True, **model_fields),
    jnp.bfloat16,
    execution.Execution(
      remat='minimal',
      linear=PRODUCTS.get(form, plain.linear),
    ),
  )
  optimizer = chain.make_optimizer(
    chain.OptimizerConfig(warmup_steps=2, peak_lr=1e-2),
    num_steps,
    model.config,
    state_lib.abstract_params(model),
  )
  state = jax.jit(functools.partial(state_lib.init, model, optimizer))(
    jax.random.key(0)
  )
  train_step = jax.jit(
    step.make_train_step(model, next_token.NextToken(), optimizer),
    donate_argnums=(0,),
  )
  losses = []
  for index in range(num_steps):
    state, metrics = train_step(
      state, tiny_models.batch(num_segments=2, num_padding=3, seed=index % 2)
    )
    losses.append(float(metrics['loss']))
  return np.array(losses), state


@pytest.mark.slow
@pytest.mark.parametrize(
  'form', ['int8', pytest.param('fp8', marks=pytest.mark.slow)]
)
def test_training_learns_what_float_training_learns(form):
  reference, _ = _train('float')
  assert reference[-1] < 0.7 * reference[0]
  losses, state = _train(form)
  # The first step differs by rounding alone; later ones by where it led.
  np.testing.assert_allclose(losses[0], reference[0], rtol=2e-3)
  np.testing.assert_allclose(losses, reference, rtol=0.06)
  assert not np.array_equal(losses, reference)
  assert all(x.dtype == jnp.float32 for x in jax.tree.leaves(state.params))
  assert np.isfinite(float(optax.tree.norm(state.params)))


def test_a_missing_package_is_named(monkeypatch):
  monkeypatch.setitem(sys.modules, 'qwix', None)
  with pytest.raises(ValueError, match='pip install -r requirements-quant.txt'):
    quantized.check_installed()
