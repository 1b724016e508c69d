"""The sampler: distributions against NumPy, then draws, then batches."""

import dataclasses
import functools

import hypothesis
from hypothesis import strategies as st
import jax
import jax.numpy as jnp
import numpy as np
import pytest
from scipy import stats

from inference.sampling import (
  logprobs,
  penalties,
  sampler as sampler_lib,
  settings as settings_lib,
)

_LOGITS_V = np.log(
  np.array([0.02, 0.25, 0.1, 0.05, 0.3, 0.01, 0.15, 0.12], np.float64)
)
_VOCAB = len(_LOGITS_V)
# Tokens so far: 4 is in prompt and completion, 0 in neither.
_PROMPT, _OUTPUT = (4, 5, 5, 6), (1, 4, 1, 7)
_EOS = 6
_Settings = settings_lib.Settings
_filtered = jax.jit(sampler_lib.filtered_logits)
_sample = jax.jit(sampler_lib.sample)


@functools.cache
def _seen_V(num_tokens=_VOCAB):
  ids_T = jnp.array(_PROMPT + _OUTPUT)
  return np.asarray(penalties.recount(ids_T, len(_PROMPT), num_tokens))


def _row(seed=0, **chosen):
  return sampler_lib.row(
    _Settings(**chosen),
    num_prompt_tokens=len(_PROMPT),
    seed=seed,
    eos_id=_EOS,
  )


def _oracle(logits_V, **chosen):
  """Returns the next token's distribution, in float64, rule by rule."""
  settings = _Settings(**chosen)
  logits_V = np.array(logits_V, np.float64)
  for token in {*_PROMPT, *_OUTPUT}:
    is_positive = logits_V[token] > 0
    factor = settings.repetition_penalty
    logits_V[token] *= 1 / factor if is_positive else factor
  for token in _OUTPUT:
    logits_V[token] -= settings.frequency_penalty
  for token in {*_OUTPUT}:
    logits_V[token] -= settings.presence_penalty
  for token, bias in settings.logit_bias:
    logits_V[token] += bias
  if len(_OUTPUT) < settings.min_tokens:
    logits_V[[_EOS, *settings.stop_ids]] = -np.inf
  scaled_V = logits_V / (settings.temperature or 1.0)
  probs_V = np.exp(scaled_V - scaled_V.max())
  ranked = np.argsort(-scaled_V, kind='stable')  # equal values by lower id
  if 0 < settings.top_k < len(ranked):
    probs_V[ranked[settings.top_k :]] = 0
  probs_V /= probs_V.sum()
  mass_before = np.cumsum(probs_V[ranked]) - probs_V[ranked]
  if settings.top_p < 1:
    probs_V[ranked[mass_before >= settings.top_p]] = 0
  probs_V[probs_V < settings.min_p * probs_V.max()] = 0
  return probs_V / probs_V.sum()


def _probs(logits_V, **chosen):
  filtered_1V = _filtered(
    jnp.asarray(logits_V, jnp.float32)[None],
    sampler_lib.stack([_row(**chosen)]),
    _seen_V(len(logits_V))[None],
    jnp.array([len(_PROMPT + _OUTPUT)]),
  )
  return np.asarray(jax.nn.softmax(filtered_1V, axis=-1))[0]


_COMPOSITIONS = (
  {
    'repetition_penalty': 1.3,
    'presence_penalty': 0.4,
    'frequency_penalty': -0.3,
    'logit_bias': ((0, 2.5), (1, -100)),
    'temperature': 0.7,
    'top_k': 6,
    'top_p': 0.9,
  },
  {
    'frequency_penalty': 0.5,
    'logit_bias': ((5, 3.0),),
    'min_tokens': 5,
    'stop_ids': (3,),
    'temperature': 1.3,
    'top_p': 0.9,
    'min_p': 0.1,
  },
)


