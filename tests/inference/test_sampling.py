"""Sampling: each filter against an independent NumPy oracle, then the draws."""

from typing import Any

import hypothesis
from hypothesis import strategies as st
import jax
import jax.numpy as jnp
import numpy as np
import pytest
from scipy import stats

from inference import sampling

_LOGITS_V = np.log(
  np.array([0.02, 0.25, 0.1, 0.05, 0.3, 0.01, 0.15, 0.12], np.float64)
)


def _sampler(num_rows: int = 1, **settings: Any):
  values = {
    'temperature': 1.0,
    'top_k': 0,
    'top_p': 1.0,
    'min_p': 0.0,
    'seed': 0,
    **settings,
  }
  return sampling.init(
    **{
      name: value if isinstance(value, list) else [value] * num_rows
      for name, value in values.items()
    }
  )


def _oracle(logits_V, *, temperature=1.0, top_k=0, top_p=1.0, min_p=0.0):
  """The distribution by sorting, in float64, one rule after the other."""
  scaled_V = np.asarray(logits_V, np.float64) / temperature
  probs_V = np.exp(scaled_V - scaled_V.max())
  ranked = np.argsort(-scaled_V, kind='stable')  # equal values by lower id
  if 0 < top_k < len(ranked):
    probs_V[ranked[top_k:]] = 0
  probs_V /= probs_V.sum()
  mass_before = np.cumsum(probs_V[ranked]) - probs_V[ranked]
  if top_p < 1:
    probs_V[ranked[mass_before >= top_p]] = 0
  probs_V[probs_V < min_p * probs_V.max()] = 0
  return probs_V / probs_V.sum()


def _probs(logits_V, **settings):
  logits_1V = jnp.asarray(logits_V, jnp.float32)[None]
  filtered_1V = jax.jit(sampling.filtered_logits)(
    logits_1V, _sampler(**settings)
  )
  return np.asarray(jax.nn.softmax(filtered_1V, axis=-1))[0]


@pytest.mark.parametrize(
  'settings',
  [
    {},
    {'temperature': 0.5},
    {'temperature': 3.0},
    {'top_k': 1},
    {'top_k': 3},
    {'top_k': 8},
    {'top_k': 100},
    {'top_p': 0.5},
    {'top_p': 0.9},
    {'top_p': 1e-6},
    {'min_p': 0.2},
    {'min_p': 0.99},
    {'top_k': 4, 'top_p': 0.8},
    {'top_k': 5, 'min_p': 0.45},
    {'top_p': 0.9, 'min_p': 0.3},
    {'temperature': 0.7, 'top_k': 6, 'top_p': 0.9, 'min_p': 0.1},
    {'temperature': 2.0, 'top_k': 3, 'top_p': 0.6, 'min_p': 0.05},
  ],
)
def test_distribution_is_the_oracles(settings):
  # float32 exponentials: 1e-6 is some ten ulps of a probability.
  np.testing.assert_allclose(
    _probs(_LOGITS_V, **settings), _oracle(_LOGITS_V, **settings), atol=1e-6
  )


@hypothesis.settings(max_examples=60, deadline=None)
@hypothesis.given(
  # Few distinct values, so that ties are the rule.
  logits=st.lists(st.integers(-3, 3), min_size=9, max_size=9),
  top_k=st.integers(0, 10),
  top_p=st.floats(0.01, 1.0),
  min_p=st.floats(0.0, 0.99),
)
def test_ties_go_to_the_lower_id(logits, top_k, top_p, min_p):
  settings = {'top_k': top_k, 'top_p': top_p, 'min_p': min_p}
  expected = _oracle(logits, **settings)
  # A sum within rounding of the threshold may fall on either side of it.
  for nudge in (-1e-5, 1e-5):
    nudged = {
      'top_k': top_k,
      'top_p': min(1.0, top_p + nudge),
      'min_p': max(0.0, min_p + nudge),
    }
    hypothesis.assume(((_oracle(logits, **nudged) > 0) == (expected > 0)).all())
  np.testing.assert_allclose(_probs(logits, **settings), expected, atol=1e-6)


def test_top_k_keeps_exactly_k_of_equals():
  kept = _probs(np.zeros(8), top_k=3) > 0
  assert kept.tolist() == [True] * 3 + [False] * 5


