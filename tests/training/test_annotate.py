"""Arrays that the trainer adds to sampled batches, before their first step.

They are the same, bit for bit where it is said, however the batch is cut up and
laid out over devices; and no forward pass is spent on known log-probabilities.
"""

import dataclasses

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from tests.helpers import frozen_dirs, tiny_models
from tests.helpers.training import tiny_experiment
from training import learner as learner_lib
from training.objectives import port, token_loss

ROWS, LENGTH = 8, 16
MODEL = tiny_models.llama_like(vocab_size=64, scan_layers=True)


def _objective(**fields):
  return token_loss.TokenLoss(policy_scale=1.0, is_sampled=True, **fields)


def _learner(objective, num_devices=1, **fields):
  experiment = tiny_experiment.make(
    model=MODEL,
    data={'row_length': LENGTH, 'batch_size': ROWS},
    objective=objective,
    **fields,
  )
  experiment.validate()
  return learner_lib.make(experiment, jax.devices()[:num_devices])


def _batch(objective, rows=ROWS, seed=0):
  batch = tiny_models.batch(
    batch_size=rows,
    row_length=LENGTH,
    vocab_size=64,
    num_segments=2,
    num_padding=3,
    seed=seed,
  )
  rng = np.random.default_rng(seed)
  for name, spec in objective.batch_spec().items():
    if name not in (*batch, *objective.annotated):
      batch[name] = rng.normal(size=(rows, LENGTH)).astype(spec.dtype)
  return batch


def _logprobs(model, params, batch, temperature=1.0):
  logits_BTV, _ = model.apply(
    params, batch['tokens'], batch['positions'], None, batch['segment_ids']
  )
  logprobs_BTV = jax.nn.log_softmax(logits_BTV / temperature)
  targets_BT1 = batch['targets'][:, :, None]
  logprobs_BT = jnp.take_along_axis(logprobs_BTV, targets_BT1, 2)[:, :, 0]
  return np.where(batch['segment_ids'] > 0, logprobs_BT, 0.0)


@pytest.fixture(scope='module')
def reference(tmp_path_factory):
  directory = tmp_path_factory.mktemp('reference') / 'frozen'
  frozen_dirs.write(
    directory, params=frozen_dirs.params(MODEL, seed=5), config=MODEL
  )
  return str(directory)


@pytest.mark.slow
@pytest.mark.parametrize('temperature', [1.0, 0.7])
def test_the_policy_and_its_reference_are_recorded(reference, temperature):
  objective = _objective(
    distance_scale=0.1,
    distance='k3',
    reference=reference,
    temperature=temperature,
  )
  assert objective.annotated == ('old_logprobs', 'ref_logprobs')
  learner = _learner(objective)
  state = learner.init(jax.random.key(0))
  batch = _batch(objective, rows=3 * ROWS)
  found = learner.compile_annotate_step()(state, batch)
  frozen = state.frozen_params['reference']
  for name, params in ('old_logprobs', state.params), ('ref_logprobs', frozen):
    expected_BT = _logprobs(learner.model, params, batch, temperature)
    np.testing.assert_allclose(found[name], expected_BT, atol=2e-5)
    assert found[name].dtype == np.float32
  assert np.abs(found['old_logprobs'] - found['ref_logprobs']).max() > 0.1


@pytest.mark.slow
def test_the_reference_is_by_default_the_first_weights(reference):
  objective = _objective(distance_scale=0.1)
  learner = _learner(objective, init_from=reference)
  state = learner.init(jax.random.key(0))
  batch = _batch(objective)
  found = learner.compile_annotate_step()(state, batch)
  expected_BT = _logprobs(
    learner.model, frozen_dirs.params(MODEL, seed=5), batch
  )
  np.testing.assert_allclose(found['ref_logprobs'], expected_BT, atol=2e-5)


