"""How a mixture of experts trains: its loss, what it reports, golden numbers.

That it trains the same on any mesh is tests/parallel/test_expert_parallel.py.
"""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

from models import transformer
from tests.helpers import tiny_models
from training import state, step
from training.evaluation import validation
from training.objectives import next_token, port
from training.optimizer import chain


@functools.cache
def _model(**overrides):
  model = transformer.Transformer(tiny_models.mixture(**overrides))
  params = jax.jit(model.init)(jax.random.key(0), jnp.zeros((1, 1), jnp.int32))
  return model, params


def test_golden_step():
  """Guards against unintended changes, as in test_step."""
  model, _ = _model()
  optimizer = chain.make_optimizer(
    chain.OptimizerConfig(warmup_steps=2, peak_lr=1e-2),
    20,
    model.config,
    state.abstract_params(model),
  )
  current = jax.jit(lambda key: state.init(model, optimizer, key))(
    jax.random.key(0)
  )
  train_step = jax.jit(
    step.make_train_step(model, next_token.NextToken(), optimizer)
  )
  for index in range(2):
    batch = tiny_models.batch(seed=index, num_segments=2, num_padding=3)
    current, metrics = train_step(current, batch)
  # Another order of float32 sums moves the sixth digit.
  for name, golden in {
    'loss': 4.306936,
    'nll': 4.119126,
    'balance_loss': 1.008968,
    'router_z_loss': 4.345657,
    'grad_norm': 0.694482,
  }.items():
    assert float(metrics[name]) == pytest.approx(golden, rel=1e-4), name
  assert all(value.ndim == 0 for value in metrics.values())
  assert float(metrics['weight']) == 8 * 13


def test_the_loss_is_what_is_predicted_and_what_each_layers_router_adds():
  model, params = _model(balance_loss_weight=0.5, router_z_weight=0.25)
  batch = tiny_models.batch(num_padding=3)
  loss, sums = jax.jit(
    lambda params, batch: next_token.NextToken()(
      params, batch, port.Model(model)
    )
  )(params, batch)
  # Two layers, of which the average is reported.
  added = 2 * (0.5 * sums['balance_loss'] + 0.25 * sums['router_z_loss'])
  np.testing.assert_allclose(loss, sums['nll'] + added, rtol=1e-6)
  assert sums['expert_load'].shape == (2, 8)
  # Three experts for each of eight rows' thirteen tokens.
  np.testing.assert_array_equal(sums['expert_load'].sum(1), 3 * 8 * 13)
  logits_BTV, _ = jax.jit(model.apply)(params, batch['tokens'])
  nll_BT = optax.losses.softmax_cross_entropy_with_integer_labels(
    logits_BTV, batch['targets']
  )
  np.testing.assert_allclose(
    sums['nll'], (nll_BT * batch['weights']).sum(), rtol=1e-5
  )


def test_evaluation_reports_what_is_predicted_alone():
  model, params = _model(balance_loss_weight=0.5, router_z_weight=0.25)
  batch = tiny_models.batch(num_padding=3)
  eval_step = jax.jit(step.make_eval_step(model, next_token.NextToken()))
  result = validation.evaluate(
    eval_step,
    params,
    [batch],
    put_batch=lambda batch: batch,
    num_bytes_V=np.ones(61, np.int32),
  )
  sums = eval_step(params, batch)
  assert result['loss'] == pytest.approx(float(sums['nll'] / sums['weight']))
  assert result['loss'] < float(sums['loss'] / sums['weight']) - 0.5


def test_counts_are_reported_by_how_even_they_are():
  def objective(params, batch, model):
    del model
    loss = jnp.sum(params['w'] * batch['x'])
    return loss, {'weight': jnp.array(4.0), 'load': batch['load']}

  optimizer = optax.sgd(0.0)
  params = {'w': jnp.ones(2)}
  current = state.TrainState(
    step=jnp.zeros((), jnp.int32),
    params=params,
    opt_state=optimizer.init(params),
    key=jax.random.key(0),
  )
  train_step = step.make_train_step(
    transformer.Transformer(tiny_models.llama_like()), objective, optimizer
  )

  def reported(load_NE):
    batch = {'x': jnp.ones(2), 'load': jnp.asarray(load_NE, jnp.float32)}
    return train_step(current, batch)[1]

  metrics = reported([[5, 5, 5, 5], [20, 0, 0, 0]])
  assert float(metrics['load_max']) == 4.0
  assert float(metrics['load_min']) == 0.0
  assert float(metrics['load_entropy']) == pytest.approx(0.5)
  metrics = reported([[3, 3, 3, 3], [7, 7, 7, 7]])
  assert float(metrics['load_max']) == 1.0
  assert float(metrics['load_min']) == 1.0
  assert float(metrics['load_entropy']) == pytest.approx(1.0)
  # A batch of nothing but padding routes nobody, and is no NaN.
  assert float(reported([[0, 0, 0, 0]])['load_max']) == 0.0