def test_extreme_logits_and_temperatures_stay_finite():
  logits_V = np.array([-1e30, 80.0, 79.0, -np.inf])
  for temperature in (1e-4, 1.0, 1e30):
    probs_V = _probs(logits_V, temperature=temperature, top_p=0.9, top_k=3)
    assert np.isfinite(probs_V).all()
    assert probs_V[3] == 0
    assert probs_V.sum() == pytest.approx(1, abs=1e-6)


@pytest.mark.parametrize(
  'settings',
  [
    {},
    {'temperature': 0.6},
    {'top_k': 3},
    {'top_p': 0.7},
    {'min_p': 0.3},
    {'temperature': 1.3, 'top_k': 6, 'top_p': 0.9, 'min_p': 0.1},
  ],
)
def test_draws_follow_the_oracle(settings):
  # Chi-square at p = 1e-4: with one fixed seed each of these six tests would
  # fail by chance once in 10,000 choices of the seed.
  num_draws = 20_000
  logits_BV = jnp.tile(jnp.asarray(_LOGITS_V, jnp.float32), (num_draws, 1))
  sampler = _sampler(num_draws, **settings)
  tokens_B = jax.jit(sampling.sample)(logits_BV, sampler, jnp.arange(num_draws))
  counts_V = np.bincount(tokens_B, minlength=len(_LOGITS_V))
  expected_V = _oracle(_LOGITS_V, **settings)
  assert (counts_V[expected_V == 0] == 0).all()
  seen = expected_V > 0
  result = stats.chisquare(counts_V[seen], expected_V[seen] * num_draws)
  assert result.pvalue > 1e-4


def test_greedy_and_top_k_1_are_argmax():
  logits_BV = jax.random.normal(jax.random.key(1), (6, 50))
  expected = np.argmax(logits_BV, axis=-1)
  positions_B = jnp.arange(6)
  for settings in ({'temperature': 0.0}, {'temperature': 1.7, 'top_k': 1}):
    tokens_B = sampling.sample(logits_BV, _sampler(6, **settings), positions_B)
    np.testing.assert_array_equal(tokens_B, expected)
    assert tokens_B.dtype == jnp.int32


def test_a_row_does_not_depend_on_its_neighbours():
  # The other rows' settings turn every branch on and off.
  logits_BV = jax.random.normal(jax.random.key(2), (3, 40))
  own = {'temperature': 1.2, 'top_k': 0, 'top_p': 1.0, 'min_p': 0.0, 'seed': 7}
  neighbours = [
    {'temperature': 0.0},
    {'temperature': 1.0, 'top_k': 2},
    {'temperature': 1.0, 'top_p': 0.3},
    {'temperature': 0.5, 'top_k': 5, 'top_p': 0.4, 'min_p': 0.5, 'seed': 99},
  ]
  sample = jax.jit(sampling.sample)
  filtered_logits = jax.jit(sampling.filtered_logits)
  drawn, filtered = set(), set()
  for other in neighbours:
    rows = [{**own, **other}, own, {**own, **other}]
    columns: dict[str, Any] = {n: [row[n] for row in rows] for n in own}
    sampler = _sampler(3, **columns)
    tokens_B = sample(logits_BV, sampler, jnp.array([4, 11, 5]))
    drawn.add(int(tokens_B[1]))
    row_V = filtered_logits(logits_BV, sampler)[1]
    filtered.add(np.asarray(row_V).tobytes())
  assert len(drawn) == 1
  assert len(filtered) == 1


def test_the_key_is_of_the_seed_and_the_position():
  logits_BV = jnp.zeros((4, 1000))
  sampler = _sampler(4, seed=[1, 1, 1, 2])
  tokens_B = sampling.sample(logits_BV, sampler, jnp.array([3, 3, 4, 3]))
  first, again, next_position, other_seed = tokens_B.tolist()
  assert first == again
  assert len({first, next_position, other_seed}) == 3


def test_no_setting_compiles_anew():
  num_traces = 0

  @jax.jit
  def sample(*args):
    nonlocal num_traces
    num_traces += 1
    return sampling.sample(*args)

  logits_BV = jax.random.normal(jax.random.key(3), (2, 30))
  for settings in (
    {'temperature': 0.0},
    {'temperature': 1.0, 'seed': 2**32 - 1},
    {'temperature': 0.8, 'top_k': 5},
    {'top_p': 0.5, 'min_p': 0.2, 'top_k': 7},
  ):
    sample(logits_BV, _sampler(2, **settings), jnp.array([1, 2]))
  assert num_traces == 1
