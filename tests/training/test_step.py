"""The train step: golden numbers, and the same numbers however it is run."""

import functools

import jax
import numpy as np
import optax
import pytest

from models import axes, layout, transformer
from parallel import parallel_config, placement as placement_lib
from tests.helpers import tiny_models
from training import state as state_lib, step
from training.objectives import next_token
from training.optimizer import chain

NUM_STEPS = 20
# Sizes that divide by every mesh axis below.
CONFIG = tiny_models.llama_like(
  vocab_size=64, model_width=32, num_heads=4, num_kv_heads=2, head_width=8
)


def _batch(index):
  # Four batches over and over, so that there is something to learn.
  return tiny_models.batch(
    batch_size=16,
    row_length=16,
    vocab_size=64,
    num_segments=2,
    num_padding=index % 4,
    seed=index % 4,
  )


def _optimizer(model):
  return chain.make_optimizer(
    chain.OptimizerConfig(warmup_steps=2, peak_lr=1e-2),
    NUM_STEPS,
    model.config,
    state_lib.abstract_params(model),
  )


def _init(model, optimizer):
  return jax.jit(lambda key: state_lib.init(model, optimizer, key))(
    jax.random.key(0)
  )


def _losses(
  config, parallel, num_devices, *, num_steps=NUM_STEPS, microbatches=1
):
  model = transformer.Transformer(config)
  optimizer = _optimizer(model)

  def init(key):
    return state_lib.init(model, optimizer, key)

  abstract = jax.eval_shape(init, jax.random.key(0))
  placement = placement_lib.make(
    parallel,
    abstract,
    state_lib.logical_axes(abstract, axes.param_axes(abstract.params)),
    jax.devices()[:num_devices],
  )
  state = placement.init(init, jax.random.key(0))
  train_step = placement.compile_train(
    lambda all_sum, shard_key: step.make_train_step(
      model,
      next_token.NextToken(),
      optimizer,
      num_microbatches=microbatches,
      all_sum=all_sum,
      shard_key=shard_key,
    )
  )
  losses = []
  for index in range(num_steps):
    state, metrics = train_step(state, placement.put_batch(_batch(index)))
    losses.append(metrics['loss'])
  return np.array(losses)


@functools.cache
def _single_device_losses():
  return _losses(CONFIG, parallel_config.ParallelConfig(), 1)


@pytest.mark.slow
@pytest.mark.parametrize(
  'parallel',
  [
    {'data': 8},
    {'data': 2, 'fsdp': 4},
    {'data': 2, 'fsdp': 2, 'tensor': 2},
    {'kind': 'pmap'},
  ],
  ids=str,
)
def test_every_way_across_devices_trains_the_same(parallel):
  losses = _losses(CONFIG, parallel_config.ParallelConfig(**parallel), 8)
  # The bound: sums over devices are added in another order.
  np.testing.assert_allclose(losses, _single_device_losses(), atol=1e-5)
  assert losses[-1] < losses[0]


def test_scanned_and_unrolled_layers_train_the_same():
  """From the same numbers: a scan draws its initial params in another order."""
  model = transformer.Transformer(CONFIG)
  state = _init(model, _optimizer(model))
  params, scanned_config = layout.stack(state.params, CONFIG)
  scanned = transformer.Transformer(scanned_config)
  scanned_state = state.replace(
    params=params, opt_state=_optimizer(scanned).init(params)
  )
  steps = [
    jax.jit(step.make_train_step(m, next_token.NextToken(), _optimizer(m)))
    for m in (model, scanned)
  ]
  for index in range(5):
    state, metrics = steps[0](state, _batch(index))
    scanned_state, scanned_metrics = steps[1](scanned_state, _batch(index))
    np.testing.assert_allclose(
      scanned_metrics['loss'], metrics['loss'], atol=1e-5
    )
    np.testing.assert_allclose(
      scanned_metrics['grad_norm'], metrics['grad_norm'], rtol=1e-4
    )


