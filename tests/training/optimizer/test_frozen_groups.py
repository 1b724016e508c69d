"""Frozen parameters count nowhere: in no norm, no moment, no average."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from models import transformer
from parallel import parallel_config, placement as placement_lib
from tests.helpers import tiny_models
from tests.helpers.training import tiny_experiment
from training import learner as learner_lib, state as state_lib, step
from training.objectives import next_token, port
from training.optimizer import chain, param_groups, spikes, update_rules
from training.planning import memory

STEPS = 20
SPIKES = spikes.SpikeConfig(skip_std=4.0, window_steps=8, min_steps=4)
FROZEN = (('^embed/', 0.0),)
MODEL = transformer.Transformer(
  tiny_models.llama_like(num_layers=1, vocab_size=64, tie_embeddings=False)
)
RULES = {name: rule() for name, rule in update_rules.RULES.items()} | {
  'adamw bfloat16': update_rules.AdamW(state_dtype='bfloat16'),
  'muon': update_rules.Muon(adam_peak_lr=0.02),
}


def _objective(params, batch, model):
  """The loss of a language model; `spike` is a gradient of the embedding."""
  batch = dict(batch)
  spike = jnp.mean(batch.pop('spike'))
  loss_sum, sums = next_token.NextToken()(params, batch, model)
  embedding = params['params']['embed']['embedding']
  zero = embedding - jax.lax.stop_gradient(embedding)
  return loss_sum + spike * jnp.sum(zero), sums


def _optimizer(name='adamw', lr_multipliers=FROZEN):
  rule = RULES[name]
  config = chain.OptimizerConfig(
    rule=rule,
    lr_multipliers=lr_multipliers,
    warmup_steps=0,
    schedule='constant',
    weight_decay_mask='all',
  )
  config.validate(STEPS)
  params = state_lib.abstract_params(MODEL)
  return chain.make_optimizer(config, STEPS, MODEL.config, params)


def _train(spike, *, name='adamw', num_microbatches=1, kind='jit', steps=7):
  """Returns the metrics of each step, the first params and the last state."""
  optimizer = spikes.skipping(SPIKES, _optimizer(name))

  def init(key):
    return state_lib.init(MODEL, optimizer, key, has_average=True)

  abstract = jax.eval_shape(init, jax.random.key(0))
  placement = placement_lib.make(
    parallel_config.ParallelConfig(kind=kind),
    abstract,
    jax.tree.map(lambda leaf: (None,) * leaf.ndim, abstract),
    jax.devices()[: 2 if kind == 'pmap' else 1],
  )
  train_step = placement.compile_train(
    lambda all_sum, shard_key: step.make_train_step(
      MODEL,
      _objective,
      optimizer,
      num_microbatches=num_microbatches,
      ema_decay=0.9,
      all_sum=all_sum,
      shard_key=shard_key,
    )
  )
  state, metrics = placement.init(init, jax.random.key(0)), []
  first = jax.device_get(placement.whole(state).params)
  for index in range(steps):
    batch = tiny_models.batch(vocab_size=64, seed=index % 2)
    batch['spike'] = np.full((8, 1), spike if index == steps - 2 else 0.0)
    batch['spike'] = batch['spike'].astype(np.float32)
    state, values = train_step(state, placement.put_batch(batch))
    metrics.append(jax.device_get(values))
  return metrics, first, jax.device_get(placement.whole(state))


@pytest.mark.slow
@pytest.mark.parametrize(
  'how',
  [
    {'name': 'adamw'},
    {'name': 'muon'},
    {'name': 'schedule_free'},
    {'name': 'adamw', 'num_microbatches': 2},
    {'name': 'adamw', 'kind': 'pmap'},
  ],
  ids=str,
)
@pytest.mark.parametrize('spike', [1e6, np.nan])
def test_a_spike_in_a_frozen_gradient_changes_nothing(how, spike):
  """No step is skipped; every metric and weight is as without the spike."""
  found, first, state = _train(spike, **how)
  expected, _, without = _train(0.0, **how)
  assert [values['skipped'] for values in found] == [0.0] * len(found)
  for values, others in zip(found, expected, strict=True):
    # NaN reaches the loss itself: 0 x NaN.
    for metric in values.keys() - ({'loss'} if np.isnan(spike) else set()):
      assert values[metric] == others[metric]
  jax.tree.map(
    np.testing.assert_array_equal,
    (state.params, state.opt_state, state.average),
    (without.params, without.opt_state, without.average),
  )
  for tree in (state.params, state.average):
    np.testing.assert_array_equal(
      tree['params']['embed']['embedding'],
      first['params']['embed']['embedding'],
    )


@pytest.mark.slow
def test_the_norm_is_that_of_the_trained_gradients():
  metrics, params, _ = _train(0.0, steps=2)
  batch = tiny_models.batch(vocab_size=64, seed=0)
  grad_fn = jax.grad(next_token.NextToken(), has_aux=True)
  grads, sums = grad_fn(params, batch, port.Model(MODEL))
  del grads['params']['embed']
  norm = np.sqrt(sum(np.sum(np.square(g)) for g in jax.tree.leaves(grads)))
  np.testing.assert_allclose(
    metrics[0]['grad_norm'], norm / sums['weight'], rtol=1e-5
  )


@pytest.mark.slow
@pytest.mark.parametrize('name', RULES)
def test_spikes_are_judged_without_what_is_frozen(name):
  """Also where the optimizer is given all gradients, as optax does."""
  optimizer = spikes.skipping(SPIKES, _optimizer(name))
  params = MODEL.init(jax.random.key(0), jnp.zeros((1, 1), jnp.int32))
  state, update = optimizer.init(params), jax.jit(optimizer.update)
  for index in range(8):
    grads = jax.tree.map(jnp.ones_like, params)
    grads['params']['embed']['embedding'] *= 1e6 if index == 6 else 1.0
    updates, state = update(grads, state, params)
    assert not spikes.was_skipped(state)
    assert not updates['params']['embed']['embedding'].any()
  grads['params']['head']['embedding'] *= 1e6
  assert spikes.was_skipped(update(grads, state, params)[1])


@pytest.mark.parametrize('name', RULES)
def test_frozen_parameters_have_no_state(name):
  params = state_lib.abstract_params(MODEL)
  state = jax.eval_shape(_optimizer(name).init, params)
  table = params['params']['embed']['embedding'].shape
  paths = [
    jax.tree_util.keystr(path)
    for path, leaf in jax.tree_util.tree_leaves_with_path(state)
    if leaf.ndim
  ]
  assert table
  assert paths
  assert not [path for path in paths if "['embed']" in path]


_MIXTURE = transformer.Transformer(
  tiny_models.mixture(router_correction=True, router_score='sigmoid')
)


@pytest.mark.slow
@pytest.mark.parametrize('mask', param_groups.DECAY_MASKS)
@pytest.mark.parametrize('name', RULES)
def test_routing_corrections_are_state_that_no_step_changes(name, mask):
  params = _MIXTURE.init(jax.random.key(0), jnp.zeros((1, 1), jnp.int32))
  params = jax.tree.map(lambda x: x + 0.3, params)
  config = chain.OptimizerConfig(
    rule=RULES[name],
    warmup_steps=0,
    schedule='constant',
    weight_decay=0.5,
    weight_decay_mask=mask,
  )
  optimizer = chain.make_optimizer(config, STEPS, _MIXTURE.config, params)
  state, update = optimizer.init(params), jax.jit(optimizer.update)
  zeros = jax.tree.map(jnp.zeros_like, params)
  num_corrections = 0
  for _ in range(3):
    updates, state = update(zeros, state, params)
  for path, leaf in jax.tree_util.tree_leaves_with_path(updates):
    if 'router_correction' in jax.tree_util.keystr(path):
      num_corrections += 1
      np.testing.assert_array_equal(leaf, 0.0)
  assert num_corrections
  assert 'router_correction' not in str(
    [
      path
      for path, leaf in jax.tree_util.tree_leaves_with_path(state)
      if leaf.ndim
    ]
  )
  decayed = param_groups.is_decayed(mask, params)
  assert not any(
    marked
    for path, marked in jax.tree_util.tree_leaves_with_path(decayed)
    if 'router_correction' in jax.tree_util.keystr(path)
  )


def test_a_model_of_which_only_corrections_learn_is_refused():
  pairs = (('^(?!.*router_correction)', 0.0),)
  with pytest.raises(ValueError, match='which freezes every parameter'):
    param_groups.lr_multipliers(pairs, state_lib.abstract_params(_MIXTURE))


def test_the_plan_counts_gradients_and_moments_of_trained_parameters():
  def estimate(lr_multipliers):
    experiment = tiny_experiment.make(
      optimizer=chain.OptimizerConfig(
        warmup_steps=0, lr_multipliers=lr_multipliers
      )
    )
    learner = learner_lib.make(experiment, jax.devices()[:1])
    params = learner.abstract_state.params['params']
    return memory.estimate(learner), sum(
      4 * leaf.size
      for name, tree in params.items()
      if name.startswith('layer')
      for leaf in jax.tree.leaves(tree)
    )

  (whole, num_bytes), (partial, _) = estimate(()), estimate((('^layer', 0.0),))
  assert whole.gradients - partial.gradients == num_bytes
  assert whole.optimizer - partial.optimizer == 2 * num_bytes
