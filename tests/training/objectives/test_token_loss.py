"""The loss of three terms: its formulas, and combinations that cannot work."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from models import transformer
from tests.helpers import frozen_dirs, tiny_models
from tests.helpers.training import tiny_experiment
from training.objectives import advantages, port, token_loss

MODEL = tiny_models.llama_like()


def _refused(message, init_from='', **fields):
  experiment = tiny_experiment.make(
    objective=token_loss.TokenLoss(**fields), init_from=init_from
  )
  with pytest.raises(ValueError, match=message):
    experiment.validate()


@pytest.mark.parametrize(
  ('fields', 'message'),
  [
    ({}, 'objective: got 0 for policy_scale, imitation_scale and distance_sca'),
    (
      {'policy_scale': -1.0},
      'objective.policy_scale: got -1.0, expected a number of at least 0',
    ),
    (
      {'imitation_scale': 1.0, 'clip_high': 0.3},
      'objective.clip_high: got 0.3 with objective.policy_scale = 0, expected',
    ),
    (
      {'imitation_scale': 1.0, 'reference': 'x'},
      "objective.reference: got 'x' with objective.distance_scale = 0",
    ),
    (
      {'policy_scale': 1.0, 'clip_low': 0.0},
      'clip_low, clip_high: got 0.0 and 0.2, expected both above 0, or 0 for',
    ),
    (
      {'policy_scale': 1.0, 'clip_low': 1.0},
      'clip_low, clip_high: got 1.0 and 0.2, expected 0 <= clip_low < 1',
    ),
    (
      {'imitation_scale': 1.0, 'distance_scale': 1.0, 'distance': 'k4'},
      "objective.distance: got 'k4', expected one of k1, k2, k3, k3_unb",
    ),
    # Distillation without a frozen source.
    (
      {'distance_scale': 1.0},
      'config.objective: got no frozen model for ref_logprobs, expected the',
    ),
    (
      {'distance_scale': 1.0, 'distance': 'full'},
      "objective.reference: got '' with objective.distance = full, expected",
    ),
    # A group of one.
    (
      {
        'policy_scale': 1.0,
        'advantages': advantages.Advantages(baseline='group'),
      },
      'objective.advantages.group_size: got 1 with baseline = group, expected'
      ' at least 2: a completion that is compared with itself',
    ),
    (
      {
        'policy_scale': 1.0,
        'advantages': advantages.Advantages(scale='group'),
      },
      'objective.advantages.group_size: got 1 with scale = group',
    ),
  ],
)
def test_combinations_that_cannot_work_are_refused(fields, message):
  _refused(message, **fields)


@pytest.mark.slow
def test_a_teacher_that_is_the_policy_is_refused(tmp_path):
  for name, seed in (('base', 0), ('copy', 0), ('other', 1)):
    params = transformer.Transformer(MODEL).init(
      jax.random.key(seed), jnp.zeros((1, 1), jnp.int32)
    )
    frozen_dirs.write(tmp_path / name, params=params, config=MODEL)
  base = str(tmp_path / 'base')
  message = 'objective.reference: got the weights of config.init_from'
  _refused(message, base, distance_scale=1.0)
  _refused(message, base, distance_scale=1.0, reference=f'{base}/../base')
  # Another directory with the same weights.
  copy, other = (str(tmp_path / name) for name in ('copy', 'other'))
  _refused(message, base, distance_scale=1.0, reference=copy)
  for reference in (copy, other):
    for distance in ('k2', 'full'):
      fields = {'distance': distance, 'reference': reference}
      # It may keep a policy near its start.
      token_loss.TokenLoss(
        distance_scale=0.1, imitation_scale=1.0, **fields
      ).check_start(base)
  token_loss.TokenLoss(distance_scale=1.0, reference=other).check_start(base)


def test_arrays_are_those_of_the_terms():
  def spec(**fields):
    objective = token_loss.TokenLoss(**fields)
    objective.validate()
    return set(objective.batch_spec()) - {
      'tokens', 'targets', 'positions', 'segment_ids',
    }  # fmt: skip

  assert spec(imitation_scale=1.0) == {'weights'}
  assert spec(imitation_scale=1.0, is_stamped=True) == {'imitation_weights'}
  assert spec(
    policy_scale=1.0, distance_scale=0.1, is_stamped=True
  ) == {
    'policy_weights', 'advantages', 'old_logprobs', 'distance_weights',
    'ref_logprobs',
  }  # fmt: skip
  assert spec(distance_scale=1.0, distance='full', reference='x') == {'weights'}


def _batch(**arrays):
  batch = tiny_models.batch(num_segments=2, num_padding=3)
  rng = np.random.default_rng(0)
  shape = batch['tokens'].shape
  arrays = {
    'advantages': rng.normal(0, 1, shape),
    'old_logprobs': -4.11 + rng.normal(0, 0.4, shape),
    'ref_logprobs': -rng.uniform(2, 6, shape),
    **arrays,
  }
  return {
    name: jnp.asarray(array)
    for name, array in {
      **batch,
      **{name: np.float32(array) for name, array in arrays.items()},
    }.items()
  }


@pytest.fixture(scope='module')
def model():
  module = transformer.Transformer(MODEL)
  params = jax.jit(module.init)(jax.random.key(0), jnp.zeros((1, 1), jnp.int32))
  return port.Model(module), params


def _sums(model, objective, batch):
  model, params = model
  objective.validate()
  totals = objective.totals(params, batch, model)
  loss, sums = jax.jit(
    lambda p: objective(p, batch, model, totals=totals)
  )(params)  # fmt: skip
  means = {
    name: float(x.total / x.weight)
    for name, x in sums.items()
    if isinstance(x, port.Mean)
  }
  return float(loss / sums['weight']), means


def _logprobs(model, batch):
  model, params = model
  hidden = model.hidden(
    params, batch['tokens'], batch['positions'], batch['segment_ids']
  )
  return np.asarray(
    model.token_logprobs(params, hidden.states_BTD, batch['targets'])
  )


@pytest.mark.slow
def test_the_clipped_policy_term_is_that_of_ppo(model):
  batch = _batch()
  loss, means = _sums(
    model,
    token_loss.TokenLoss(policy_scale=1.0, clip_low=0.2, clip_high=0.3),
    batch,
  )
  real = np.asarray(batch['weights']) > 0
  ratio = np.exp(_logprobs(model, batch) - batch['old_logprobs'])[real]
  advantage = np.asarray(batch['advantages'])[real]
  kept = np.minimum(ratio * advantage, np.clip(ratio, 0.8, 1.3) * advantage)
  assert loss == pytest.approx(-kept.mean(), abs=1e-5)
  assert means['ratio'] == pytest.approx(ratio.mean(), abs=1e-5)
  low = np.mean((ratio < 0.8) & (advantage < 0))
  high = np.mean((ratio > 1.3) & (advantage > 0))
  assert min(low, high) > 0
  assert means['clipped_low'] == pytest.approx(low)
  assert means['clipped_high'] == pytest.approx(high)


def test_each_term_is_over_its_own_weights(model):
  batch = _batch()
  weights = np.asarray(batch.pop('weights'))
  few = weights * (np.arange(8) == 2)[:, None]
  batch |= {
    'policy_weights': weights,
    'imitation_weights': few,
    'distance_weights': 3.0 * weights * (np.arange(8) > 4)[:, None],
  }
  fields = {
    'policy_scale': 1.0,
    'imitation_scale': 0.5,
    'distance_scale': 0.25,
  }
  loss, means = _sums(
    model, token_loss.TokenLoss(**fields, distance='k3', is_stamped=True), batch
  )
  logprobs = _logprobs(model, batch)
  assert means['imitation'] == pytest.approx(
    -logprobs[2][weights[2] > 0].mean(), abs=1e-5
  )
  expected = sum(
    scale * means[name.removesuffix('_scale')] for name, scale in fields.items()
  )
  assert loss == pytest.approx(expected, rel=1e-5)


def test_advantages_are_rewards_less_the_baseline():
  rewards = np.array([1.0, 0.0, 0.0, 3.0, 5.0, 7.0])

  def of(**fields):
    recipe = advantages.Advantages(**fields)
    recipe.validate()
    return recipe(rewards)

  np.testing.assert_allclose(of(), rewards)
  np.testing.assert_allclose(
    of(baseline='group', group_size=3), [2 / 3, -1 / 3, -1 / 3, -2, 0, 2]
  )
  np.testing.assert_allclose(
    of(baseline='leave_one_out', group_size=3), [1, -0.5, -0.5, -3, 0, 3]
  )
  np.testing.assert_allclose(
    of(baseline='group', group_size=3, scale='group')[3:],
    [-1, 0, 1],
    atol=1e-3,
  )
  # A group of equal rewards teaches nothing, and is not divided by 0.
  np.testing.assert_array_equal(
    advantages.Advantages(baseline='group', group_size=2, scale='group')(
      np.ones(4)
    ),
    np.zeros(4),
  )
  with pytest.raises(ValueError, match='whole groups of 4, side by side'):
    of(baseline='group', group_size=4)
