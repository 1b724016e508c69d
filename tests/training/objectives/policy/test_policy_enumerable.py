"""Every algorithm of reinforcement learning, against sums over all texts.

The expectation of a loss and of its gradient is taken over all batches that a
step may see, weighted by their probability. The oracle is NumPy in float64 with
derivatives by hand (`tests.helpers.training.tabular_policy`).

The tolerance: losses are computed in float32, whose relative error of 6e-8
grows over some hundred terms of size 1 to about 1e-6.
"""

import dataclasses
import itertools

import jax.numpy as jnp
import numpy as np
import pytest

from tests.helpers.training import tabular_policy as tabular
from training.objectives import advantages, port, token_loss
from training.objectives.policy import (
  corrections,
  estimators,
  ppo,
  recipes,
)

ATOL = 3e-6
N = len(tabular.TEXTS)
ALONE = np.arange(N)[:, None]  # batches of one text
POLICY, OTHER = tabular.Exact(tabular.table(0)), tabular.Exact(tabular.table(1))
REWARDS = np.random.default_rng(2).normal(size=N)
LENGTHS = tabular.lengths()
WEIGHTS = tabular.rows()['weights'].astype(float)

# One step on each batch, all answers over one constant: the gradient of the
# expected reward, over T.
PLAIN = token_loss.TokenLoss(
  policy_scale=1.0,
  is_sampled=True,
  proximal='own',
  clip_low=0.0,
  clip_high=0.0,
  aggregation='constant',
  max_length=tabular.T,
)


def _batch(**arrays):
  return {
    **tabular.rows(),
    **{name: np.float32(array) for name, array in arrays.items()},
  }


def _at_tokens(numbers_N):
  return np.asarray(numbers_N)[:, None] * WEIGHTS


def _gradient(objective, batch, probs, policy=POLICY, groups=ALONE, **others):
  _, gradient = tabular.expected(
    objective, policy.logits_PV, batch, groups, probs, **others
  )
  return np.asarray(gradient['params'], np.float64)


def _assert_same(got_PV, expected_PV):
  assert np.abs(expected_PV).max() > 0.005
  np.testing.assert_allclose(got_PV, expected_PV, atol=ATOL)


def _of_expected_reward(policy=POLICY, rewards=REWARDS):
  """Returns the gradient of the expected reward."""
  return policy.gradient(_at_tokens(policy.probs() * rewards))


def test_the_oracle_has_the_derivatives_of_its_sums():
  """Central differences; all probabilities sum to 1."""
  assert POLICY.probs().sum() == pytest.approx(1)

  def moved(prefix, token, by):
    logits_PV = POLICY.logits_PV.copy()
    logits_PV[prefix, token] += by
    return tabular.Exact(logits_PV)

  expected_PV = _of_expected_reward()
  for prefix, token in ((0, 1), (2, 2), (5, 0)):
    above, below = (moved(prefix, token, by).probs() for by in (1e-5, -1e-5))
    assert (above - below) @ REWARDS / 2e-5 == pytest.approx(
      expected_PV[prefix, token], abs=1e-9
    )


@pytest.mark.parametrize('baseline', [0.0, 1.3])
@pytest.mark.parametrize('clip', [0.0, 0.2])
def test_reinforce_has_the_gradient_of_the_expected_reward(baseline, clip):
  objective = dataclasses.replace(PLAIN, clip_low=clip, clip_high=clip)
  batch = _batch(advantages=_at_tokens(REWARDS - baseline))
  got_PV = _gradient(objective, batch, POLICY.probs())
  _assert_same(got_PV, -_of_expected_reward() / tabular.T)


def test_cispo_on_policy_has_the_gradient_of_the_expected_reward():
  objective = dataclasses.replace(
    PLAIN, form='cispo', clip_low=1.0, clip_high=4.0
  )
  batch = _batch(advantages=_at_tokens(REWARDS))
  got_PV = _gradient(objective, batch, POLICY.probs())
  _assert_same(got_PV, -_of_expected_reward() / tabular.T)


