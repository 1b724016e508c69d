"""Every objective trains the same, however its batches are cut up and laid out.

As tests/training/runs/test_metamorphic.py, for the objectives of fine-tuning:
parts of a batch have different numbers of units, trained tokens and labels, so
a mean of means would differ. The tolerances are those of that file.
"""

import atexit
import dataclasses
import functools
import pathlib
import shutil
import tempfile

import jax
import numpy as np
import pytest

from tests.helpers import frozen_dirs, tiny_models
from tests.helpers.training import preference_rows, tiny_experiment
from training import learner as learner_lib
from training.objectives import (
  distillation,
  draft_head,
  port,
  preference,
  token_loss,
)
from training.objectives.policy import corrections, recipes
from training.optimizer import chain

ROWS, LENGTH, VOCAB, UNITS = 16, 48, 64, 34
NUM_STEPS = 4
MAX_RESIDUAL, MEAN_RESIDUAL = 1e-5, 3e-6

_SIZES = {
  'vocab_size': VOCAB,
  'model_width': 32,
  'num_heads': 4,
  'num_kv_heads': 2,
  'head_width': 8,
  'max_length': LENGTH,
  'scan_layers': True,
}
MODEL = tiny_models.llama_like(**_SIZES, mlp_width=64)
MIXTURE = tiny_models.llama_like(
  **_SIZES,
  mlp_width=0,
  num_experts=4,
  num_active_experts=2,
  expert_width=24,
  balance_loss_weight=0.01,
  router_z_weight=0.001,
)

OBJECTIVES = {
  **{loss: preference.Preference(loss=loss) for loss in ('dpo', 'kto', 'orpo')},
  'simpo': preference.Preference(loss='simpo', label_smoothing=0.1),
  'cpo': preference.Preference(loss='cpo'),
  'ipo': preference.Preference(loss='ipo', length_normalised=True),
  'robust': preference.Preference(
    loss='robust', label_smoothing=0.1, imitation_weight=0.5
  ),
  'tokens': token_loss.TokenLoss(
    policy_scale=1.0,
    imitation_scale=0.3,
    distance_scale=0.2,
    distance='k3_unbiased',
    is_stamped=True,
  ),
  'reinforce_pp': recipes.reinforce_pp(kl=0.1),
  'rloo': recipes.rloo(group_size=2),
  'grpo': recipes.grpo(group_size=2, temperature=0.8),
  'dr_grpo': recipes.dr_grpo(group_size=2, max_length=5),
  'dapo': recipes.dapo(group_size=2),
  'gspo': recipes.gspo(
    group_size=2,
    clip_low=0.1,
    clip_high=0.1,
    correction=corrections.Correction(level='sequence'),
  ),
  'cispo': recipes.cispo(
    group_size=2,
    clip_high=0.1,
    correction=corrections.Correction(
      level='token', mode='reject', cap=1.1, floor=0.8
    ),
  ),
  'ppo': recipes.ppo(kl=0.1, value_scale=1.0),
  'distillation': distillation.Distillation(
    divergence='jensen_shannon', temperature=2.0, imitation_share=0.3
  ),
  'draft_head': draft_head.DraftHead(num_steps=2, num_ids=50),
}


# One objective of each kind of sums: over pairs, over units with a number of
# the whole batch, over chosen and rejected tokens, over tokens, per group with
# a sequence's ratio, with values, with a teacher, of a head alone. The others
# are formulas of the same sums, so devices cannot tell them apart.
KINDS = ('dpo', 'kto', 'orpo', 'tokens', 'reinforce_pp', 'gspo', 'ppo')
KINDS += ('distillation', 'draft_head')


def _fast(*names, among=tuple(OBJECTIVES)):
  """Returns objectives as parameters, all but the fast ones marked slow."""
  return [
    n if n in names else pytest.param(n, marks=pytest.mark.slow) for n in among
  ]


@functools.cache
def _reference():
  """Returns a frozen directory with other weights."""
  directory = pathlib.Path(tempfile.mkdtemp()) / 'frozen'
  params = frozen_dirs.params(MODEL, seed=5)
  frozen_dirs.write(directory, params=params, config=MODEL)
  atexit.register(shutil.rmtree, directory.parent, ignore_errors=True)
  return str(directory)


@functools.cache
def _units(index):
  return preference_rows.draw(
    UNITS, vocab_size=VOCAB, longest=5, labelled=True, seed=index % 2
  )


def _batch(index, *, units_per_row=3, num_rows=ROWS, is_padded_left=False):
  rows = preference_rows.pack(_units(index), LENGTH, units_per_row)
  assert len(rows) < num_rows  # the last rows are padding
  batch = preference_rows.batch(
    rows, row_length=LENGTH, num_rows=num_rows, is_padded_left=is_padded_left
  )
  return batch | _stamps(batch)


def _stamps(batch):
  """Returns the arrays of an algorithm, functions of each token alone."""
  noise_BT = np.modf(np.sin(batch['targets'] * 12.9 + batch['positions']))[0]
  trained_BT, labels_BT = batch['weights'], batch['labels']
  arrays = {
    # Each term trains other tokens: few, some, all.
    'policy_weights': trained_BT * (labels_BT > 0),
    'imitation_weights': trained_BT * (labels_BT < 0),
    'distance_weights': trained_BT * (1 + noise_BT),
    'advantages': noise_BT * trained_BT,
    'old_logprobs': -4.16 + 0.3 * noise_BT,
    'sampler_logprobs': -4.16 + 0.3 * noise_BT,
    'rewards': noise_BT * (trained_BT > 0),
  }
  return {name: np.float32(array) for name, array in arrays.items()}


