"""Steps that are not taken: which, and what remains of them."""

import dataclasses

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

from models import transformer
from tests.helpers import tiny_models
from training import state as state_lib, step
from training.objectives import next_token
from training.optimizer import chain, spikes, update_rules

CONFIG = spikes.SpikeConfig(
  skip_std=4.0, window_steps=8, min_steps=4, max_skipped=2
)
PARAMS = {'w': np.zeros(4, np.float32)}


def _run(norms, config=CONFIG, inner=None):
  """Steps with gradients of these norms; returns (skipped, params, states)."""
  optimizer = spikes.skipping(config, inner or optax.sgd(1.0))
  params, state = PARAMS, optimizer.init(PARAMS)
  update = jax.jit(optimizer.update)
  skipped, all_params, states = [], [], []
  for norm in norms:
    grads = {'w': jnp.array([norm, 0.0, 0.0, 0.0], jnp.float32)}
    updates, state = update(grads, state, params)
    params = optax.apply_updates(params, updates)
    skipped.append(bool(spikes.was_skipped(state)))
    all_params.append(params)
    states.append(state)
  return skipped, all_params, states


def test_an_outlier_is_skipped_and_nothing_else():
  skipped, params, states = _run(
    [1.0, 1.1, 0.9, 1.0, 1.05, 30.0, 1.0], inner=optax.adam(0.1)
  )
  assert skipped == [False] * 5 + [True, False]
  np.testing.assert_array_equal(params[5]['w'], params[4]['w'])
  # Adam's moments and count are those from before.
  jax.tree.map(
    np.testing.assert_array_equal, states[5].inner[0], states[4].inner[0]
  )
  for name in ('num_measured', 'mean', 'variance'):
    assert getattr(states[5], name) == getattr(states[4], name)


def test_the_learning_rate_is_of_the_step_whether_or_not_it_was_taken():
  inner = optax.chain(
    optax.scale_by_adam(), optax.scale_by_learning_rate(lambda step: 1.0 + step)
  )
  skipped, _, states = _run([1.0, 1.1, 0.9, 1.0, 50.0, 1.0], inner=inner)
  assert skipped[4]
  adam, schedule = states[-1].inner
  assert int(schedule.count) == 6
  assert int(adam.count) == 5


def _direction_after(norms, name):
  """Returns the last update of a rule, and its counts by name."""
  config = chain.OptimizerConfig(
    rule=update_rules.RULES[name](),
    schedule='constant',
    warmup_steps=12,
    clip_norm=0.0,
  )
  config.validate(20)
  params = {
    'params': {
      'layer_0': {'attention': {'query': {'kernel': jnp.ones((4, 6))}}}
    }
  }
  optimizer = spikes.skipping(
    CONFIG,
    chain.make_optimizer(config, 20, tiny_models.llama_like(), params),
  )
  state, update, skipped = optimizer.init(params), jax.jit(optimizer.update), 0
  updates = params
  for norm in norms:
    grads = jax.tree.map(lambda x, norm=norm: norm * x, params)
    updates, state = update(grads, state, params)
    skipped += int(spikes.was_skipped(state))
  counts = {
    jax.tree_util.keystr(path): int(leaf)
    for path, leaf in jax.tree_util.tree_leaves_with_path(state.inner)
    if leaf.dtype == jnp.int32
  }
  return skipped, jax.tree.leaves(updates)[0], counts


@pytest.mark.parametrize('name', update_rules.RULES)
def test_schedules_count_steps_and_moments_count_gradients(name):
  norms = [1.0, 1.1, 0.9, 1.0, 1.05]
  skipped, _, counts = _direction_after([*norms, 50.0, 60.0], name)
  assert skipped == 2
  _, _, taken = _direction_after(norms, name)
  more = {path: count - taken[path] for path, count in counts.items()}
  of_steps = {path for path, count in more.items() if count == 2}
  assert set(more.values()) <= {0, 2}
  # Whatever decides the rate, or mixes by the step, has the count of the rate.
  (rate,) = {counts[path] - ('step_count' in path) for path in of_steps}
  assert rate == 7
  assert ('count_m2' in str(of_steps)) == (name == 'ademamix')
  assert ('step_count' in str(of_steps)) == (name == 'schedule_free')


def test_ademamix_mixes_by_the_step_after_skipped_steps():
  """Equation 4 and alpha of arXiv:2409.03137, at the step of the rate."""
  norms = [1.0, 1.1, 0.9, 1.0, 1.05, 50.0, 60.0, 1.0]
  _, found, _ = _direction_after(norms, 'ademamix')
  beta1, beta2, beta3, alpha = 0.9, 0.95, 0.9999, 5.0
  fast = slow = second = 0.0
  num_taken, direction = 0, 0.0
  for step_index, norm in enumerate(norms):
    if norm > 10:
      continue
    num_taken += 1
    done = step_index / 20
    low, high = np.log(beta1), np.log(beta3)
    decay = np.exp(low * high / ((1 - done) * high + done * low))
    fast = beta1 * fast + (1 - beta1) * norm
    slow = decay * slow + (1 - decay) * norm
    second = beta2 * second + (1 - beta2) * norm**2
    direction = (fast / (1 - beta1**num_taken) + done * alpha * slow) / (
      np.sqrt(second / (1 - beta2**num_taken)) + 1e-8
    )
  rate = 1e-3 * 7 / 12
  # Decay is 0.1 of weights of 1.
  np.testing.assert_allclose(found, -rate * (direction + 0.1), rtol=1e-5)