def test_the_temperature_is_that_of_the_distribution():
  warm = dataclasses.replace(POLICY, temperature=0.6)
  objective = dataclasses.replace(PLAIN, temperature=0.6)
  batch = _batch(advantages=_at_tokens(REWARDS))
  got_PV = _gradient(objective, batch, warm.probs())
  _assert_same(got_PV, -_of_expected_reward(warm) / tabular.T)
  # Log-probabilities of another temperature have another gradient.
  got_PV = _gradient(PLAIN, batch, warm.probs())
  assert np.abs(got_PV + _of_expected_reward(warm) / tabular.T).max() > 0.01


def _pairs():
  """Returns all groups of two texts, and their probabilities."""
  groups = np.array(list(itertools.product(range(N), repeat=2)))
  return groups, POLICY.probs()[groups].prod(axis=1)


def _gradient_of_pairs(objective):
  """Returns the expected gradient, and the advantages of each pair."""
  groups, probs = _pairs()
  advantages_GR = np.stack([objective.advantages(REWARDS[g]) for g in groups])
  batch = {k: x[groups] for k, x in tabular.rows().items()}
  batch['advantages'] = np.float32(advantages_GR[:, :, None] * batch['weights'])
  got_PV = _gradient(objective, batch, probs, groups=groups)
  return got_PV, advantages_GR


def _oracle_of_pairs(advantages_GR, sizes_N):
  """Returns the gradient of the mean of A log p / size over pairs."""
  groups, probs = _pairs()
  factors_N = np.zeros(N)
  for i in range(2):
    np.add.at(factors_N, groups[:, i], probs * advantages_GR[:, i] / 2)
  return -POLICY.gradient(_at_tokens(factors_N / sizes_N))


def test_rloo_has_the_gradient_of_the_expected_reward():
  objective = recipes.rloo(group_size=2, kl=0.0)
  got_PV, _ = _gradient_of_pairs(objective)
  _assert_same(got_PV, -_of_expected_reward())


def test_dr_grpo_has_that_gradient_less_the_share_of_its_own_reward():
  """A group's mean has 1 of its n rewards from the answer itself."""
  objective = recipes.dr_grpo(
    group_size=2, max_length=tabular.T, proximal='own'
  )
  got_PV, _ = _gradient_of_pairs(objective)
  _assert_same(got_PV, -_of_expected_reward() / 2 / tabular.T)


def test_grpo_weighs_answers_by_their_length_and_the_deviation_of_the_group():
  objective = recipes.grpo(group_size=2, kl=0.0, proximal='own')
  got_PV, advantages_GR = _gradient_of_pairs(objective)
  expected_PV = _oracle_of_pairs(advantages_GR, LENGTHS)
  _assert_same(got_PV, expected_PV)
  # The bias that Dr. GRPO takes away.
  other_PV = _oracle_of_pairs(advantages_GR, np.full(N, 2.0))
  assert np.abs(expected_PV - other_PV).max() > 0.01


def test_gspo_on_policy_has_the_gradient_of_the_mean_over_completions():
  objective = recipes.gspo(group_size=2, proximal='own')
  got_PV, advantages_GR = _gradient_of_pairs(objective)
  _assert_same(got_PV, _oracle_of_pairs(advantages_GR, LENGTHS))


def test_dapo_is_a_mean_over_the_tokens_of_all_completions():
  objective = recipes.dapo(group_size=2, proximal='own')
  got_PV, advantages_GR = _gradient_of_pairs(objective)
  groups, probs = _pairs()
  factors_N = np.zeros(N)
  num_tokens_G = LENGTHS[groups].sum(axis=1)
  for i in range(2):
    share_G = probs * advantages_GR[:, i] / num_tokens_G
    np.add.at(factors_N, groups[:, i], share_G)
  _assert_same(got_PV, -POLICY.gradient(_at_tokens(factors_N)))