@pytest.mark.parametrize(
  'chosen',
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
    {'top_p': 1e-60},  # zero in float32
    {'min_p': 0.2},
    {'min_p': 0.99},
    {'top_k': 4, 'top_p': 0.8},
    {'top_k': 5, 'min_p': 0.45},
    {'top_p': 0.9, 'min_p': 0.3},
    {'temperature': 0.7, 'top_k': 6, 'top_p': 0.9, 'min_p': 0.1},
    {'temperature': 2.0, 'top_k': 3, 'top_p': 0.6, 'min_p': 0.05},
    {'repetition_penalty': 1.5},
    {'repetition_penalty': 0.5},
    {'presence_penalty': 2.0},
    {'frequency_penalty': 1.5},
    {'presence_penalty': -2.0, 'frequency_penalty': 0.5},
    {'logit_bias': ((0, 3.0), (7, -100.0))},
    {'min_tokens': 4},  # as many as there are: EOS is allowed
    {'min_tokens': 5},
    {'min_tokens': 5, 'stop_ids': (1, 2)},
    {'min_tokens': 5, 'ignore_eos': True},
    *_COMPOSITIONS,
  ],
)
def test_distribution_is_the_oracles(chosen):
  # float32 exponentials: 1e-6 is some ten ulps of a probability.
  np.testing.assert_allclose(
    _probs(_LOGITS_V, **chosen), _oracle(_LOGITS_V, **chosen), atol=1e-6
  )


@hypothesis.settings(max_examples=150, deadline=None, derandomize=True)
@hypothesis.given(
  # Few distinct values, so that ties are the rule.
  logits=st.lists(st.integers(-3, 3), min_size=9, max_size=9),
  # Powers of two and the like, so that float32 keeps the ties.
  temperature=st.sampled_from([0.5, 1.0, 4.0]),
  repetition_penalty=st.sampled_from([0.5, 1.0, 2.0]),
  presence_penalty=st.sampled_from([-2, -0.5, 0, 0.5]),
  frequency_penalty=st.sampled_from([-0.25, 0, 1, 1.5]),
  logit_bias=st.dictionaries(st.integers(0, 8), st.sampled_from([-100, -1, 2])),
  min_tokens=st.integers(3, 6),
  stop_ids=st.lists(st.integers(0, 8), max_size=3).map(tuple),
  top_k=st.integers(0, 10),
  top_p=st.floats(0.01, 1.0),
  min_p=st.floats(0.0, 0.99),
)
def test_any_composition_is_the_oracles(top_p, min_p, logit_bias, **chosen):
  logits = chosen.pop('logits')
  chosen['logit_bias'] = settings_lib.bias_pairs(logit_bias)
  expected = _oracle(logits, **chosen, top_p=top_p, min_p=min_p)
  # A sum within rounding of the threshold may fall on either side of it.
  for nudge in (-1e-5, 1e-5):
    nudged = _oracle(
      logits,
      **chosen,
      top_p=min(1.0, top_p + nudge),
      min_p=max(0.0, min_p + nudge),
    )
    hypothesis.assume(((nudged > 0) == (expected > 0)).all())
  found = _probs(logits, **chosen, top_p=top_p, min_p=min_p)
  np.testing.assert_allclose(found, expected, atol=1e-6)


def test_top_k_keeps_exactly_k_of_equals():
  kept = _probs(np.zeros(8), top_k=3) > 0
  assert kept.tolist() == [True] * 3 + [False] * 5


def test_extreme_logits_and_temperatures_stay_finite():
  logits_V = np.array([-1e30, 80.0, 79.0, -np.inf, 0.0, 0.0, 0.0, 0.0])
  for temperature in (1e-4, 1.0, 1e30, 1e300):
    probs_V = _probs(logits_V, temperature=temperature, top_p=0.9, top_k=3)
    assert np.isfinite(probs_V).all()
    assert probs_V[3] == 0
    assert probs_V.sum() == pytest.approx(1, abs=1e-6)


