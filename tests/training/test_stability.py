"""z-loss in the objective, the experiment and what is reported of it.

The kernel is in tests/models/layers/test_cross_entropy.py, all meshes are in
tests/training/runs/test_metamorphic.py. With soft-cap, QK-norm and muP in the
model as well.
"""

import functools
import math

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

from models import transformer
from tests.helpers import tiny_models
from tests.helpers.training import tiny_experiment
from training import learner as learner_lib, step
from training.evaluation import validation
from training.objectives import next_token, port
from training.optimizer import chain

Z_WEIGHT = 0.1


@functools.cache
def _model(config):
  model = transformer.Transformer(config)
  params = jax.jit(model.init)(jax.random.key(0), jnp.zeros((1, 1), jnp.int32))
  return model, params


def _objective(z_loss_weight=Z_WEIGHT):
  return next_token.NextToken(z_loss_weight=z_loss_weight)


@functools.partial(jax.jit, static_argnums=0)
def _plain(model, params, batch):
  """(loss, nll, z) from logits, left to autodiff."""
  logits_BTV, _ = model.apply(
    params, batch['tokens'], batch['positions'], None, batch['segment_ids']
  )
  log_z_BT = jax.nn.logsumexp(logits_BTV, axis=-1)
  nll_BT = optax.losses.softmax_cross_entropy_with_integer_labels(
    logits_BTV, batch['targets']
  )
  nll = jnp.sum(nll_BT * batch['weights'])
  z = jnp.sum(log_z_BT**2 * batch['weights'])
  return nll + Z_WEIGHT * z, {'nll': nll, 'z_loss': z}


@pytest.mark.slow
def test_the_objective_and_its_gradient_are_the_formulas():
  model, params = _model(tiny_models.stable())
  batch = tiny_models.batch(num_padding=3)

  def both(objective):
    def loss(params):
      return objective(params, batch, port.Model(model))

    return jax.jit(jax.value_and_grad(loss, has_aux=True))(params)

  (loss, sums), grads = both(_objective())
  (expected, terms), expected_grads = both(
    lambda params, batch, _: _plain(model, params, batch)
  )
  np.testing.assert_allclose(loss, expected, rtol=1e-6)
  assert set(sums) == {'weight', *terms}
  for name, value in terms.items():
    np.testing.assert_allclose(sums[name], value, rtol=1e-6)
  jax.tree.map(
    # Sums over 104 tokens, of gradients of order 1 to 100.
    lambda a, b: np.testing.assert_allclose(a, b, rtol=1e-4, atol=1e-4),
    grads,
    expected_grads,
  )


def test_without_a_weight_the_loss_is_the_nll_and_nothing_else_is_reported():
  model, params = _model(tiny_models.stable())
  batch = tiny_models.batch()
  loss, sums = jax.jit(
    lambda params: next_token.NextToken()(params, batch, port.Model(model))
  )(params)
  _, terms = _plain(model, params, batch)
  np.testing.assert_allclose(loss, terms['nll'], rtol=1e-6)
  assert set(sums) == {'weight'}


@pytest.mark.slow
def test_of_a_mixture_the_loss_has_both():
  model, params = _model(tiny_models.mixture(balance_loss_weight=0.5))
  batch = tiny_models.batch(num_padding=3)

  @functools.partial(jax.jit, static_argnums=1)
  def sums(params, weight):
    return _objective(weight)(params, batch, port.Model(model))

  (plain, without), (loss, found) = (sums(params, w) for w in (0.0, Z_WEIGHT))
  np.testing.assert_allclose(found['nll'], without['nll'], rtol=1e-6)
  np.testing.assert_allclose(
    loss - plain, Z_WEIGHT * found['z_loss'], rtol=1e-4
  )


def test_evaluation_reports_what_is_predicted_alone():
  model, params = _model(tiny_models.stable())
  batch = tiny_models.batch(num_padding=3)
  result = validation.evaluate(
    jax.jit(step.make_eval_step(model, _objective())),
    params,
    [batch],
    put_batch=lambda batch: batch,
    num_bytes_V=np.ones(61, np.int32),
  )
  _, terms = _plain(model, params, batch)
  assert result['loss'] == pytest.approx(float(terms['nll']) / (8 * 13))


def _experiment(**fields):
  return tiny_experiment.make(
    data={'batch_size': 8},
    optimizer=chain.OptimizerConfig(warmup_steps=2, peak_lr=1e-2),
    num_steps=30,
    **fields,
  )


def _train(z_loss_weight):
  """Returns the metrics of the last step, from a model with large logits."""
  experiment = _experiment(objective=_objective(z_loss_weight))
  experiment.validate()
  learner = learner_lib.make(experiment, jax.devices()[:1])
  state = learner.init(jax.random.key(0))
  # All logits of a token larger by as much: a softmax does not notice.
  tree = dict(state.params['params'])
  tree['head'] = {'embedding': tree['head']['embedding'] + 0.3}
  state = state.replace(params={'params': tree})
  train_step = learner.compile_train_step()
  batch = learner.placement.put_batch(tiny_models.batch(vocab_size=64))
  for _ in range(experiment.num_steps):
    state, metrics = train_step(state, batch)
  return metrics


@pytest.mark.slow
def test_a_run_with_z_loss_keeps_log_z_near_zero():
  metrics = _train(Z_WEIGHT)
  assert {'loss', 'nll', 'z_loss'} <= set(metrics)
  np.testing.assert_allclose(
    metrics['loss'], metrics['nll'] + Z_WEIGHT * metrics['z_loss'], rtol=1e-5
  )
  # All but nothing of it counts: what it is without pressure.
  free = _train(1e-9)
  assert metrics['z_loss'] < 0.5 * free['z_loss']


def test_an_experiment_describes_its_objective():
  experiment = _experiment(objective=_objective(1e-4))
  experiment.validate()
  assert experiment.to_dict()['objective'] == {
    'type': 'training.objectives.next_token.NextToken',
    'z_loss_weight': 1e-4,
  }


def _no_objective(params, batch, model):
  del params, batch, model


@pytest.mark.parametrize(
  ('objective', 'message'),
  [
    (_objective(-1e-4), 'z_loss_weight: got -0.0001, expected a number >= 0'),
    (_objective(math.nan), 'z_loss_weight: got nan, expected a number >= 0'),
    (
      _no_objective,
      'config.objective: got .*_no_objective.*, expected an objective of'
      ' training/objectives',
    ),
  ],
)
def test_objectives_that_mean_nothing_are_refused(objective, message):
  with pytest.raises(ValueError, match=message):
    _experiment(objective=objective).validate()