# --- Off policy: tokens were drawn by OTHER.

_RATIO = np.exp(POLICY.token_logprobs() - OTHER.token_logprobs()) * WEIGHTS
_SEQUENCE_RATIO = np.exp(
  (POLICY.token_logprobs() - OTHER.token_logprobs()).sum(axis=1)
)


def _off_policy(**fields):
  """Returns the expected gradient of a loss whose old policy is OTHER."""
  objective = dataclasses.replace(PLAIN, proximal='recomputed', **fields)
  batch = _batch(
    advantages=_at_tokens(REWARDS), old_logprobs=OTHER.token_logprobs()
  )
  return _gradient(objective, batch, OTHER.probs())


def test_ratios_of_tokens():
  factors_NT = OTHER.probs()[:, None] * _RATIO * REWARDS[:, None]
  _assert_same(_off_policy(), -POLICY.gradient(factors_NT) / tabular.T)


def test_clipped_ratios_have_no_gradient_beyond_the_limits():
  is_cut_NT = np.where(
    REWARDS[:, None] > 0, _RATIO > 1.3, (_RATIO < 0.8) & (WEIGHTS > 0)
  )
  assert 0.1 < is_cut_NT[WEIGHTS > 0].mean() < 0.9
  factors_NT = OTHER.probs()[:, None] * _RATIO * REWARDS[:, None] * ~is_cut_NT
  _assert_same(
    _off_policy(clip_low=0.2, clip_high=0.3),
    -POLICY.gradient(factors_NT) / tabular.T,
  )


def test_cispo_keeps_the_gradient_of_every_token():
  bounded_NT = np.clip(_RATIO, 0.0, 1.5) * WEIGHTS
  assert (bounded_NT < _RATIO).any()
  factors_NT = OTHER.probs()[:, None] * bounded_NT * REWARDS[:, None]
  _assert_same(
    _off_policy(form='cispo', clip_low=1.0, clip_high=0.5),
    -POLICY.gradient(factors_NT) / tabular.T,
  )


@pytest.mark.parametrize('clip', [0.0, 0.2])
def test_gspo_has_the_geometric_mean_of_ratios(clip):
  log_NT = POLICY.token_logprobs() - OTHER.token_logprobs()
  ratio_N = np.exp(log_NT.sum(axis=1) / LENGTHS)
  is_cut_N = np.where(REWARDS > 0, ratio_N > 1 + clip, ratio_N < 1 - clip)
  is_cut_N &= clip > 0
  assert is_cut_N.any() == (clip > 0)
  factors_N = OTHER.probs() * ratio_N * REWARDS * ~is_cut_N / LENGTHS
  got_PV = _off_policy(
    ratio='sequence',
    aggregation='sequence',
    max_length=0,
    clip_low=clip,
    clip_high=clip,
  )
  _assert_same(got_PV, -POLICY.gradient(_at_tokens(factors_N)))


def _corrected(level, **fields):
  """Returns the expected gradient with weights against the sampler OTHER."""
  correction = corrections.Correction(level=level, **{'cap': 1e6, **fields})
  objective = dataclasses.replace(PLAIN, correction=correction)
  batch = _batch(
    advantages=_at_tokens(REWARDS), sampler_logprobs=OTHER.token_logprobs()
  )
  return _gradient(objective, batch, OTHER.probs())


def test_weights_of_completions_have_the_right_expectation():
  got_PV = _corrected('sequence')
  _assert_same(got_PV, -_of_expected_reward() / tabular.T)
  # Without them, or by token, the expectation is another.
  for other_PV in (_corrected('token'), _corrected('sequence', cap=1.0)):
    assert np.abs(got_PV - other_PV).max() > 0.01


