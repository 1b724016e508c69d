"""Objectives of a language model whose texts can all be listed.

Three ids and completions of three tokens: 27 texts. What the losses estimate
from samples is then a sum over all of them, and their optima are known.
"""

import functools
import itertools

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from models import transformer
from tests.helpers import tiny_models
from tests.helpers.training import preference_rows, tiny_experiment
from training import learner as learner_lib
from training.objectives import port, preference, token_loss
from training.optimizer import chain

V, T = 3, 3
TEXTS = list(itertools.product(range(V), repeat=T))
# Learned positions: attention alone cannot count equal tokens.
MODEL = tiny_models.gpt2_like(
  vocab_size=V, num_layers=1, init_std=0.2, max_length=64, tie_embeddings=False
)
MODULE = transformer.Transformer(MODEL)
BETA = 0.5


@functools.cache
def _params(seed):
  init = jax.jit(MODULE.init)
  return init(jax.random.key(seed), jnp.zeros((1, 1), jnp.int32))


def _texts():
  """Returns a batch of all texts, one a row, after the prompt 0."""
  rows = [
    [(preference_rows.Document((0,), text, 0.0, (0.0,) * T),)] for text in TEXTS
  ]
  batch = preference_rows.batch(rows, row_length=1 + T)
  return {name: jnp.asarray(array) for name, array in batch.items()}


def _token_logprobs(params, batch):
  """Returns the distribution of each next token, [27, 4, V]."""
  logits_BTV, _ = MODULE.apply(
    params, batch['tokens'], batch['positions'], None, batch['segment_ids']
  )
  return jax.nn.log_softmax(logits_BTV)


def _of_targets(logprobs_BTV, batch):
  targets_BT1 = batch['targets'][:, :, None]
  return jnp.take_along_axis(logprobs_BTV, targets_BT1, 2)[:, :, 0]


def _text_logprobs(params, batch):
  """Returns log p of each text, [27]."""
  logprobs_BT = _of_targets(_token_logprobs(params, batch), batch)
  return jnp.sum(logprobs_BT * batch['weights'], axis=1)


def test_all_texts_are_listed():
  probs_B = np.exp(_text_logprobs(_params(0), _texts()))
  assert probs_B.sum() == pytest.approx(1, abs=1e-6)
  assert probs_B.max() > 2 * probs_B.min()


def _weights():
  """Returns exp(reward) of each text, a whole number from 1 to 3."""
  return np.random.default_rng(1).integers(1, 4, len(TEXTS))


def _preferences(ref_BT):
  """Returns pairs in the exact shares of Bradley and Terry's model.

  The text of weight a is preferred to that of weight b in a of a + b cases.
  Each text is compared with two others.
  """
  weights = _weights()

  def document(i):
    ref = tuple(np.asarray(ref_BT[i, :T]).tolist())
    return preference_rows.Document((0,), TEXTS[i], 0.0, ref)

  units = []
  for i in range(len(TEXTS)):
    for distance in (1, 5):
      j = (i + distance) % len(TEXTS)
      units += [(document(i), document(j))] * int(weights[i])
      units += [(document(j), document(i))] * int(weights[j])
  return units


