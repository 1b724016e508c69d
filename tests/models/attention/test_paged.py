"""Paged attention and its pages, against the dense cache and closed forms."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from models import kv_cache
from models.attention import (
  cached,
  dense as dense_lib,
  form as form_lib,
  paged as paged_lib,
)

_NUM_KV, _GROUPS, _WIDTH = 2, 3, 8
_HEADS = _NUM_KV * _GROUPS


def _normal(rng, *shape):
  return jnp.asarray(rng.normal(size=shape), jnp.float32)


class _Case:
  """Sequences of several lengths in a dense cache and in shuffled pages."""

  def __init__(self, page_size, lengths, *, dtype=jnp.float32, slots=192):
    rng = np.random.default_rng(0)
    self.lengths = lengths
    batch, per_sequence = len(lengths), slots // page_size
    self.k_BKSC = _normal(rng, batch, _NUM_KV, slots, _WIDTH)
    self.v_BKSC = _normal(rng, batch, _NUM_KV, slots, _WIDTH)
    num_pages = batch * per_sequence + 1
    self.table_BL = 1 + rng.permutation(num_pages - 1).reshape(batch, -1)
    shape = num_pages, page_size, 2 * _NUM_KV, _WIDTH
    has_scale = jnp.dtype(dtype).name in kv_cache.QUANTIZED
    self.pages = kv_cache.Pages(
      jnp.zeros(shape, dtype), jnp.zeros(shape[:3]) if has_scale else None
    )
    for row, length in enumerate(lengths):
      self._fill(row, length)

  def _fill(self, row, length):
    """Writes a sequence as one chunk, as prompts are written."""
    layer = kv_cache.PagedLayer(
      self.pages,
      jnp.zeros((0, self.table_BL.shape[1]), jnp.int32),
      jnp.asarray(self.table_BL[row : row + 1], jnp.int32),
    )
    k_1TKC, v_1TKC = (
      x[row : row + 1].swapaxes(1, 2) for x in (self.k_BKSC, self.v_BKSC)
    )
    slots = k_1TKC.shape[1]
    positions_1T = jnp.where(jnp.arange(slots) < length, jnp.arange(slots), -1)
    self.pages = kv_cache.write(layer, k_1TKC, v_1TKC, positions_1T[None]).pages


def _both(case, q_BRHC, positions_BR, form=form_lib.Form(), group=1):
  dense = dense_lib.attend(
    q_BRHC, case.k_BKSC, case.v_BKSC, slots_BT=positions_BR, form=form
  )
  paged = paged_lib.attend_rows(
    q_BRHC,
    case.pages,
    jnp.asarray(case.table_BL, jnp.int32),
    positions_BR,
    form,
    group=group,
  )
  return np.asarray(dense), np.asarray(paged)


@pytest.mark.fast_cases(3)
@pytest.mark.parametrize('page_size', [1, 16, 64, 192])
@pytest.mark.parametrize(
  'form',
  [
    form_lib.Form(),
    form_lib.Form(window=70, softcap=2.0, scale=0.5),
    form_lib.Form(window=3),
  ],
)
def test_pages_give_what_a_dense_cache_gives(page_size, form):
  lengths = [1, 64, 100, 192]
  case = _Case(page_size, lengths)
  rng = np.random.default_rng(1)
  q_B1HC = _normal(rng, 4, 1, _HEADS, _WIDTH)
  positions_B1 = jnp.asarray(lengths, jnp.int32)[:, None] - 1
  for group in (1, 4):
    dense, paged = _both(case, q_B1HC, positions_B1, form, group)
    # Sums of some 200 float32 terms in another order.
    np.testing.assert_allclose(paged, dense, atol=2e-6)


def test_a_chunk_sees_up_to_each_rows_own_position():
  case = _Case(16, [100, 70])
  rng = np.random.default_rng(1)
  q_BRHC = _normal(rng, 2, 8, _HEADS, _WIDTH)
  positions_BR = jnp.asarray([[92 + r for r in range(8)], [5, 6, 7, *[-1] * 5]])
  dense, paged = _both(case, q_BRHC, positions_BR)
  np.testing.assert_allclose(paged[0], dense[0], atol=2e-6)
  np.testing.assert_allclose(paged[1, :3], dense[1, :3], atol=2e-6)
  assert np.isfinite(paged).all()  # rows of padding mean nothing, but harm none


def test_page_size_width_and_neighbours_leave_every_bit_as_it_is():
  rng = np.random.default_rng(1)
  q_B1HC = _normal(rng, 4, 1, _HEADS, _WIDTH)
  positions_B1 = jnp.asarray([[40], [3], [100], [191]])
  results = [
    _both(_Case(size, [192] * 4), q_B1HC, positions_B1, group=4)[1]
    for size in (1, 16, 64, 192)
  ]
  short = _Case(16, [192] * 4)
  short.table_BL = short.table_BL[:, :8]  # 128 slots: enough for three of them
  results.append(
    _both(short, q_B1HC, jnp.minimum(positions_B1, 100), group=4)[1]
  )
  for other in results[1:]:
    np.testing.assert_array_equal(other[:3], results[0][:3])


def test_pages_of_bits_give_what_pages_of_bfloat16_give():
  lengths = [100, 64]
  q_B1HC = _normal(np.random.default_rng(1), 2, 1, _HEADS, _WIDTH)
  positions_B1 = jnp.asarray(lengths, jnp.int32)[:, None] - 1
  bits, floats = (
    _both(_Case(16, lengths, dtype=dtype), q_B1HC, positions_B1)[1]
    for dtype in (kv_cache.BFLOAT16_BITS, jnp.bfloat16)
  )
  np.testing.assert_array_equal(bits, floats)


def test_int8_pages_are_within_the_stated_bound():
  case, exact = _Case(16, [100], dtype=jnp.int8), _Case(16, [100])
  np.testing.assert_array_equal(case.table_BL, exact.table_BL)
  stored = case.pages.kv_PQYC.astype(jnp.float32)
  stored = stored * case.pages.scale_PQY[..., None]
  error = np.abs(np.asarray(stored - exact.pages.kv_PQYC)).max(-1)
  largest = np.abs(np.asarray(exact.pages.kv_PQYC)).max(-1)
  # Half a step of 127; the product with the scale rounds once more.
  assert (error <= largest / 254 * (1 + 1e-5)).all()
  assert error.max() > 0
  q_B1HC = _normal(np.random.default_rng(1), 1, 1, _HEADS, _WIDTH)
  dense, paged = _both(case, q_B1HC, jnp.asarray([[99]]))
  assert 1e-5 < np.abs(paged - dense).max() < 0.02  # values are about 1


def test_fp8_pages_are_within_the_stated_bound():
  case, exact = _Case(16, [100], dtype=kv_cache.FP8_BITS), _Case(16, [100])
  stored = kv_cache.numbers(case.pages.kv_PQYC)
  stored = np.asarray(stored * case.pages.scale_PQY[..., None])
  expected = np.asarray(exact.pages.kv_PQYC)
  # The smallest number of e4m3 is 2**-9, of a largest of 448.
  smallest = np.abs(expected).max(-1, keepdims=True) / 448 / 2**9
  bound = np.maximum(np.abs(expected) / 16, smallest / 2)
  assert (np.abs(stored - expected) <= bound * (1 + 1e-5)).all()
  q_B1HC = _normal(np.random.default_rng(1), 1, 1, _HEADS, _WIDTH)
  dense, paged = _both(case, q_B1HC, jnp.asarray([[99]]))
  assert 1e-5 < np.abs(paged - dense).max() < 0.1  # values are about 1


def test_the_largest_of_fp8_is_no_nan():
  x = (
    jnp.asarray([[3.0000002, -3.0, 0.1]])
    * jnp.geomspace(1e-30, 1e30, 61)[:, None]
  )
  codes, scale = kv_cache.quantize(x, kv_cache.FP8_BITS)
  found = kv_cache.numbers(codes) * scale[:, None]
  np.testing.assert_allclose(found, x, rtol=1 / 16)


@pytest.mark.parametrize('dtype', kv_cache.QUANTIZED)
def test_zeros_are_stored_as_zeros(dtype):
  codes, scale = kv_cache.quantize(jnp.zeros((2, 4)), dtype)
  assert not codes.any()
  assert not scale.any()


def test_a_call_writes_decodes_and_chunks_and_nothing_else():
  pool = kv_cache.Pages(jnp.full((6, 2, 2 * _NUM_KV, _WIDTH), 7.0))
  layer = kv_cache.PagedLayer(
    pool,
    jnp.asarray([[1, 2], [0, 0]], jnp.int32),  # the second row is padding
    jnp.asarray([[5, 3]], jnp.int32),
  )
  k_1TKC = jnp.broadcast_to(
    jnp.arange(1.0, 6.0)[None, :, None, None], (1, 5, _NUM_KV, _WIDTH)
  )
  positions_1T = jnp.asarray([[3, -1, 1, 2, -1]])
  pages = kv_cache.write(layer, k_1TKC, -k_1TKC, positions_1T).pages
  expected = np.full((6, 2), 7.0)
  expected[2, 1], expected[5, 1], expected[3, 0] = 1, 3, 4
  np.testing.assert_array_equal(pages.kv_PQYC[:, :, 0, 0], expected)
  keys_and_values = np.asarray(pages.kv_PQYC[2, 1])
  np.testing.assert_array_equal(keys_and_values[0::2], 1)
  np.testing.assert_array_equal(keys_and_values[1::2], -1)


def test_decodes_and_chunks_of_one_call_are_attended_together():
  case = _Case(16, [50, 30, 64])
  rng = np.random.default_rng(1)
  q_1THC = _normal(rng, 1, 2 + 4, _HEADS, _WIDTH)
  positions_1T = jnp.asarray([[49, 29, 60, 61, 62, 63]])
  tables = jnp.asarray(case.table_BL, jnp.int32)
  layer = kv_cache.PagedLayer(case.pages, tables[:2], tables[2:])
  out = cached.attend(q_1THC, layer, positions_1T, form_lib.Form())
  rows = [(0, [49]), (1, [29]), (2, [60, 61, 62, 63])]
  at = 0
  for row, positions in rows:
    expected = dense_lib.attend(
      q_1THC[:, at : at + len(positions)],
      case.k_BKSC[row : row + 1],
      case.v_BKSC[row : row + 1],
      slots_BT=jnp.asarray([positions]),
    )
    np.testing.assert_allclose(
      out[:, at : at + len(positions)], expected, atol=2e-6
    )
    at += len(positions)


def test_copied_pages_hold_what_their_sources_held_in_every_layer():
  pools = tuple(
    kv_cache.Pages(jnp.arange(4.0)[:, None, None, None] + 10 * n)
    for n in range(2)
  )
  # A target out of range is how a copy is left out.
  copied = jax.jit(kv_cache.copy_pages)(
    pools, jnp.asarray([2, 0]), jnp.asarray([1, 4])
  )
  for n, pool in enumerate(copied):
    np.testing.assert_array_equal(
      pool.kv_PQYC[:, 0, 0, 0], np.asarray([0, 2, 2, 3]) + 10 * n
    )


def test_a_table_that_is_no_whole_number_of_tiles_is_refused():
  case = _Case(16, [100])
  case.table_BL = case.table_BL[:, :6]
  q_B1HC = _normal(np.random.default_rng(1), 1, 1, _HEADS, _WIDTH)
  with pytest.raises(ValueError, match='got 6 pages of 16 tokens, 96 slots'):
    _both(case, q_B1HC, jnp.asarray([[90]]))