@pytest.mark.parametrize(
  'chosen',
  [
    {},
    {'temperature': 0.6},
    {'top_k': 3},
    {'top_p': 0.7},
    {'min_p': 0.3},
    {'repetition_penalty': 1.5},
    {'presence_penalty': 1.0},
    {'frequency_penalty': 0.7},
    {'logit_bias': ((0, 2.0), (4, -1.0))},
    {'min_tokens': 5, 'stop_ids': (1,)},
    *_COMPOSITIONS,
  ],
)
def test_draws_follow_the_oracle(chosen):
  # Chi-square at p = 1e-4: with one fixed seed each of these twelve tests would
  # fail by chance once in 10,000 choices of the seed.
  num_rows, num_rounds = 1000, 8
  logits_BV = jnp.tile(jnp.asarray(_LOGITS_V, jnp.float32), (num_rows, 1))
  zeros_B = jnp.zeros(num_rows, jnp.int32)
  # Each position has noise of its own; all of them are below the minimum.
  sampler = sampler_lib.take(sampler_lib.stack([_row(**chosen)]), zeros_B)
  if chosen.get('min_tokens'):
    sampler = sampler._replace(min_position_B=zeros_B + (2**31 - 1))
  counts_V = np.zeros(_VOCAB, int)
  for round_ in range(num_rounds):
    tokens_B = _sample(
      logits_BV,
      sampler,
      _seen_V()[None],
      jnp.arange(num_rows) + round_ * num_rows,
      slots_B=zeros_B,
    )
    counts_V += np.bincount(tokens_B, minlength=_VOCAB)
  expected_V = _oracle(_LOGITS_V, **chosen)
  assert (counts_V[expected_V == 0] == 0).all()
  is_possible = expected_V > 0
  result = stats.chisquare(
    counts_V[is_possible], expected_V[is_possible] * num_rows * num_rounds
  )
  assert result.pvalue > 1e-4


@pytest.mark.parametrize('chosen', [{}, *_COMPOSITIONS])
def test_greedy_and_top_k_1_are_the_largest_adjusted_logit(chosen):
  rng = np.random.default_rng(1)
  logits_BV = rng.standard_normal((6, 50)).astype(np.float32)
  expected = [
    np.argmax(_oracle(row, **{**chosen, 'temperature': 1})) for row in logits_BV
  ]
  seen_BV = np.tile(_seen_V(50), (6, 1))
  for greedy in ({'temperature': 0.0}, {'temperature': 1.7, 'top_k': 1}):
    sampler = sampler_lib.stack([_row(**{**chosen, **greedy})] * 6)
    tokens_B = _sample(logits_BV, sampler, seen_BV, jnp.full(6, 8))
    np.testing.assert_array_equal(tokens_B, expected)
    assert tokens_B.dtype == jnp.int32


@pytest.mark.parametrize('num_tokens', [3, 600])
def test_greedy_takes_the_first_of_equals(num_tokens):
  logits_BV = np.zeros((5, num_tokens), np.float32)
  logits_BV[1, [2, -1]] = 3.0
  logits_BV[2] = -np.inf
  logits_BV[3, :2] = -0.5
  logits_BV[4] = np.random.default_rng(2).integers(0, 4, num_tokens)
  seen_BV = jnp.zeros((5, num_tokens), jnp.int32)
  tokens_B = _sample(logits_BV, sampler_lib.empty(5), seen_BV, jnp.arange(5))
  np.testing.assert_array_equal(tokens_B, np.argmax(logits_BV, axis=-1))


# ------------------------------------------------------------------------------
# A sequence and its batch. At 259 tokens, XLA sums rows in another order for 16
# rows and more.

_WIDE = 259
_SEQUENCES = (
  {'seed': 7, 'temperature': 1.2},
  {'seed': 8, 'top_p': 0.8, 'temperature': 2.0},
  {'seed': 9, 'top_k': 200, 'top_p': 0.6, 'min_p': 0.01, 'temperature': 1.1},
  {'seed': 10, 'repetition_penalty': 1.2, 'top_p': 0.97, 'min_tokens': 9},
  {'seed': 11, 'temperature': 0.0, 'presence_penalty': 1.0},
)
# Together they run every branch.
_NEIGHBOURS = (
  {'temperature': 0.0},
  {'top_k': 2},
  {'top_p': 0.3, 'logprobs': 3},
  {'min_p': 0.4, 'min_tokens': 5, 'frequency_penalty': 1.1},
  {'logit_bias': ((0, 2.0),), 'stop_ids': (4,), 'min_tokens': 9},
)