@pytest.mark.parametrize('level', ['token', 'sequence'])
@pytest.mark.parametrize('mode', ['truncate', 'reject'])
def test_bounded_weights(level, mode):
  weights_NT = _RATIO if level == 'token' else _at_tokens(_SEQUENCE_RATIO)
  floor = 0.5 if mode == 'reject' else 0.0
  is_beyond_NT = (weights_NT > 1.2) | (weights_NT < floor)
  assert is_beyond_NT[WEIGHTS > 0].any()
  bounded_NT = (
    np.minimum(weights_NT, 1.2)
    if mode == 'truncate'
    else np.where(is_beyond_NT, 0.0, weights_NT)
  )
  factors_NT = OTHER.probs()[:, None] * bounded_NT * REWARDS[:, None] * WEIGHTS
  _assert_same(
    _corrected(level, mode=mode, cap=1.2, floor=floor),
    -POLICY.gradient(factors_NT) / tabular.T,
  )


# --- The divergence from a reference, OTHER.


def _next_token_gradient(is_forward):
  """Returns the gradient of KL(policy || reference) of the next token, or of
  KL(reference || policy), over prefixes of the policy.
  """
  own_PV, their_PV = POLICY.logprobs_PV, OTHER.logprobs_PV
  probs_PV = np.exp(own_PV)
  if is_forward:
    each_PV = probs_PV - np.exp(their_PV)
  else:
    log_ratio_PV = own_PV - their_PV
    mean_P1 = np.sum(probs_PV * log_ratio_PV, axis=1, keepdims=True)
    each_PV = probs_PV * (log_ratio_PV - mean_P1)
  return POLICY.prefix_probs()[:, None] * each_PV


@pytest.mark.parametrize(
  ('estimator', 'is_forward'),
  [
    ('k1', False),
    ('k2', False),
    ('k3', True),
    ('k3_unbiased', False),
    ('full', False),
  ],
)
def test_the_distance_of_each_estimator(estimator, is_forward):
  objective = dataclasses.replace(
    PLAIN,
    distance_scale=1.0,
    distance=estimator,
    reference='frozen',
  )
  table = {'params': jnp.asarray(OTHER.logits_PV, jnp.float32)}
  frozen = {'reference': port.FrozenModel(tabular.model(), table)}
  zeros = np.zeros_like(WEIGHTS)
  batch = _batch(advantages=zeros, ref_logprobs=OTHER.token_logprobs())
  got_PV = _gradient(objective, batch, POLICY.probs(), **frozen)
  _assert_same(got_PV, _next_token_gradient(is_forward) / tabular.T)


def test_the_log_ratio_alone_has_a_gradient_of_mean_0():
  """The classic mistake, k1 without the importance ratio."""
  ones_NT = POLICY.probs()[:, None] * WEIGHTS
  np.testing.assert_allclose(POLICY.gradient(ones_NT), 0, atol=1e-12)
  assert estimators.k1(2.0, 1.0) == 2.0


def test_a_penalty_in_the_reward_has_the_gradient_of_the_whole_divergence():
  objective = dataclasses.replace(PLAIN, kl_reward=0.7)
  batch = _batch(
    advantages=_at_tokens(REWARDS), ref_logprobs=OTHER.token_logprobs()
  )
  got_PV = _gradient(objective, batch, POLICY.probs())
  log_ratio_N = (POLICY.token_logprobs() - OTHER.token_logprobs()).sum(axis=1)
  expected_PV = _of_expected_reward(rewards=REWARDS - 0.7 * log_ratio_N)
  _assert_same(got_PV, -expected_PV / tabular.T)
  # A distance in the loss has another gradient: that of the next token alone.
  loss_PV = _of_expected_reward() - 0.7 * _next_token_gradient(False)
  assert np.abs(loss_PV - expected_PV).max() > 0.01


# --- PPO.


def _ppo(**fields):
  return ppo.PPO(
    is_whitened=False,
    clip_low=0.0,
    clip_high=0.0,
    aggregation='constant',
    max_length=tabular.T,
    **fields,
  )