def test_nothing_is_skipped_before_enough_is_known():
  skipped, _, _ = _run([1.0, 1.0, 100.0, 1.0, 1.0])
  assert not any(skipped)


def test_a_short_gradient_is_no_outlier():
  skipped, _, _ = _run([1.0, 1.1, 0.9, 1.0, 1e-6, 0.0, 1.0])
  assert not any(skipped)


def test_a_change_for_good_is_accepted():
  before, after = [1.0, 1.1, 0.9, 1.0], [50.0] * 8
  skipped, _, _ = _run(before + after)
  # max_skipped of them, and then none: the norms are measured anew.
  assert skipped == [False] * 4 + [True] * 2 + [False] * 6


def test_what_is_not_finite_is_for_the_diagnosis():
  skipped, params, states = _run([1.0, 1.1, 0.9, 1.0, np.inf, 1.0])
  assert not any(skipped)
  assert not np.isfinite(params[4]['w']).all()
  # It is not measured either.
  assert states[4].mean == states[3].mean


def test_mean_and_deviation_are_those_of_the_log():
  rng = np.random.default_rng(0)
  logs = rng.normal(0.5, 0.3, 8)  # as many as the window: plain averages
  _, _, states = _run(np.exp(logs), dataclasses.replace(CONFIG, skip_std=1e3))
  np.testing.assert_allclose(states[-1].mean, logs.mean(), rtol=1e-5)
  np.testing.assert_allclose(states[-1].variance, logs.var(), rtol=1e-5)


def test_nothing_is_added_where_nothing_is_asked_for():
  optimizer = optax.sgd(1.0)
  assert spikes.skipping(spikes.SpikeConfig(), optimizer) is optimizer
  assert spikes.was_skipped(optimizer.init(PARAMS)) is None


@pytest.mark.parametrize(
  ('change', 'message'),
  [
    ({'skip_std': -1.0}, 'spikes.skip_std: got -1.0, expected a number >= 0'),
    ({'skip_std': np.nan}, 'spikes.skip_std: got nan'),
    ({'window_steps': 1}, 'spikes.window_steps: got 1, expected at least 2'),
    ({'min_steps': 0}, 'spikes.min_steps: got 0, expected at least 2'),
    ({'max_skipped': 0}, 'spikes.max_skipped: got 0, expected at least 1'),
  ],
)
def test_values_that_no_run_can_use_are_refused(change, message):
  with pytest.raises(ValueError, match=message):
    spikes.SpikeConfig(**change).validate()


def _train(poisoned_at, *, skip_std, left_out=()):
  """Losses of a run; one batch has a loss, and gradient, of 1e4 times it."""

  def objective(params, batch, model):
    loss_sum, sums = next_token.NextToken()(
      params, {k: v for k, v in batch.items() if k != 'factor'}, model
    )
    return loss_sum * jnp.mean(batch['factor']), sums

  model = transformer.Transformer(tiny_models.llama_like(num_layers=1))
  optimizer = spikes.skipping(
    dataclasses.replace(CONFIG, skip_std=skip_std), optax.sgd(0.3)
  )
  state = jax.jit(
    lambda key: state_lib.init(model, optimizer, key, has_average=True)
  )(jax.random.key(0))
  train_step = jax.jit(
    step.make_train_step(model, objective, optimizer, ema_decay=0.9)
  )
  losses, skipped = [], []
  for index in range(12):
    if index in left_out:
      continue
    batch = tiny_models.batch(seed=index % 2)
    batch['factor'] = np.full(8, 1e4 if index in poisoned_at else 1.0)
    previous = state
    state, metrics = train_step(state, batch)
    losses.append(float(metrics['loss']))
    skipped.append(float(metrics.get('skipped', 0.0)))
    if skipped[-1]:
      jax.tree.map(
        np.testing.assert_array_equal,
        (state.params, state.average),
        (previous.params, previous.average),
      )
  return losses, skipped, state.params


@pytest.mark.slow
def test_a_poisoned_batch_is_survived():
  """The run goes on as one that never had the batch; without, it is lost."""
  losses, skipped, params = _train({8}, skip_std=6.0)
  assert skipped == [0.0] * 8 + [1.0] + [0.0] * 3
  _, _, without = _train((), skip_std=6.0, left_out={8})
  jax.tree.map(np.testing.assert_array_equal, params, without)
  assert losses[-1] < losses[0]
  lost, _, _ = _train({8}, skip_std=0.0)
  assert not lost[-1] < 2 * losses[0]
