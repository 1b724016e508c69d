"""A model too big for one device trains on several, by the compiler's figures.

The budget of a device is declared: what one device would need to train the
model, divided by 1.3. Nearly all of it is parameters, gradients and optimizer,
as in any model that does not fit; activations are a few rows.
"""

import functools

import jax
import numpy as np
import pytest

from tests.helpers import tiny_models
from tests.helpers.training import tiny_experiment
from training import learner as learner_lib
from training.optimizer import chain

OVERSIZE = 1.3
NUM_STEPS = 3
ROWS, ROW_LENGTH, VOCAB = 8, 8, 64


def _learner(num_devices, **parallel):
  experiment = tiny_experiment.make(
    model=tiny_models.llama_like(
      vocab_size=VOCAB,
      num_layers=8,
      model_width=128,
      num_heads=4,
      num_kv_heads=4,
      head_width=32,
      mlp_width=512,
      scan_layers=True,
    ),
    data={'row_length': ROW_LENGTH, 'batch_size': ROWS},
    optimizer=chain.OptimizerConfig(warmup_steps=2, peak_lr=1e-3),
    parallel=parallel,
    num_steps=NUM_STEPS,
  )
  experiment.validate()
  return learner_lib.make(experiment, jax.devices()[:num_devices])


def _memory(learner):
  lowered = learner.placement.lower_train(
    learner.build_train_step, learner.batch_shapes()
  )
  return lowered.compile().memory_analysis()


def _num_bytes(memory):
  """What a device holds during a step; what is donated is not held twice."""
  return (
    memory.argument_size_in_bytes
    + memory.output_size_in_bytes
    - memory.alias_size_in_bytes
    + memory.temp_size_in_bytes
  )


def _losses(learner):
  state = learner.init(jax.random.key(0))
  train_step = learner.compile_train_step()
  losses = []
  for index in range(NUM_STEPS):
    batch = tiny_models.batch(
      batch_size=ROWS, row_length=ROW_LENGTH, vocab_size=VOCAB, seed=index
    )
    state, metrics = train_step(state, learner.placement.put_batch(batch))
    losses.append(metrics['loss'])
  return np.array(losses)


@functools.cache
def _on_one_device():
  learner = _learner(1)
  return _memory(learner), _losses(learner)


def _state_bytes_per_device(learner):
  """Params, optimizer, step and key, as each device holds them."""
  whole = learner.abstract_state
  placed = jax.eval_shape(learner.placement.fold.fold, whole)
  sizes = jax.tree.map(
    lambda leaf, sharding: (
      np.prod(sharding.shard_shape(leaf.shape), dtype=int)
      * (8 if jax.dtypes.issubdtype(leaf.dtype, jax.dtypes.prng_key) else 4)
    ),
    placed,
    learner.placement.state_shardings,
  )
  return sum(jax.tree.leaves(sizes))


@pytest.mark.slow
@pytest.mark.parametrize(
  'parallel',
  [
    {'data': 1, 'fsdp': 8},
    {'stage': 4, 'data': 2},
    pytest.param({'stage': 8, 'data': 1}, marks=pytest.mark.slow),
    pytest.param(
      {'stage': 2, 'fsdp': 2, 'data': 2, 'stage_repeats': 2},
      marks=pytest.mark.slow,
    ),
  ],
  ids=str,
)
def test_a_model_of_1_3_devices_trains_on_several(parallel):
  one_device, losses = _on_one_device()
  budget = _num_bytes(one_device) / OVERSIZE
  learner = _learner(8, **parallel)
  memory = _memory(learner)
  assert _num_bytes(memory) < budget < _num_bytes(one_device)
  # The state is written where it was read: every byte of it is donated.
  assert memory.alias_size_in_bytes >= _state_bytes_per_device(learner)
  # Float32 sums in another order.
  np.testing.assert_allclose(_losses(learner), losses, atol=1e-5)


@pytest.mark.slow
def test_one_device_donates_its_whole_state_too():
  one_device, _ = _on_one_device()
  state_bytes = _state_bytes_per_device(_learner(1))
  assert one_device.alias_size_in_bytes >= state_bytes
  # And the model is too big because of its state, not for want of tuning.
  assert state_bytes > 0.5 * _num_bytes(one_device)
