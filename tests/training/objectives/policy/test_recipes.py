"""Recipes by name, their arrays, and settings that cannot work."""

import jax.numpy as jnp
import numpy as np
import pytest

from tests.helpers.training import tiny_experiment
from training.objectives import advantages, token_loss
from training.objectives.policy import corrections, ppo, recipes

RECIPES = {
  'reinforce': recipes.reinforce(),
  'reinforce_pp': recipes.reinforce_pp(),
  'rloo': recipes.rloo(),
  'grpo': recipes.grpo(),
  'dr_grpo': recipes.dr_grpo(max_length=64),
  'dapo': recipes.dapo(),
  'gspo': recipes.gspo(),
  'cispo': recipes.cispo(),
  'ppo': recipes.ppo(),
}
_ROWS = {'tokens', 'targets', 'positions', 'segment_ids', 'weights'}


@pytest.mark.parametrize(
  ('name', 'sampled', 'annotated'),
  [
    ('reinforce', {'advantages'}, set()),
    ('reinforce_pp', {'advantages'}, {'old_logprobs', 'ref_logprobs'}),
    ('rloo', {'advantages'}, {'ref_logprobs'}),
    ('grpo', {'advantages'}, {'old_logprobs', 'ref_logprobs'}),
    ('dr_grpo', {'advantages'}, {'old_logprobs'}),
    ('dapo', {'advantages'}, {'old_logprobs'}),
    ('gspo', {'advantages'}, {'old_logprobs'}),
    ('cispo', {'advantages'}, {'old_logprobs'}),
    (
      'ppo',
      {'rewards'},
      {'old_logprobs', 'ref_logprobs', 'values', 'advantages', 'returns'},
    ),
  ],
)
def test_the_arrays_of_each_recipe(name, sampled, annotated):
  objective = RECIPES[name]
  objective.validate()
  assert set(objective.annotated) == annotated
  assert set(objective.batch_spec()) == _ROWS | sampled | annotated
  assert set(objective.models_needed) == (
    {'reference'} if 'ref_logprobs' in annotated else set()
  )


@pytest.mark.parametrize('make', [recipes.grpo, recipes.rloo, recipes.ppo])
def test_a_field_replaces_that_of_the_recipe(make):
  objective = make(kl=0.0, temperature=0.7, clip_low=0.1, clip_high=0.2)
  objective.validate()
  assert (objective.temperature, objective.clip_low) == (0.7, 0.1)
  assert not objective.models_needed
  with pytest.raises(TypeError, match='clip_lo'):
    make(clip_lo=0.1)


def test_a_group_of_one_is_refused():
  for make in (recipes.rloo, recipes.grpo, recipes.dapo, recipes.gspo):
    with pytest.raises(ValueError, match='group_size: got 1 with baseline'):
      make(group_size=1).validate()


def _fields(**fields):
  return {'policy_scale': 1.0, 'is_sampled': True, **fields}


