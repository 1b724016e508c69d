"""The same data trains the same, however a run is cut up and computed.

Every case trains the same parameters on the same batches as one device, one
micro-batch, stacked layers and no rematerialisation do, and is compared with
them step by step. `several processes` has its own file.

The tolerances. Two float32 sums of n terms in different orders differ by about
sqrt(n) 2^-24 of the terms' size: 1e-6 for a loss near 4. AdamW normalises
gradients, so where one is near zero a difference in its last bits can move a
parameter by a share of the learning rate, and over the steps this grows: the
largest residual is allowed ten times as much, the mean residual three times.
What these would miss is shown by `test_the_comparison_notices`.
"""

import dataclasses
import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from data import data_config, sources
from models import layout
from models.layers import cross_entropy
from tests.helpers import tiny_models
from tests.helpers.training import tiny_experiment
from training import learner as learner_lib, state as state_lib
from training.objectives import next_token
from training.optimizer import chain

NUM_STEPS = 12
ROWS, LENGTH, VOCAB = 16, 16, 64
MAX_RESIDUAL, MEAN_RESIDUAL = 1e-5, 3e-6

_SIZES = {
  'vocab_size': VOCAB,
  'num_layers': 4,
  'model_width': 32,
  'num_heads': 4,
  'num_kv_heads': 2,
  'head_width': 8,
  'scan_layers': True,
}
MODELS = {
  'dense': tiny_models.llama_like(**_SIZES, mlp_width=64),
  'mixture': tiny_models.llama_like(
    **_SIZES,
    mlp_width=0,
    num_experts=4,
    num_active_experts=2,
    num_shared_experts=1,
    expert_width=24,
    balance_loss_weight=0.01,
    router_z_weight=0.001,
  ),
}

# With all that keeps training stable, and a z-loss; for a few cases of its own.
STABLE = tiny_models.llama_like(
  **_SIZES,
  mlp_width=64,
  qk_norm=True,
  logit_softcap=3.0,
  mup_base_width=16,
  mup_base_head_width=4,
)

# Compiling a mixture takes twice as long: most of its cases are slow ones.
KINDS = ['dense', pytest.param('mixture', marks=pytest.mark.slow)]

# Ways over eight devices: each axis alone, some products, and pmap.
PARALLEL = {
  'data': {'data': 8},
  'fsdp': {'fsdp': 8},
  'tensor': {'data': 4, 'tensor': 2},
  'ring': {'data': 2, 'context': 4},
  'gather': {'data': 2, 'context': 4, 'context_attention': 'gather'},
  'stage': {'data': 2, 'stage': 4},
  'circular': {'data': 4, 'stage': 2, 'stage_repeats': 2},
  'pmap': {'kind': 'pmap'},
}
PRODUCTS = {
  'data-fsdp-tensor': {'data': 2, 'fsdp': 2, 'tensor': 2},
  'fsdp-ring-tensor': {'fsdp': 2, 'context': 2, 'tensor': 2},
  'stage-fsdp-tensor': {'stage': 2, 'fsdp': 2, 'tensor': 2},
  'fsdp-gather-tensor': {
    'fsdp': 2,
    'context': 2,
    'tensor': 2,
    'context_attention': 'gather',
  },
  'circular-longer': {
    'fsdp': 4,
    'stage': 2,
    'stage_repeats': 2,
    'stage_microbatches': 4,
  },
}
EXPERT = {
  'expert': {'data': 2, 'expert': 4},
  'expert-fsdp-tensor': {'expert': 2, 'fsdp': 2, 'tensor': 2},
  'expert-ring': {'expert': 4, 'context': 2},
}


def _tiers(names, *fast):
  """Returns the names as parameters, all but the fast ones marked slow."""
  return [
    n if n in fast else pytest.param(n, marks=pytest.mark.slow) for n in names
  ]


