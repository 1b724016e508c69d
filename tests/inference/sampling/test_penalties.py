"""Penalties, bias and masks against NumPy, and the counts behind them."""

import hypothesis
from hypothesis import strategies as st
import jax
import jax.numpy as jnp
import numpy as np

from inference.sampling import penalties

_VOCAB = 12
_WIDTH = 10  # of padded ids
_recount = jax.jit(penalties.recount, static_argnums=2)
_count = jax.jit(penalties.count)


def _ids(*ids):
  return np.array([*ids] + [-1] * (_WIDTH - len(ids)), np.int32)


def _seen(prompt, output):
  """Returns the counts of `recount`, from plain Python."""
  counts = np.bincount(output, minlength=_VOCAB).astype(np.int32)
  counts[prompt] |= penalties.PROMPT_FLAG
  return counts


_TOKENS = st.lists(st.integers(0, _VOCAB - 1), max_size=_WIDTH // 2)


@hypothesis.settings(max_examples=40, deadline=None)
@hypothesis.given(prompt=_TOKENS, output=_TOKENS)
def test_recount_is_a_bincount_and_a_flag(prompt, output):
  ids_T = _ids(*prompt, *output)
  np.testing.assert_array_equal(
    _recount(ids_T, len(prompt), _VOCAB),
    _seen(np.array(prompt, int), np.array(output, int)),
  )


@hypothesis.settings(max_examples=20, deadline=None)
@hypothesis.given(prompt=_TOKENS, output=_TOKENS)
def test_counting_token_by_token_ends_where_recount_does(prompt, output):
  # A sequence has the same counts before and after a preemption.
  before_V = _recount(_ids(*prompt), len(prompt), _VOCAB)
  others_BV = np.arange(3 * _VOCAB, dtype=np.int32).reshape(3, _VOCAB)
  seen_BV = jnp.asarray(others_BV).at[1].set(before_V)
  for token in output:
    seen_BV = _count(seen_BV, np.array([1, -1]), np.array([token, 0]))
  expected_BV = others_BV.copy()
  expected_BV[1] = _recount(_ids(*prompt, *output), len(prompt), _VOCAB)
  np.testing.assert_array_equal(seen_BV, expected_BV)


def test_rows_that_sampled_nothing_are_not_counted():
  seen_BV = jnp.zeros((3, _VOCAB), jnp.int32)
  counted_BV = _count(seen_BV, np.array([0, 2, -1, 2]), np.array([-1, 5, 3, 5]))
  expected_BV = np.zeros((3, _VOCAB), np.int32)
  expected_BV[2, 5] = 2
  np.testing.assert_array_equal(counted_BV, expected_BV)


def test_each_penalty_by_hand():
  logits_V = [2.0, -2.0, 0.0, 2.0, -2.0, 1.0, 1.0, 1.0] + [0.5] * 4
  seen_V = _recount(_ids(0, 1, 6, 3, 3, 4, 6), 3, _VOCAB)  # prompt: 0, 1, 6

  def penalize(repetition=1.0, presence=0.0, frequency=0.0):
    return np.asarray(
      jax.jit(penalties.penalize)(
        jnp.array([logits_V]),
        seen_V[None],
        repetition_B=jnp.array([repetition]),
        presence_B=jnp.array([presence]),
        frequency_B=jnp.array([frequency]),
      )
    )[0, :8].tolist()

  # Prompt and completion count alike; logits of both signs fall.
  assert penalize(repetition=2.0) == [1.0, -4.0, 0, 1.0, -4.0, 1, 0.5, 1]
  # Only the completion counts: 3 twice, 4 and 6 once.
  assert penalize(presence=0.5) == [2, -2, 0, 1.5, -2.5, 1, 0.5, 1]
  assert penalize(frequency=0.5) == [2, -2, 0, 1.0, -2.5, 1, 0.5, 1]
  assert penalize(frequency=-0.5) == [2, -2, 0, 3.0, -1.5, 1, 1.5, 1]
  # The repetition penalty comes first.
  assert penalize(2.0, 0.5, 0.25) == [1, -4, 0, 0, -4.75, 1, -0.25, 1]


def test_a_row_reads_the_slot_it_sits_in():
  logits_BV = jnp.ones((2, _VOCAB))
  seen_BV = jnp.zeros((5, _VOCAB), jnp.int32).at[3, 7].set(1).at[0, 2].set(1)
  penalized_BV = jax.jit(penalties.penalize)(
    logits_BV,
    seen_BV,
    repetition_B=jnp.ones(2),
    presence_B=jnp.array([1.0, 2.0]),
    frequency_B=jnp.zeros(2),
    slots_B=jnp.array([3, 0]),
  )
  expected_BV = np.ones((2, _VOCAB), np.float32)
  expected_BV[0, 7], expected_BV[1, 2] = 0.0, -1.0
  np.testing.assert_array_equal(penalized_BV, expected_BV)


def test_bias_and_mask_touch_the_given_ids_of_the_given_rows():
  logits_BV = jnp.zeros((2, _VOCAB))
  # -1 is no id: it must not reach the last token of the vocabulary.
  biased_BV = jax.jit(penalties.add_bias)(
    logits_BV,
    jnp.array([[3, -1, 0], [-1, -1, -1]]),
    jnp.array([[5.0, 7.0, -100.0], [9.0, 9.0, 9.0]]),
  )
  expected_BV = np.zeros((2, _VOCAB), np.float32)
  expected_BV[0, [3, 0]] = 5.0, -100.0
  np.testing.assert_array_equal(biased_BV, expected_BV)

  masked_BV = jax.jit(penalties.forbid)(
    logits_BV,
    jnp.array([[3, -1], [4, -1]]),
    jnp.array([False, True]),
  )
  expected_BV = np.zeros((2, _VOCAB), np.float32)
  expected_BV[1, 4] = -np.inf
  np.testing.assert_array_equal(masked_BV, expected_BV)


def test_a_row_that_asks_nothing_keeps_every_bit():
  # Minus zero, infinities and a subnormal, beside a row with all penalties.
  logits_V = np.array([-0.0, -np.inf, 1e-40, 3.3] * 3, np.float32)
  seen_BV = np.full((2, _VOCAB), penalties.PROMPT_FLAG | 3, np.int32)
  penalized_BV = jax.jit(penalties.penalize)(
    np.stack([logits_V, logits_V]),
    seen_BV,
    repetition_B=np.array([1.3, 1.0], np.float32),
    presence_B=np.array([0.3, 0.0], np.float32),
    frequency_B=np.array([0.7, 0.0], np.float32),
  )
  assert np.asarray(penalized_BV[1]).tobytes() == logits_V.tobytes()
  assert np.asarray(penalized_BV[0]).tobytes() != logits_V.tobytes()