@jax.jit
def _step(logits_BV, sampler, seen_BV, positions_B):
  args = logits_BV, sampler, seen_BV, positions_B
  tokens_B = sampler_lib.sample(*args)
  given = logprobs.logprobs(logits_BV, tokens_B, sampler.num_logprobs_B)
  return tokens_B, sampler_lib.filtered_logits(*args), *given


def _outcomes(num_rows: int, place: int, neighbour: dict):
  """Returns the bits of each sequence's result at a place of a batch."""
  rng = np.random.default_rng(3)
  rows_BV = rng.standard_normal((40, _WIDE)).astype(np.float32)
  outcomes = []
  for number, sequence in enumerate(_SEQUENCES):
    logits_BV = rows_BV[:num_rows].copy()
    logits_BV[place] = rows_BV[33 + number]
    rows = [_row(**neighbour)] * num_rows
    rows[place] = _row(**{'logprobs': 2, **sequence})
    found = _step(
      logits_BV,
      sampler_lib.stack(rows),
      np.tile(_seen_V(_WIDE), (num_rows, 1)),
      np.where(np.arange(num_rows) == place, 8, 3).astype(np.int32),
    )
    outcomes.append([np.asarray(field)[place].tobytes() for field in found])
  return outcomes


def test_a_row_does_not_depend_on_its_neighbours():
  alone = _outcomes(1, 0, {})
  for neighbour in _NEIGHBOURS:
    assert _outcomes(3, 1, neighbour) == alone


def test_a_row_does_not_depend_on_the_number_of_rows():
  alone = _outcomes(1, 0, {})
  for num_rows, place in ((16, 0), (33, 20)):
    assert _outcomes(num_rows, place, _NEIGHBOURS[2]) == alone


def test_the_edge_of_top_p_does_not_depend_on_the_number_of_rows():
  rng = np.random.default_rng(5)
  logits_BV = rng.standard_normal((33, _WIDE)).astype(np.float32)
  # Each row's top-p is the mass of its own 50 most probable tokens: the last
  # bit of a sum decides whether there is room for one more.
  mass_BV = -np.sort(-np.exp(logits_BV.astype(np.float64)), axis=-1)
  top_p_B = mass_BV[:, :50].sum(axis=-1) / mass_BV.sum(axis=-1)
  sampler = sampler_lib.stack([_row(top_p=float(top_p)) for top_p in top_p_B])
  seen_BV = np.tile(_seen_V(_WIDE), (33, 1))
  positions_B = np.full(33, 8, np.int32)
  together_BV = _filtered(logits_BV, sampler, seen_BV, positions_B)
  sizes = np.isfinite(together_BV).sum(axis=-1)
  assert {*sizes} == {50, 51}  # or the edge was missed
  for row in range(33):
    alone_1V = _filtered(
      logits_BV[row : row + 1],
      sampler_lib.take(sampler, jnp.array([row])),
      seen_BV[:1],
      positions_B[:1],
    )
    np.testing.assert_array_equal(alone_1V[0], together_BV[row])


def test_the_key_is_of_the_whole_seed_and_the_position():
  seeds = (1, 1, 1, 2, 2**32, 2**32 + 1, 2**63, 2**63 - 1, -1, 0)
  size = len(seeds)
  logits_BV = jnp.zeros((size, 50_000))
  sampler = sampler_lib.stack([_row(seed=seed) for seed in seeds])
  seen_BV = jnp.zeros(logits_BV.shape, jnp.int32)
  positions_B = jnp.full(size, 3).at[2].set(4)
  tokens_B = _sample(logits_BV, sampler, seen_BV, positions_B)
  first, again, *others = tokens_B.tolist()
  assert first == again
  assert len({first, *others}) == size - 1
  # Seeds of 32 bits have JAX's own keys.
  for place in (0, 3):
    assert sampler.key_B[place] == jax.random.key(seeds[place])