def _batch(index):
  # Four batches over and over, so that there is something to learn.
  return tiny_models.batch(
    batch_size=ROWS,
    row_length=LENGTH,
    vocab_size=VOCAB,
    num_segments=2,
    num_padding=index % 4,
    seed=index % 4,
  )


def _experiment(model, *, parallel=None, remat='none', microbatches=1):
  return tiny_experiment.make(
    model=model,
    data={'row_length': LENGTH, 'batch_size': ROWS},
    optimizer=chain.OptimizerConfig(warmup_steps=2, peak_lr=3e-3),
    parallel=parallel,
    remat=remat,
    num_steps=NUM_STEPS,
    num_microbatches=microbatches,
    objective=next_token.NextToken(
      z_loss_weight=0.01 if model == STABLE else 0.0
    ),
  )


@functools.cache
def _initial_state(model):
  """The state that every case of `model` starts from, layers stacked."""
  learner = learner_lib.make(_experiment(model), jax.devices()[:1])
  state = learner.init(jax.random.key(0))
  return jax.tree.map(np.asarray, state.params)


def _losses(learner, *, params=None, batch=_batch):
  """Trains for NUM_STEPS from `params` and returns [NUM_STEPS] losses."""
  model = learner.experiment.model
  if params is None:
    params = _initial_state(dataclasses.replace(model, scan_layers=True))
  if not model.scan_layers:
    params, _ = layout.unstack(
      params, dataclasses.replace(model, scan_layers=True)
    )
  whole = state_lib.TrainState(
    step=jnp.zeros((), jnp.int32),
    params=params,
    opt_state=learner.optimizer.init(params),
    key=jax.random.key(1),
  )
  placement = learner.placement
  shardings = jax.tree.map(
    lambda leaf: leaf.sharding, placement.abstract_whole()
  )
  state = placement.restored(jax.device_put(whole, shardings))
  train_step = learner.compile_train_step()
  losses = []
  for index in range(NUM_STEPS):
    state, metrics = train_step(state, placement.put_batch(batch(index)))
    losses.append(metrics['nll' if 'nll' in metrics else 'loss'])
  return np.array(losses)


def _answers(index):
  """`_batch` with few trained targets, as many as a conversation happens on.

  Rows have uneven numbers of them, and some have none: a mean over a part of
  the batch, or over rows, would be another loss.
  """
  batch = _batch(index)
  rng = np.random.default_rng(index % 4)
  share_B1 = np.linspace(0.0, 0.6, ROWS)[:, None]
  is_trained_BT = rng.random((ROWS, LENGTH)) < share_B1
  return batch | {'weights': batch['weights'] * is_trained_BT}


@functools.cache
def _expected_of_answers():
  learner = learner_lib.make(_experiment(MODELS['dense']), jax.devices()[:1])
  return _losses(learner, batch=_answers)


@functools.cache
def _expected(model):
  return _losses(learner_lib.make(_experiment(model), jax.devices()[:1]))


def _assert_same(losses, expected):
  residuals = np.abs(losses - expected)
  found = f'max {residuals.max():.1e}, mean {residuals.mean():.1e}'
  print(found)
  assert residuals.max() <= MAX_RESIDUAL, found
  assert residuals.mean() <= MEAN_RESIDUAL, found
  assert losses[-4:].mean() < losses[:4].mean() - 0.05, 'nothing was learnt'


def _check(kind, num_devices=8, **options):
  _check_model(MODELS[kind], num_devices, **options)


def _check_model(model, num_devices, **options):
  learner = learner_lib.make(
    _experiment(model, **options), jax.devices()[:num_devices]
  )
  _assert_same(_losses(learner), _expected(model))


@pytest.mark.slow
@pytest.mark.parametrize('kind', KINDS)
@pytest.mark.parametrize(
  'name', _tiers(PARALLEL, 'fsdp', 'ring', 'circular', 'pmap')
)
def test_each_way_across_devices(kind, name):
  _check(kind, parallel=PARALLEL[name])