def _train(name, batch=_batch, num_devices=1, rows=ROWS, **options):
  """Returns the metrics of each step, [steps, metrics], and their names."""
  model = options.pop('model', MODEL)
  objective = OBJECTIVES[name]
  if objective.models_needed:
    (name,) = objective.models_needed
    objective = dataclasses.replace(objective, **{name: _reference()})
  if objective.trains_heads_alone:
    options['init_from'] = _reference()
  learner = learner_lib.make(
    tiny_experiment.make(
      model=model,
      data={'row_length': LENGTH, 'batch_size': rows},
      objective=objective,
      optimizer=chain.OptimizerConfig(warmup_steps=0, peak_lr=3e-3),
      num_steps=NUM_STEPS,
      **options,
    ),
    jax.devices()[:num_devices],
  )
  state = learner.init(jax.random.key(0))
  batches = [batch(index) for index in range(2)]
  if objective.annotated:
    # Later steps are inner epochs: the policy moves away from this one.
    annotate = learner.compile_annotate_step()
    batches = [b | annotate(state, b) for b in batches]
  train_step = learner.compile_train_step()
  found = []
  for index in range(NUM_STEPS):
    arrays = {k: batches[index % 2][k] for k in learner.batch_shapes()}
    state, metrics = train_step(state, learner.placement.put_batch(arrays))
    metrics = {k: float(v) for k, v in metrics.items()}
    metrics.pop('param_norm')
    found.append(metrics)
  return np.array([list(m.values()) for m in found]), list(found[0])


@functools.cache
def _expected(name):
  return _train(name)


def _assert_same(got, expected):
  (values, names), (expected_values, expected_names) = got, expected
  assert names == expected_names
  # Sums of tokens and of log-probabilities are as precise as they are large.
  residuals = np.abs(values - expected_values) / np.maximum(
    1, np.abs(expected_values)
  )
  found = {
    name: f'{residual:.1e}'
    for name, residual in zip(names, residuals.max(axis=0), strict=True)
  }
  print(found)
  loss = residuals[:, names.index('loss')]
  assert loss.max() <= MAX_RESIDUAL, found
  assert loss.mean() <= MEAN_RESIDUAL, found
  assert residuals.max() <= 10 * MAX_RESIDUAL, found
  losses = expected_values[:, names.index('loss')]
  assert np.ptp(losses) > 1e-3, 'nothing was learnt'
  if 'kl' in names:
    assert expected_values[:, names.index('kl')].min() > 1


@pytest.mark.slow
@pytest.mark.parametrize(
  'name', _fast('kto', 'cpo', 'tokens', 'ppo', 'distillation')
)
def test_accumulation(name):
  _assert_same(_train(name, num_microbatches=8), _expected(name))


@pytest.mark.slow
@pytest.mark.parametrize('name', _fast('dpo', 'kto', 'gspo'))
def test_packing(name):
  """Each unit in a row of its own."""
  batch = functools.partial(_batch, units_per_row=1, num_rows=40)
  _assert_same(_train(name, batch, rows=40), _expected(name))


@pytest.mark.slow
@pytest.mark.parametrize('name', _fast('orpo', among=KINDS))
def test_padding_side(name):
  batch = functools.partial(_batch, is_padded_left=True)
  _assert_same(_train(name, batch), _expected(name))


@pytest.mark.slow
@pytest.mark.parametrize(
  'name',
  _fast('kto', 'tokens', 'reinforce_pp', 'distillation', among=KINDS),
)
def test_a_mesh(name):
  parallel = {'data': 2, 'context': 2, 'tensor': 2}
  _assert_same(
    _train(name, num_devices=8, parallel=parallel, num_microbatches=2),
    _expected(name),
  )


@pytest.mark.slow
@pytest.mark.parametrize('name', _fast('kto', 'orpo', among=KINDS))
def test_pmap(name):
  _assert_same(
    _train(name, num_devices=4, parallel={'kind': 'pmap'}, num_microbatches=2),
    _expected(name),
  )


@pytest.mark.slow
@pytest.mark.parametrize('name', ['dpo', 'kto', 'tokens'])
def test_the_losses_of_routers_are_means_over_tokens(name):
  expected = _train(name, model=MIXTURE)
  assert 'balance_loss' in expected[1]
  _assert_same(_train(name, model=MIXTURE, num_microbatches=8), expected)


@pytest.mark.slow
def test_a_mean_of_means_would_be_noticed():
  """Each part of a batch with the totals of its own: what must not be."""
  own = OBJECTIVES['kto']
  learner = learner_lib.make(
    tiny_experiment.make(model=MODEL, objective=own), jax.devices()[:1]
  )
  params = learner.init(jax.random.key(0)).params
  model = port.Model(learner.model)

  def loss(batch):
    totals = own.totals(params, batch, model)
    total, sums = own(params, batch, model, totals=totals)
    return np.array([total, sums['weight']])

  whole = _batch(0)
  parts = [{k: x[i::4] for k, x in whole.items()} for i in range(4)]
  total, weight = np.sum([loss(part) for part in parts], axis=0)
  expected, expected_weight = loss(whole)
  assert weight == expected_weight
  assert abs(total - expected) / weight > 10 * MAX_RESIDUAL