@pytest.mark.slow
def test_dpo_reaches_the_optimal_policy():
  """pi* is proportional to pi_ref exp(r / beta): DPO, equation 4."""
  params, texts, steps = _params(0), _texts(), 200
  ref_BT = _of_targets(_token_logprobs(params, texts), texts)
  rows = preference_rows.pack(_preferences(ref_BT), 16, units_per_row=2)
  num_rows = -(-len(rows) // 8) * 8
  batch = preference_rows.batch(rows, row_length=16, num_rows=num_rows)
  learner = learner_lib.make(
    tiny_experiment.make(
      model=MODEL,
      data={'row_length': 16, 'batch_size': num_rows},
      objective=preference.Preference(beta=BETA),
      optimizer=chain.OptimizerConfig(
        peak_lr=1e-2, end_lr=0.0, warmup_steps=10, weight_decay=0.0, clip_norm=0
      ),
      num_steps=steps,
    ),
    jax.devices()[:1],
  )
  state = learner.init_with(jax.random.key(0), params)
  train_step = learner.compile_train_step()
  batch = learner.placement.put_batch(
    {name: batch[name] for name in learner.batch_shapes()}
  )
  for _ in range(steps):
    state, _ = train_step(state, batch)
  ref_B, found_B = (
    np.exp(_text_logprobs(p, texts)) for p in (_params(0), state.params)
  )
  optimal_B = ref_B * _weights() ** (1 / BETA)
  optimal_B /= optimal_B.sum()

  def total_variation(p_B):
    return np.abs(p_B - optimal_B).sum() / 2

  assert total_variation(ref_B) > 0.1
  assert total_variation(found_B) < 0.001


def _stamped(params, weights_B, **arrays):
  """Returns the texts with one weight for all tokens of a text."""
  batch = _texts()
  trained_BT = batch.pop('weights')
  logprobs_BT = _of_targets(_token_logprobs(params, batch), batch)
  for term in token_loss.TERMS:
    batch[f'{term}_weights'] = trained_BT * weights_B[:, None]
  return batch | {'old_logprobs': logprobs_BT} | arrays


def _gradient(objective, batch, params):
  """Returns loss and gradient of a batch, as a step divides them."""
  objective.validate()
  given = {name: batch[name] for name in objective.batch_spec()}
  model = port.Model(MODULE)
  frozen = {
    name: port.FrozenModel(model, _params(1))
    for name in objective.models_needed
  }

  def loss(params):
    totals = objective.totals(params, given, model, **frozen)
    total, sums = objective(params, given, model, totals=totals, **frozen)
    return total / sums['weight']

  return jax.jit(jax.value_and_grad(loss))(params)


def _assert_same(got, expected):
  (value, gradient), (expected_value, expected_gradient) = got, expected
  if expected_value is not None:
    assert value == pytest.approx(float(expected_value), abs=1e-5)
  sizes = jax.tree.map(lambda x: np.abs(x).max(), expected_gradient)
  assert max(jax.tree.leaves(sizes)) > 1e-3
  jax.tree.map(
    lambda a, b: np.testing.assert_allclose(a, b, atol=1e-5),
    gradient,
    expected_gradient,
  )


@pytest.mark.slow
@pytest.mark.parametrize('baseline', [0.0, 1.7])
@pytest.mark.parametrize('clip', [0.0, 0.2])
def test_the_policy_term_is_the_gradient_of_the_expected_reward(baseline, clip):
  params, texts = _params(0), _texts()
  rewards_B = jnp.log(_weights())
  probs_B = jnp.exp(_text_logprobs(params, texts))

  def expected_reward(params):
    return jnp.sum(jnp.exp(_text_logprobs(params, texts)) * rewards_B)

  # A mean over tokens: T of them in each text.
  expected = jax.grad(lambda p: -expected_reward(p) / T)(params)
  advantages_BT = jnp.broadcast_to(
    (rewards_B - baseline)[:, None], texts['tokens'].shape
  )
  objective = token_loss.TokenLoss(
    policy_scale=1.0, is_stamped=True, clip_low=clip, clip_high=clip
  )
  got = _gradient(
    objective, _stamped(params, probs_B, advantages=advantages_BT), params
  )
  _assert_same(got, (-(expected_reward(params) - baseline), expected))


@pytest.mark.slow
def test_the_imitation_term_is_a_cross_entropy():
  params, texts = _params(0), _texts()
  data_B = jnp.asarray(_weights() / _weights().sum())

  def cross_entropy(params):
    return -jnp.sum(data_B * _text_logprobs(params, texts)) / T

  got = _gradient(
    token_loss.TokenLoss(imitation_scale=1.0, is_stamped=True),
    _stamped(params, data_B),
    params,
  )
  _assert_same(got, jax.value_and_grad(cross_entropy)(params))


def _divergence(params, ref_params, texts, is_forward=False):
  """Returns KL(policy || reference) of whole texts, over T.

  The chance of a prefix has no gradient: the term is a sum over tokens of the
  divergence of the next one.
  """
  own_BTV, ref_BTV = (_token_logprobs(p, texts) for p in (params, ref_params))
  of_texts_BT = _of_targets(own_BTV, texts) * texts['weights']
  before_BT = jnp.cumsum(of_texts_BT, axis=1) - of_texts_BT
  # Each prefix of t tokens occurs in V^(T - t) texts.
  copies_T = jnp.array([float(V ** (T - t)) for t in range(T)] + [1.0])
  share_BT = jax.lax.stop_gradient(jnp.exp(before_BT)) / copies_T[None, :]
  if is_forward:
    own_BTV, ref_BTV = ref_BTV, own_BTV
  each_BT = jnp.sum(jnp.exp(own_BTV) * (own_BTV - ref_BTV), axis=2)
  return jnp.sum(share_BT * each_BT * texts['weights']) / T


@pytest.mark.fast_cases(2)
@pytest.mark.parametrize(
  ('estimator', 'is_exact'),
  [('k1', True), ('k2', False), ('k3_unbiased', True), ('full', True)],
)
def test_the_distance_term_has_the_gradient_of_the_divergence(
  estimator, is_exact
):
  params, texts = _params(0), _texts()
  ref_BT = _of_targets(_token_logprobs(_params(1), texts), texts)
  probs_B = jnp.exp(_text_logprobs(params, texts))
  value, gradient = jax.value_and_grad(_divergence)(params, _params(1), texts)
  # The sum over texts is that over prefixes.
  log_ratio_B = _text_logprobs(params, texts) - _text_logprobs(
    _params(1), texts
  )
  assert value == pytest.approx(float(jnp.sum(probs_B * log_ratio_B)) / T)
  got = _gradient(
    token_loss.TokenLoss(
      distance_scale=1.0,
      distance=estimator,
      is_stamped=True,
      reference='frozen' if estimator == 'full' else '',
    ),
    _stamped(params, probs_B, ref_logprobs=ref_BT),
    params,
  )
  _assert_same(got, (value if is_exact else None, gradient))
  if not is_exact:
    assert abs(got[0] - value) > 1e-3


def test_k3_has_the_value_of_one_divergence_and_the_gradient_of_the_other():
  params, texts = _params(0), _texts()
  ref_BT = _of_targets(_token_logprobs(_params(1), texts), texts)
  probs_B = jnp.exp(_text_logprobs(params, texts))
  value = _divergence(params, _params(1), texts)
  gradient = jax.grad(_divergence)(params, _params(1), texts, True)
  got = _gradient(
    token_loss.TokenLoss(distance_scale=1.0, distance='k3', is_stamped=True),
    _stamped(params, probs_B, ref_logprobs=ref_BT),
    params,
  )
  _assert_same(got, (value, gradient))