@pytest.mark.slow
@pytest.mark.parametrize(
  'parallel',
  [
    PRODUCTS['fsdp-ring-tensor'],
    pytest.param(PRODUCTS['stage-fsdp-tensor'], marks=pytest.mark.slow),
    pytest.param(PRODUCTS['fsdp-gather-tensor'], marks=pytest.mark.slow),
    pytest.param(PARALLEL['pmap'], marks=pytest.mark.slow),
  ],
  ids=str,
)
def test_what_keeps_training_stable_across_devices(parallel):
  _check_model(STABLE, 8, parallel=parallel, remat='minimal', microbatches=2)


@pytest.mark.slow
@pytest.mark.parametrize('kind', KINDS)
@pytest.mark.parametrize(
  'axis', _tiers(['stage', 'fsdp', 'context', 'tensor'], 'tensor')
)
def test_an_axis_that_is_all_devices(kind, axis):
  """Two devices: every other axis has size one, which XLA treats apart."""
  _check(kind, num_devices=2, parallel={axis: 2})


@pytest.mark.slow
@pytest.mark.parametrize('name', _tiers(EXPERT, 'expert-fsdp-tensor'))
def test_experts_across_devices(name):
  _check('mixture', parallel=EXPERT[name])


@pytest.mark.slow
@pytest.mark.parametrize('kind', MODELS)
@pytest.mark.parametrize('name', PRODUCTS)
def test_products_across_devices(kind, name):
  _check(kind, parallel=PRODUCTS[name])


@pytest.mark.parametrize('kind', KINDS)
@pytest.mark.parametrize('microbatches', _tiers([2, 16], 16))
def test_accumulation(kind, microbatches):
  _check(kind, num_devices=1, microbatches=microbatches)


@pytest.mark.fast_cases(1)
@pytest.mark.parametrize(
  'options',
  [
    {'microbatches': 16},
    pytest.param({'microbatches': 4}, marks=pytest.mark.slow),
    {'parallel': PARALLEL['pmap'], 'microbatches': 2},
    {'parallel': PRODUCTS['fsdp-ring-tensor']},
    pytest.param({'parallel': PARALLEL['fsdp']}, marks=pytest.mark.slow),
    pytest.param({'parallel': PARALLEL['circular']}, marks=pytest.mark.slow),
    pytest.param({'parallel': PARALLEL['gather']}, marks=pytest.mark.slow),
  ],
  ids=str,
)
def test_answers_alone_are_trained_the_same(options):
  """Supervised fine-tuning: most targets have the weight 0."""
  devices = jax.devices()[: 8 if 'parallel' in options else 1]
  learner = learner_lib.make(_experiment(MODELS['dense'], **options), devices)
  losses = _losses(learner, batch=_answers)
  _assert_same(losses, _expected_of_answers())


@pytest.mark.slow
@pytest.mark.parametrize('kind', KINDS)
@pytest.mark.parametrize('remat', ['minimal', 'full'])
def test_rematerialisation(kind, remat):
  _check(kind, num_devices=1, remat=remat)


@pytest.mark.parametrize('kind', KINDS)
def test_layers_apart(kind):
  model = MODELS[kind]
  apart = dataclasses.replace(model, scan_layers=False)
  learner = learner_lib.make(_experiment(apart), jax.devices()[:1])
  _assert_same(_losses(learner), _expected(model))


@pytest.mark.fast_cases(1)
@pytest.mark.parametrize('kind', KINDS)
@pytest.mark.parametrize('loss', ['plain', 'chunked'])
def test_chunked_and_plain_loss(kind, loss, monkeypatch):
  """The default is one chunk here; `chunked` has eight, `plain` all logits."""
  model = MODELS[kind]
  expected = _expected(model)
  learner = learner_lib.make(_experiment(model), jax.devices()[:1])
  if loss == 'chunked':
    monkeypatch.setattr(
      cross_entropy, 'MAX_CHUNK_LOGITS', ROWS * LENGTH * VOCAB // 8
    )
    assert cross_entropy.num_chunks(ROWS, LENGTH, VOCAB) == 8
  else:
    execution = dataclasses.replace(
      learner.model.execution, weighted_nll=_plain_nll
    )
    learner = dataclasses.replace(
      learner, model=learner.model.clone(execution=execution)
    )
  _assert_same(_losses(learner), expected)