def _heads(values_P):
  kernel = jnp.asarray(values_P, jnp.float32)[:, None]
  return {ppo.NAME: {'kernel': kernel, 'bias': jnp.zeros(1)}}


def _annotated(objective, values_P):
  """Returns the batch of all texts as a run would have it."""
  rewards_NT = np.zeros_like(WEIGHTS)
  rewards_NT[np.arange(N), LENGTHS - 1] = REWARDS
  batch = _batch(rewards=rewards_NT)
  params = {
    'params': jnp.asarray(POLICY.logits_PV, jnp.float32),
    port.HEADS: _heads(values_P),
  }
  others = {}
  if objective.models_needed:
    table = {'params': jnp.asarray(OTHER.logits_PV, jnp.float32)}
    others['reference'] = port.FrozenModel(tabular.model(), table)
  found = objective.annotate(params, batch, tabular.model(), **others)
  assert set(found) == set(objective.annotated)
  return batch | {name: np.asarray(x) for name, x in found.items()}


def _ppo_gradients(objective, values_P):
  _, gradient = tabular.expected(
    objective,
    POLICY.logits_PV,
    _annotated(objective, values_P),
    ALONE,
    POLICY.probs(),
    heads=_heads(values_P),
  )
  return gradient


def test_ppo_without_a_decay_is_unbiased_whatever_the_critic_says():
  objective = _ppo(gae_decay=1.0)
  values_P = np.random.default_rng(5).normal(size=tabular.NUM_PREFIXES)
  got = _ppo_gradients(objective, values_P)
  _assert_same(got['params'], -_of_expected_reward() / tabular.T)


@pytest.mark.parametrize('decay', [0.0, 0.6])
def test_ppo_with_a_decay_is_unbiased_if_the_critic_is_right(decay):
  objective = _ppo(gae_decay=decay)
  got = _ppo_gradients(objective, POLICY.values(REWARDS))
  _assert_same(got['params'], -_of_expected_reward() / tabular.T)
  wrong = _ppo_gradients(objective, POLICY.values(REWARDS**2))
  assert np.abs(wrong['params'] - got['params']).max() > 0.01


def test_the_penalty_of_ppo_has_the_gradient_of_the_whole_divergence():
  objective = _ppo(gae_decay=1.0, kl_reward=0.7, proximal='own')
  values_P = np.random.default_rng(5).normal(size=tabular.NUM_PREFIXES)
  got = _ppo_gradients(objective, values_P)
  log_ratio_N = (POLICY.token_logprobs() - OTHER.token_logprobs()).sum(axis=1)
  expected_PV = _of_expected_reward(rewards=REWARDS - 0.7 * log_ratio_N)
  _assert_same(got['params'], -expected_PV / tabular.T)


def test_the_critic_learns_the_expected_reward():
  """Its gradient is that of half the squared error, and 0 at the truth."""
  objective = _ppo(gae_decay=1.0, value_scale=1.0, value_clip=0.0)
  values_P = np.random.default_rng(5).normal(size=tabular.NUM_PREFIXES)
  errors_P = POLICY.prefix_probs() * (values_P - POLICY.values(REWARDS))
  got = _ppo_gradients(objective, values_P)[port.HEADS][ppo.NAME]
  _assert_same(got['kernel'][:, 0], errors_P / tabular.T)
  assert got['bias'] == pytest.approx(errors_P.sum() / tabular.T, abs=ATOL)
  right = _ppo_gradients(objective, POLICY.values(REWARDS))
  kernel = right[port.HEADS][ppo.NAME]['kernel']
  np.testing.assert_allclose(kernel, 0, atol=ATOL)


def test_advantages_of_the_batch_are_those_of_its_moments():
  rewards = np.array([1.0, 2.0, 6.0, 3.0])
  recipe = advantages.Advantages(baseline='batch', scale='batch')
  expected = (rewards - 3) / rewards.std()
  np.testing.assert_allclose(recipe(rewards), expected, rtol=1e-3)