@pytest.mark.parametrize(
  ('fields', 'message'),
  [
    (
      {'ratio': 'word'},
      "objective.ratio: got 'word', expected one of token, se",
    ),
    ({'form': 'soft'}, "objective.form: got 'soft', expected one of clipped"),
    (
      {'aggregation': 'mean'},
      "objective.aggregation: got 'mean', expected one of token, sequence, con",
    ),
    (
      {'aggregation': 'constant'},
      'objective.max_length: got 0 with aggregation = constant, expected the',
    ),
    (
      {'max_length': 5},
      'objective.max_length: got 5 with aggregation = token, expected the most',
    ),
    (
      {'form': 'cispo', 'clip_low': 0.0, 'clip_high': 0.0},
      'expected both above 0, or 0 for both if form = clipped',
    ),
    ({'temperature': 0.0}, 'objective.temperature: got 0.0, expected a number'),
    (
      {'kl_reward': -1.0},
      'objective.kl_reward: got -1.0, expected a number of',
    ),
    ({'proximal': 'old'}, "objective.proximal: got 'old', expected one of rec"),
    (
      {'is_sampled': False, 'temperature': 0.5},
      'objective.temperature: got 0.5 with objective.is_sampled = False',
    ),
    (
      {'is_sampled': False, 'kl_reward': 0.5},
      'objective.kl_reward: got 0.5 with objective.is_sampled = False, exp',
    ),
    (
      {'policy_scale': 0.0, 'imitation_scale': 1.0, 'form': 'cispo'},
      "objective.form: got 'cispo' with objective.policy_scale = 0, expected",
    ),
    (
      {'is_whitened': True, 'kl_reward': 0.1, 'proximal': 'own'},
      'objective.is_whitened: got True with kl_reward and proximal = own',
    ),
    (
      {
        'proximal': 'sampler',
        'correction': corrections.Correction(level='token'),
      },
      'objective.correction: got weights against the sampler with objective.p',
    ),
    (
      {'correction': corrections.Correction(cap=3.0)},
      'objective.correction: got Correction.* with level = none, expected the',
    ),
    (
      {'correction': corrections.Correction(level='token', cap=0.5)},
      'objective.correction.cap: got 0.5, expected a number of at least 1',
    ),
    (
      {'correction': corrections.Correction(level='token', floor=0.5)},
      'objective.correction.floor: got 0.5 with mode = truncate, expected',
    ),
    (
      {'advantages': advantages.Advantages(scale='all')},
      "objective.advantages.scale: got 'all', expected one of none, group, bat",
    ),
    (
      {'kl_reward': 0.1},
      'got no frozen model for reference, expected the reference',
    ),
  ],
)
def test_settings_that_cannot_work_are_refused(fields, message):
  objective = token_loss.TokenLoss(**_fields(**fields))
  with pytest.raises(ValueError, match=message):
    tiny_experiment.make(objective=objective).validate()


@pytest.mark.parametrize(
  ('fields', 'message'),
  [
    ({'policy_scale': 0.0}, 'policy_scale'),
    (
      {'is_sampled': False},
      'objective.is_sampled: got False for PPO, expected',
    ),
    (
      {'value_scale': 0.0},
      'objective.value_scale: got 0.0 for PPO, expected a',
    ),
    (
      {'gae_decay': 1.5},
      'objective.gae_decay: got 1.5 for PPO, expected a num',
    ),
    (
      {'discount': 0.0},
      'objective.discount: got 0.0 for PPO, expected above 0',
    ),
    (
      {'is_stamped': True},
      'objective.is_stamped: got True for PPO, expected F',
    ),
    (
      {'advantages': advantages.Advantages(baseline='batch')},
      'objective.advantages: got .* for PPO, expected the defaults: the critic',
    ),
  ],
)
def test_settings_of_ppo_that_cannot_work_are_refused(fields, message):
  with pytest.raises(ValueError, match=message):
    ppo.PPO(**fields).validate()


def test_weights_against_the_sampler():
  """Two completions of 3 and 2 tokens, and padding that nobody reads."""
  batch = {'segment_ids': jnp.array([[1, 1, 1, 2, 2, 0]])}
  weights_BT = jnp.array([[1.0, 1, 1, 1, 0, 0]])
  log_BT = jnp.array([[0.5, -0.2, 0.9, -30.0, 7.0, jnp.nan]])

  def of(**fields):
    correction = corrections.Correction(**fields)
    correction.validate()
    found_BT, sums = correction(log_BT, weights_BT, batch)
    means = {name: float(x.total / x.weight) for name, x in sums.items()}
    return np.asarray(found_BT)[0, :4], means

  tokens = np.exp([0.5, -0.2, 0.9, -20.0])  # the clamp
  got, means = of(level='token', cap=2.0)
  np.testing.assert_allclose(got, np.minimum(tokens, 2.0), rtol=1e-6)
  assert means['importance'] == pytest.approx(tokens.mean())
  assert means['bounded'] == pytest.approx(1 / 4)
  got, means = of(level='token', mode='reject', cap=2.0, floor=0.5)
  np.testing.assert_allclose(got, [tokens[0], tokens[1], 0, 0], rtol=1e-6)
  assert means['bounded'] == pytest.approx(1 / 2)
  got, means = of(level='sequence', cap=3.0)
  whole = np.exp([1.2, -20.0])
  np.testing.assert_allclose(got, [3.0, 3.0, 3.0, whole[1]], rtol=1e-6)
  assert means['importance'] == pytest.approx(whole.mean())
  # Of two completions, one counts.
  metrics = corrections.effective_size(means)
  assert metrics['ess'] == pytest.approx(0.5, abs=1e-3)
  assert 'importance_squared' not in metrics