def _plain_nll(hidden_BTD, head_VD, targets_BT, weights_BT, form):
  del form
  logits_BTV = jnp.einsum('BTD,VD->BTV', hidden_BTD, head_VD)
  log_probs_BTV = jax.nn.log_softmax(logits_BTV)
  chosen_BT1 = jnp.take_along_axis(log_probs_BTV, targets_BT[..., None], 2)
  nll = -jnp.sum(chosen_BT1[..., 0] * weights_BT)
  return cross_entropy.LossSums(nll, nll, jnp.zeros(()))


@pytest.mark.slow
@pytest.mark.parametrize('kind', KINDS)
def test_packed_and_padded(kind):
  """Two documents in a row, or each in a row of its own.

  Not for the balance loss of a mixture, which is that of rows.
  """
  model = MODELS[kind]
  if kind == 'mixture':
    model = dataclasses.replace(model, balance_loss_weight=0.0)
  padded = dataclasses.replace(
    _experiment(model),
    data=data_config.DataConfig(
      open_source=sources.text_files, row_length=LENGTH, batch_size=2 * ROWS
    ),
  )
  _assert_same(
    _losses(learner_lib.make(padded, jax.devices()[:1]), batch=_padded),
    _expected(model),
  )


def _padded(index):
  """The documents of `_batch(index)`, each in a row of its own."""
  packed = _batch(index)
  rows = {name: [] for name in packed}
  for b in range(ROWS):
    for segment in (1, 2):
      here = packed['segment_ids'][b] == segment
      for name, array_BT in packed.items():
        row = np.zeros(LENGTH, array_BT.dtype)
        row[: here.sum()] = array_BT[b][here]
        if name == 'segment_ids':
          row = np.minimum(row, 1)
        rows[name].append(row)
  return {name: np.stack(arrays) for name, arrays in rows.items()}


@pytest.mark.slow
@pytest.mark.parametrize('kind', MODELS)
@pytest.mark.parametrize(
  'options',
  [
    {'parallel': {'fsdp': 4, 'tensor': 2}, 'remat': 'full', 'microbatches': 2},
    {
      'parallel': {'data': 2, 'stage': 2, 'tensor': 2, 'stage_repeats': 2},
      'remat': 'minimal',
      'microbatches': 2,
    },
    {
      'parallel': {'fsdp': 2, 'context': 4},
      'remat': 'full',
      'microbatches': 4,
    },
    {'parallel': {'kind': 'pmap'}, 'remat': 'minimal', 'microbatches': 2},
  ],
  ids=str,
)
def test_everything_at_once(kind, options):
  _check(kind, **options)


@pytest.mark.parametrize('change', ['one_target', 'one_segment', 'one_weight'])
def test_the_comparison_notices(change):
  """A mistake in one token of one batch exceeds the tolerance."""

  def batch(index):
    batch = _batch(index)
    if index == 0 and change == 'one_target':
      batch['targets'][3, 2] = (batch['targets'][3, 2] + 1) % VOCAB
    if index == 0 and change == 'one_segment':
      batch['segment_ids'][3] = 1
    if index == 0 and change == 'one_weight':
      batch['weights'][3, 2] = 0.0
    return batch

  model = MODELS['dense']
  learner = learner_lib.make(_experiment(model), jax.devices()[:1])
  with pytest.raises(AssertionError, match='max'):
    _assert_same(_losses(learner, batch=batch), _expected(model))
