"""Sums along completions, against plain loops over their tokens."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from tests.helpers import tiny_models
from training.objectives import segments
from training.objectives.policy import sequences

ROWS, LENGTH = 4, 24


def _batch(seed=0):
  """Returns rows of three completions, with untrained tokens in between."""
  batch = tiny_models.batch(
    batch_size=ROWS, row_length=LENGTH, num_segments=3, num_padding=3
  )
  rng = np.random.default_rng(seed)
  is_trained_BT = (rng.random((ROWS, LENGTH)) < 0.6) & (
    batch['segment_ids'] > 0
  )
  batch['weights'] = np.float32(is_trained_BT)
  batch['rewards'] = np.float32(
    rng.normal(size=(ROWS, LENGTH)) * (batch['segment_ids'] > 0)
  )
  batch['values'] = np.float32(rng.normal(size=(ROWS, LENGTH)))
  return batch


def _completions(batch):
  """Yields the row and the places of each completion, in order."""
  for b in range(ROWS):
    for segment in range(1, batch['segment_ids'][b].max() + 1):
      yield b, np.flatnonzero(batch['segment_ids'][b] == segment)


def _plain_estimates(batch, discount, decay):
  """Returns advantages and returns: the recursion, token by token."""
  found, returns = np.zeros((2, ROWS, LENGTH))
  for b, places in _completions(batch):
    trained = [t for t in places if batch['weights'][b, t] > 0]
    following, next_value = 0.0, 0.0
    for i in reversed(range(len(trained))):
      t = trained[i]
      stop = trained[i + 1] if i + 1 < len(trained) else places[-1] + 1
      # Rewards of tokens that are not trained count for the one before them.
      reward = batch['rewards'][b, t:stop].astype(float).sum()
      value = float(batch['values'][b, t])
      delta = reward + discount * next_value - value
      following = delta + discount * decay * following
      found[b, t], returns[b, t] = following, following + value
      next_value = value
  return found, returns


def _shuffled(batch, order):
  return {name: x[:, order] for name, x in batch.items()}


@pytest.mark.fast_cases(5)
@pytest.mark.parametrize('is_shuffled', [False, True])
@pytest.mark.parametrize(
  ('discount', 'decay'), [(1.0, 1.0), (1.0, 0.95), (0.9, 0.5), (0.9, 0.0)]
)
def test_generalised_advantage_estimates(discount, decay, is_shuffled):
  batch = _batch()
  expected = _plain_estimates(batch, discount, decay)
  order = np.arange(LENGTH)
  if is_shuffled:  # as a mesh that splits time has them
    order = np.random.default_rng(1).permutation(LENGTH)
  given = _shuffled(batch, order)
  got = jax.jit(
    lambda batch: sequences.advantages_and_returns(
      batch['rewards'],
      batch['values'],
      batch['weights'],
      batch,
      discount=discount,
      decay=decay,
    )
  )(given)
  for found_BT, expected_BT in zip(got, expected, strict=True):
    np.testing.assert_allclose(found_BT, expected_BT[:, order], atol=1e-5)
  assert np.abs(expected[0]).max() > 1


@pytest.mark.parametrize('is_shuffled', [False, True])
def test_sums_of_completions_and_of_their_ends(is_shuffled):
  batch = _batch()
  order = np.arange(LENGTH)
  if is_shuffled:
    order = np.random.default_rng(1).permutation(LENGTH)
  to_go, totals = np.zeros((2, ROWS, LENGTH))
  for b, places in _completions(batch):
    values = batch['values'][b, places].astype(float)
    to_go[b, places] = values[::-1].cumsum()[::-1]
    totals[b, places] = values.sum()
  given = _shuffled(batch, order)
  real_BT = given['segment_ids'] > 0
  got = sequences.to_go(given['values'] * real_BT, given)
  np.testing.assert_allclose(got * real_BT, to_go[:, order], atol=1e-5)
  got = sequences.totals(given['values'], given)
  np.testing.assert_allclose(got, totals[:, order], atol=1e-5)


def test_the_gradient_of_a_spread_number_is_a_sum():
  batch = _batch()
  segment_ids_BT = jnp.asarray(batch['segment_ids'])
  factors_BT = jnp.asarray(batch['values'])

  def loss(sums_BU2):
    return jnp.sum(segments.spread(sums_BU2, segment_ids_BT) * factors_BT)

  sums_BU2 = segments.sums(factors_BT, segment_ids_BT)
  np.testing.assert_allclose(jax.grad(loss)(sums_BU2), sums_BU2, atol=1e-6)