@pytest.mark.slow
@pytest.mark.parametrize(
  'options',
  [
    {'num_microbatches': 4},
    {
      'num_devices': 8,
      'parallel': {'data': 2, 'context': 2, 'tensor': 2},
      'num_microbatches': 2,
    },
    {'num_devices': 4, 'parallel': {'kind': 'pmap'}, 'num_microbatches': 2},
    {'num_devices': 2, 'parallel': {'stage': 2}},
  ],
  ids=str,
)
def test_parts_and_devices_change_nothing(options):
  objective = _objective()
  batch = _batch(objective, rows=2 * ROWS)
  found = []
  for own in ({}, options):
    learner = _learner(objective, **own)
    state = learner.init(jax.random.key(0))
    found.append(learner.compile_annotate_step()(state, batch)['old_logprobs'])
  np.testing.assert_allclose(*found, atol=2e-6)
  assert np.abs(found[0]).max() > 1


@pytest.mark.slow
@pytest.mark.parametrize('num_microbatches', [1, 2, 8])
def test_the_ratio_of_a_first_step_is_exactly_1(num_microbatches):
  objective = _objective()
  learner = _learner(objective, num_microbatches=num_microbatches)
  state = learner.init(jax.random.key(0))
  batch = _batch(objective)
  batch |= learner.compile_annotate_step()(state, batch)
  _, metrics = learner.compile_train_step()(
    state, learner.placement.put_batch(batch)
  )
  assert metrics['ratio'] == 1
  assert metrics['clipped_low'] == metrics['clipped_high'] == 0


class _Counting(port.Model):
  """Counts the forward passes."""

  def hidden(self, *args):
    self.calls.append(self)
    return super().hidden(*args)


def _passes(objective, reference, is_annotating):
  """Returns the forward passes of the policy and of the reference."""
  learner = _learner(dataclasses.replace(objective, reference=reference))
  params = learner.init(jax.random.key(0)).params
  calls = []
  policy, frozen = _Counting(learner.model), _Counting(learner.model)
  for model in (policy, frozen):
    object.__setattr__(model, 'calls', calls)
  others = (
    {'reference': port.FrozenModel(frozen, params)}
    if learner.experiment.objective.models_needed
    else {}
  )
  batch = _batch(objective)
  if is_annotating:
    objective.annotate(params, batch, policy, **others)
  else:
    for name in objective.annotated:
      batch[name] = np.zeros((ROWS, LENGTH), np.float32)
    totals = objective.totals(params, batch, policy, **others)
    objective(params, batch, policy, totals=totals, **others)
  return sum(c is policy for c in calls), sum(c is frozen for c in calls)


@pytest.mark.slow
@pytest.mark.parametrize(
  ('fields', 'annotating', 'stepping'),
  [
    ({}, (1, 0), (1, 0)),
    ({'proximal': 'own'}, (0, 0), (1, 0)),
    ({'proximal': 'sampler'}, (0, 0), (1, 0)),
    ({'distance_scale': 0.1}, (1, 1), (1, 0)),
    ({'distance_scale': 0.1, 'proximal': 'own'}, (0, 1), (1, 0)),
    ({'distance_scale': 0.1, 'distance': 'full'}, (1, 0), (1, 1)),
  ],
  ids=str,
)
def test_no_forward_pass_is_wasted(reference, fields, annotating, stepping):
  objective = _objective(**fields)
  path = reference if 'distance_scale' in fields else ''
  assert _passes(objective, path, True) == annotating
  assert _passes(objective, path, False) == stepping
  assert bool(objective.annotated) == (annotating != (0, 0))


def test_rows_that_do_not_fit_are_refused():
  objective = _objective()
  learner = _learner(objective)
  state = learner.init(jax.random.key(0))
  annotate = learner.compile_annotate_step()
  batch = _batch(objective, rows=ROWS + 1)
  with pytest.raises(
    ValueError, match='got 9 rows of 16 tokens, expected a mu'
  ):
    annotate(state, batch)
  del batch['advantages']
  with pytest.raises(ValueError, match='expected advantages too; make them'):
    annotate(state, batch)
