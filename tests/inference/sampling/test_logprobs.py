"""Log-probabilities against NumPy in float64; bits in any batch."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from inference.sampling import logprobs
from models.layers import row_sums

# XLA sums rows of this length in one order among 8 rows, another among 16.
_VOCAB = 259
_logprobs = jax.jit(logprobs.logprobs, static_argnames='max_alternatives')


def _logits(num_rows: int):
  rng = np.random.default_rng(0)
  return (3 * rng.standard_normal((num_rows, _VOCAB))).astype(np.float32)


def _oracle(logits_BV):
  logits_BV = logits_BV.astype(np.float64)
  max_B1 = logits_BV.max(axis=-1, keepdims=True)
  sum_B1 = np.exp(logits_BV - max_B1).sum(axis=-1, keepdims=True)
  return logits_BV - max_B1 - np.log(sum_B1)


def test_values_are_those_of_numpy():
  logits_BV = _logits(4)
  tokens_B = np.array([0, 7, 258, 100], np.int32)
  found = _logprobs(logits_BV, tokens_B, np.array([20, 20, 3, 0], np.int32))
  expected_BV = _oracle(logits_BV)
  # float32: a few ulps of a logarithm of about 10.
  np.testing.assert_allclose(
    found.chosen_B, expected_BV[np.arange(4), tokens_B], atol=4e-6
  )
  order_BV = np.argsort(-logits_BV, axis=-1, kind='stable')
  for row, num_asked in enumerate((20, 20, 3, 0)):
    ids = order_BV[row, :num_asked]
    given = logprobs.of_row(jax.device_get(found), row, num_asked)
    assert given.ids == tuple(ids)
    np.testing.assert_allclose(given.values, expected_BV[row, ids], atol=4e-6)
    assert list(given.values) == sorted(given.values, reverse=True)
    assert (np.asarray(found.ids_BK[row, num_asked:]) == -1).all()
    assert (np.asarray(found.values_BK[row, num_asked:]) == 0).all()


def test_a_chosen_token_has_the_same_bits_among_the_alternatives():
  logits_BV = _logits(20)
  # The k-th most probable token of row k is chosen.
  tokens_B = np.argsort(-logits_BV, axis=-1, kind='stable')[
    np.arange(20), np.arange(20)
  ].astype(np.int32)
  found = _logprobs(logits_BV, tokens_B, np.full(20, 20, np.int32))
  np.testing.assert_array_equal(
    found.ids_BK[np.arange(20), np.arange(20)], tokens_B
  )
  np.testing.assert_array_equal(
    found.values_BK[np.arange(20), np.arange(20)], found.chosen_B
  )


def test_equal_logits_rank_by_id():
  found = _logprobs(np.zeros((1, 8), np.float32), np.array([3]), np.array([5]))
  assert found.ids_BK[0].tolist() == [0, 1, 2, 3, 4] + [-1] * 15
  np.testing.assert_allclose(found.values_BK[0, :5], -np.log(8), rtol=1e-6)


def test_impossible_tokens_have_no_effect_on_the_others():
  logits_1V = np.array([[1.0, -np.inf, 2.0, -np.inf]], np.float32)
  found = _logprobs(logits_1V, np.array([1]), np.array([3]))
  assert found.chosen_B[0] == -np.inf
  assert found.ids_BK[0, :3].tolist() == [2, 0, 1]
  np.testing.assert_allclose(
    found.values_BK[0, :2], [-np.log1p(np.exp(-1)), -1 - np.log1p(np.exp(-1))],
    rtol=1e-6,
  )  # fmt: skip


@pytest.mark.parametrize('asked', [[-1, -1], [-1, 0], [-1, 5]])
def test_a_row_that_asks_nothing_gets_zeros(asked):
  found = _logprobs(_logits(2), np.array([1, 2]), np.array(asked, np.int32))
  assert found.chosen_B[0] == 0
  assert (np.asarray(found.ids_BK[0]) == -1).all()
  assert (np.asarray(found.values_BK[0]) == 0).all()
  assert (found.chosen_B[1] != 0) == (asked[1] >= 0)
  assert (found.ids_BK[1, 0] != -1) == (asked[1] > 0)


def _in_company(num_rows: int, place: int):
  """Returns the bits of log-probabilities of eight rows among others."""
  # Its own function: jit would reuse the program of the other test.
  compiled = jax.jit(lambda *args: logprobs.logprobs(*args))
  asked_B = np.where(np.arange(num_rows) == place, 4, -1 + place % 3)
  bits = b''
  for row_V in _logits(41)[33:]:
    logits_BV = _logits(num_rows)
    logits_BV[place] = row_V
    # The most probable: its small log-probability shows the last bit of a sum.
    tokens_B = np.full(num_rows, np.argmax(row_V), np.int32)
    found = compiled(logits_BV, tokens_B, asked_B.astype(np.int32))
    bits += b''.join(np.asarray(field)[place].tobytes() for field in found)
  return bits


_COMPANIES = ((1, 0), (8, 7), (16, 3), (33, 32))


def test_a_row_has_the_same_bits_in_any_company():
  assert len({_in_company(*company) for company in _COMPANIES}) == 1


def test_without_row_sum_it_would_not(monkeypatch):
  # If this fails, XLA's own sum no longer depends on the number of rows, and
  # `row_sum` may go.
  monkeypatch.setattr(row_sums, 'row_sum', lambda x: jnp.sum(x, axis=-1))
  assert len({_in_company(*company) for company in _COMPANIES}) > 1


@pytest.mark.parametrize('width', [1, 2, 3, 259, 1023, 1025, 2050])
def test_row_sum_is_a_sum(width):
  values_BV = np.random.default_rng(1).random((3, width), np.float32)
  # Pairwise sums add each number few times: 2 ulps are a wide bound.
  np.testing.assert_allclose(
    jax.jit(row_sums.row_sum)(values_BV),
    values_BV.astype(np.float64).sum(axis=-1),
    rtol=2.4e-7,
  )