def test_no_setting_compiles_anything():
  num_traces = 0

  @jax.jit
  def step(sampler, slots_S, words_SW):
    nonlocal num_traces
    num_traces += 1
    sampler = sampler_lib.put(sampler, slots_S, words_SW)
    logits_BV = jnp.ones((2, 30))
    seen_BV = jnp.zeros((2, 30), jnp.int32)
    positions_B = jnp.array([9, 9])
    return sampler, sampler_lib.sample(logits_BV, sampler, seen_BV, positions_B)

  sampler = sampler_lib.empty(2)
  for slot, chosen in enumerate(
    (
      {'temperature': 0},
      {'seed': 2**64 - 1, 'top_k': 2**31 - 1, 'stop_ids': tuple(range(16))},
      {'logit_bias': tuple((i, 1) for i in range(300)), 'logprobs': 20},
      {'top_p': 0.5, 'min_p': 0.2, 'repetition_penalty': 2},
      {'min_tokens': 2**31 - 1},
    )
  ):
    words_1W = sampler_lib.words([_row(**chosen)])
    sampler, _ = step(sampler, np.array([slot % 2]), words_1W)
  words_1W = sampler_lib.words([sampler_lib.idle()])
  sampler, _ = step(sampler, np.array([0]), words_1W)
  assert num_traces == 1


# ------------------------------------------------------------------------------
# Settings as arrays.


def _equal(first, second):
  return all(
    np.array_equal(*(_plain(getattr(x, name)) for x in (first, second)))
    for name in sampler_lib.Sampler._fields
  )


def _plain(field):
  is_key = jnp.issubdtype(field.dtype, jax.dtypes.prng_key)
  return np.asarray(jax.random.key_data(field) if is_key else field)


def test_settings_become_a_row():
  row = sampler_lib.row(
    _Settings(
      temperature=0.5,
      min_tokens=3,
      stop_ids=(8, 9),
      logit_bias=((4, -2.5),),
      logprobs=0,
    ),
    num_prompt_tokens=11,
    seed=2**63 - 2,
    eos_id=2,
  )
  assert row.temperature_B == np.float32(0.5)
  assert row.min_position_B == 14
  assert row.num_logprobs_B == 0
  assert sorted(row.stop_ids_BI[row.stop_ids_BI >= 0]) == [2, 8, 9]
  assert row.bias_ids_BL.tolist() == [4] + [-1] * 299
  assert row.bias_values_BL[0] == -2.5
  assert row.key_B.tolist() == [2**31 - 1, 2**32 - 2]
  none = sampler_lib.row(_Settings(), num_prompt_tokens=1, seed=0, eos_id=None)
  assert (none.stop_ids_BI == -1).all()
  assert none.num_logprobs_B == -1


def test_put_and_take_move_rows():
  rows = [_row(seed=5, **chosen) for chosen in _COMPOSITIONS]
  sampler = sampler_lib.empty(4)
  put = jax.jit(sampler_lib.put)
  sampler = put(sampler, np.array([2, 0]), sampler_lib.words(rows))
  taken = sampler_lib.take(sampler, jnp.array([2, 0, 3]))
  assert _equal(taken, sampler_lib.stack([*rows, sampler_lib.idle()]))
  # A slot that was given back is like one that was never used.
  for slot in (2, 0):
    idle_1W = sampler_lib.words([sampler_lib.idle()])
    sampler = put(sampler, np.array([slot]), idle_1W)
  assert _equal(sampler, sampler_lib.empty(4))


def test_every_setting_but_those_of_the_host_reaches_the_row():
  changed = {
    'temperature': 0.5,
    'top_k': 2,
    'top_p': 0.5,
    'min_p': 0.5,
    'repetition_penalty': 2.0,
    'presence_penalty': 1.0,
    'frequency_penalty': 1.0,
    'logit_bias': ((1, 1.0),),
    'min_tokens': 1,
    'stop_ids': (1,),
    'logprobs': 1,
  }
  # Settings that the engine or the transcript reads; `seed` is an argument.
  of_the_host = {
    'seed', 'n', 'max_tokens', 'stop', 'ignore_eos', 'prompt_logprobs',
        'constraint',
  }  # fmt: skip
  names = {field.name for field in dataclasses.fields(_Settings)}
  assert names == changed.keys() | of_the_host
  for name, value in changed.items():
    assert not _equal(
      sampler_lib.stack([_row(**{name: value})]), sampler_lib.stack([_row()])
    ), name