def test_accumulation_weighs_tokens_not_micro_batches():
  """Micro-batches with different numbers of targets: a mean of means fails."""
  model = transformer.Transformer(CONFIG)
  optimizer = optax.sgd(1.0)
  state = _init(model, optimizer)
  batch = _batch(0)
  batch['weights'] = (
    batch['weights'] * (np.arange(16)[:, None] % 4 < np.array(2)) + 0.0
  )
  batch['weights'][0, 3:] = 0.0
  results = [
    jax.jit(
      step.make_train_step(
        model, next_token.NextToken(), optimizer, num_microbatches=n
      )
    )(state, batch)
    for n in (1, 4)
  ]
  (whole, whole_metrics), (parts, parts_metrics) = results
  np.testing.assert_allclose(
    parts_metrics['loss'], whole_metrics['loss'], rtol=1e-6
  )
  assert parts_metrics['weight'] == whole_metrics['weight']
  jax.tree.map(
    lambda a, b: np.testing.assert_allclose(a, b, atol=1e-6),
    parts.params,
    whole.params,
  )


@pytest.mark.parametrize(
  ('make', 'loss', 'grad_norm'),
  [
    (tiny_models.llama_like, 4.118610, 0.695082),
    (tiny_models.gpt2_like, 4.098193, 0.969996),
  ],
)
def test_golden_step(make, loss, grad_norm):
  """Guards against unintended changes of the mathematics.

  If you meant to change initialisation, the model or the loss, put the new
  numbers here and say so in the commit.
  """
  model = transformer.Transformer(make())
  optimizer = _optimizer(model)
  state = _init(model, optimizer)
  train_step = jax.jit(
    step.make_train_step(model, next_token.NextToken(), optimizer)
  )
  for index in range(2):
    batch = tiny_models.batch(seed=index, num_segments=2, num_padding=3)
    state, metrics = train_step(state, batch)
  # Another order of float32 sums moves the sixth digit.
  assert float(metrics['loss']) == pytest.approx(loss, rel=2e-5)
  assert float(metrics['grad_norm']) == pytest.approx(grad_norm, rel=1e-4)
  assert float(metrics['weight']) == 8 * 13


def test_the_state_is_donated_and_the_key_kept():
  model = transformer.Transformer(tiny_models.llama_like(num_layers=1))
  optimizer = _optimizer(model)
  state = _init(model, optimizer)
  kept_key = np.array(jax.random.key_data(state.key))
  train_step = jax.jit(
    step.make_train_step(model, next_token.NextToken(), optimizer),
    donate_argnums=0,
  )
  new_state, _ = train_step(state, tiny_models.batch())
  assert all(x.is_deleted() for x in jax.tree.leaves(state.params))
  assert int(new_state.step) == 1
  np.testing.assert_array_equal(jax.random.key_data(new_state.key), kept_key)


def test_dropout_differs_between_steps_and_not_between_runs():
  model = transformer.Transformer(
    tiny_models.llama_like(dropout_rate=0.3, num_layers=1)
  )
  optimizer = optax.sgd(0.0)  # the params stay: only the key changes
  state = _init(model, optimizer)
  train_step = jax.jit(
    step.make_train_step(model, next_token.NextToken(), optimizer)
  )
  first_state, first = train_step(state, tiny_models.batch())
  _, again = train_step(state, tiny_models.batch())
  _, second = train_step(first_state, tiny_models.batch())
  assert first['loss'] == again['loss']
  assert abs(first['loss'] - second['loss']) > 1e-5


def test_a_batch_of_padding_changes_nothing_but_the_step():
  model = transformer.Transformer(tiny_models.llama_like(num_layers=1))
  optimizer = optax.sgd(1.0)
  state = _init(model, optimizer)
  batch = tiny_models.batch()
  batch['weights'] = np.zeros_like(batch['weights'])
  new_state, metrics = jax.jit(
    step.make_train_step(model, next_token.NextToken(), optimizer)
  )(state, batch)
  assert metrics['loss'] == 0.0
  jax.tree.map(np.testing.assert_array_equal, new_state.params, state.params)


def test_evaluation_sums_what_training_averages():
  model = transformer.Transformer(tiny_models.llama_like(num_layers=1))
  params = _init(model, optax.sgd(1.0)).params
  batch = tiny_models.batch(num_padding=4)
  sums = jax.jit(step.make_eval_step(model, next_token.NextToken()))(
    params, batch
  )
  assert sums['weight'] == 8 * 12
  logits_BTV, _ = jax.jit(model.apply)(params, batch['tokens'])
  log_probs = jax.nn.log_softmax(logits_BTV[:, :12])
  chosen = np.take_along_axis(
    np.asarray(log_probs), batch['targets'][:, :12, None], axis=-1
  )
  np.testing.assert_allclose(sums['loss'], -chosen.sum(), rtol=1e-5)
