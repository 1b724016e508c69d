"""Layers in stages train as on one device; parallel/pipeline.py runs them."""

import dataclasses
import functools

import jax
import numpy as np
import pytest

from parallel import parallel_config, rules
from tests.helpers import tiny_models
from tests.helpers.training import tiny_experiment
from training import learner as learner_lib
from training.optimizer import chain

Config = parallel_config.ParallelConfig


def _experiment(parallel, *, remat='none', num_microbatches=1, **model):
  fields = {
    'vocab_size': 64,
    'num_layers': 4,
    'model_width': 32,
    'num_heads': 4,
    'num_kv_heads': 2,
    'head_width': 8,
    'scan_layers': True,
  }
  experiment = tiny_experiment.make(
    model=tiny_models.llama_like(**fields | model),
    optimizer=chain.OptimizerConfig(warmup_steps=2, peak_lr=1e-2),
    parallel=parallel,
    remat=remat,
    num_microbatches=num_microbatches,
  )
  experiment.validate()
  return experiment


def _batch(index):
  # Two batches in turn, so that there is something to learn.
  return tiny_models.batch(
    batch_size=16,
    row_length=16,
    vocab_size=64,
    num_segments=2,
    num_padding=index % 2,
    seed=index % 2,
  )


def _losses(experiment, num_devices):
  """Returns the losses of 10 steps and that of an evaluation after them."""
  learner = learner_lib.make(experiment, jax.devices()[:num_devices])
  state = learner.init(jax.random.key(0))
  train_step = learner.compile_train_step()
  losses = []
  for index in range(10):
    batch = learner.placement.put_batch(_batch(index))
    state, metrics = train_step(state, batch)
    losses.append(metrics['loss'])
  batch = learner.placement.put_batch(_batch(0))
  sums = learner.compile_eval_step()(state.params, batch)
  return np.array([*losses, sums['loss'] / sums['weight']])


@functools.cache
def _single_device_losses():
  return _losses(_experiment({}), 1)


_CIRCULAR = {'stage_repeats': 2, 'stage_microbatches': 4}
_FOUR_PARTS = {'stage_microbatches': 4}


# Stages beside every other axis are in test_metamorphic.py.
@pytest.mark.slow
@pytest.mark.parametrize(
  ('parallel', 'options'),
  [
    pytest.param(
      {'stage': 2, 'data': 4},
      {'remat': 'full', 'num_microbatches': 2},
      marks=pytest.mark.slow,
    ),
    (
      {'stage': 2, 'data': 2, 'tensor': 2} | _CIRCULAR,
      {'remat': 'full', 'num_microbatches': 2},
    ),
  ],
  ids=str,
)
def test_stages_train_as_one_device_does(parallel, options):
  losses = _losses(_experiment(parallel, **options), 8)
  # The bound: sums over devices and parts are added in another order.
  np.testing.assert_allclose(losses, _single_device_losses(), atol=1e-5)
  assert losses[-1] < losses[0]


@pytest.mark.slow
def test_a_mixture_in_stages_trains_as_on_one_device():
  """Experts are split inside each stage; a layer's routing is added up."""
  mixture = dataclasses.asdict(tiny_models.mixture())
  options = {
    name: mixture[name]
    for name in mixture
    if 'expert' in name or name in ('mlp_width', 'balance_loss_weight')
  }
  stages = {'stage': 2, 'expert': 2, 'data': 2} | _CIRCULAR
  losses = _losses(_experiment(stages, **options), 8)
  expected = _losses(_experiment({}, **options), 1)
  np.testing.assert_allclose(losses, expected, atol=1e-5)


@pytest.mark.slow
def test_dropout_does_not_depend_on_the_schedule():
  options = {'dropout_rate': 0.2}
  losses = [
    _losses(_experiment({'data': 2, 'fsdp': 2} | stages, **options), 8)
    for stages in (_CIRCULAR | {'stage': 2}, {'stage': 2} | _FOUR_PARTS)
  ]
  np.testing.assert_allclose(*losses, atol=1e-5)
  assert np.abs(losses[0] - _single_device_losses()).max() > 1e-3


@pytest.mark.parametrize(
  ('parallel', 'model', 'message'),
  [
    (
      {'stage': 2, 'stage_repeats': 4},
      {},
      'num_layers: got 4, expected a multiple of .* stage_repeats = 8',
    ),
    (
      {'stage': 2},
      {'scan_layers': False},
      'scan_layers: got False with parallel.stage = 2, expected True',
    ),
    (
      {'stage': 2, 'stage_microbatches': 8},
      {},
      'batch_size: got 16 rows in 1 micro-batches of 16, expected a multiple'
      ' of the 4 devices that split the batch x 8 parts for the stages',
    ),
  ],
)
def test_models_and_batches_that_stages_cannot_share_are_refused(
  parallel, model, message
):
  with pytest.raises(ValueError, match=message):
    learner_lib.make(_experiment(parallel, **model))


@pytest.mark.slow
def test_no_token_sees_a_later_one_through_the_stages():
  experiment = _experiment({'stage': 2, 'data': 4, 'stage_repeats': 2})
  learner = learner_lib.make(experiment)
  params = learner.init(jax.random.key(0)).params
  tokens_BT = np.asarray(_batch(0)['tokens'])
  seen_at, target = 7, 3

  def logit(params, row):
    """The answer to token 7 of one row, as the embedding of each changes it."""
    logits_BTV, _ = learner.model.apply(params, tokens_BT)
    return logits_BTV[row, seen_at, target]

  with rules.applied(learner.placement.mesh):
    grads = jax.jit(jax.grad(logit))(params, 5)
  moved_V = np.abs(grads['params']['embed']['embedding']).sum(axis=1) > 0
  # Untied: a token's embedding matters if and only if it was there to be seen,
  # in that row and by then.
  seen = set(tokens_BT[5, : seen_at + 1].tolist())
  assert set(np.flatnonzero(moved_V).tolist()) == seen
  assert set(tokens_BT[5].tolist()) - seen
