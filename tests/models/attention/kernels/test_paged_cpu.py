"""Native attention over pages: plain JAX's results, alone and in a crowd."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from models import kv_cache
from models.attention import form as form_lib, paged
from models.attention.kernels import paged_cpu
from models.native import build, processor

Form = form_lib.Form
_PAGE = 16
_PLAIN = ('-mno-avx', '-O1')
_AVX2 = ('-mavx2', '-mfma', '-O1')


@pytest.fixture(scope='module')
def attend():
  try:
    return paged_cpu.registered()
  except build.BuildError as error:
    return pytest.skip(str(error))


def _pages(kv_PQYC, stored):
  if stored in kv_cache.QUANTIZED:
    return kv_cache.Pages(*kv_cache.quantize(jnp.asarray(kv_PQYC), stored))
  if stored == kv_cache.BFLOAT16_BITS:
    rounded = jnp.asarray(kv_PQYC).astype(jnp.bfloat16)
    return kv_cache.Pages(jax.lax.bitcast_convert_type(rounded, jnp.uint16))
  return kv_cache.Pages(jnp.asarray(kv_PQYC))


def _call(
  *, decodes, chunks, rows, heads, kv_heads, channels, width=8,
  dtype='float32', stored='float32', seed=0,
):  # fmt: skip
  """Returns random queries, a cache and positions; the last one is padding."""
  rng = np.random.default_rng(seed)
  num = decodes + chunks
  kv = rng.normal(size=(num * width + 1, _PAGE, 2 * kv_heads, channels))
  table = 1 + rng.permutation(num * width).reshape(num, width).astype(np.int32)
  positions = np.concatenate([
    rng.integers(0, width * _PAGE, decodes),
    (
      rng.integers(0, width * _PAGE - rows + 1, (chunks, 1)) + np.arange(rows)
    ).reshape(-1),
  ]).astype(np.int32)  # fmt: skip
  if chunks and rows > 1:
    positions[-1] = -1
  q = rng.normal(size=(1, decodes + chunks * rows, heads, channels))
  layer = kv_cache.PagedLayer(
    _pages(kv.astype(np.float32), stored),
    jnp.asarray(table[:decodes]),
    jnp.asarray(table[decodes:]),
  )
  return jnp.asarray(q, dtype), layer, jnp.asarray(positions[None])


def _both(attend, call, form=Form()):
  """Returns native and plain results of queries that are no padding."""
  seen = np.asarray(call[2][0]) >= 0
  return [
    np.asarray(jax.jit(each, static_argnums=3)(*call, form), np.float32)[0][
      seen
    ]
    for each in (attend, paged.attend)
  ]


@pytest.mark.fast_cases(3)
@pytest.mark.parametrize('stored', ['float32', 'uint16', 'int8', 'uint8'])
@pytest.mark.parametrize(
  'form', [Form(), Form(window=37), Form(softcap=5.0, scale=0.3)], ids=str
)
def test_results_are_those_of_plain_jax(attend, stored, form):
  # Heads that no vector register divides, and spans beside decodes.
  call = _call(
    decodes=3, chunks=2, rows=5, heads=6, kv_heads=2, channels=20,
    stored=stored,
  )  # fmt: skip
  got, expected = _both(attend, call, form)
  np.testing.assert_allclose(got, expected, atol=3e-6)
  assert np.abs(expected).max() > 0.3


def test_bfloat16_queries_and_long_chunks(attend):
  call = _call(
    decodes=2, chunks=1, rows=8, heads=9, kv_heads=3, channels=64,
    dtype='bfloat16', stored='uint16',
  )  # fmt: skip
  got, expected = _both(attend, call)
  # Plain JAX rounds the weights to bfloat16; native code does not.
  np.testing.assert_allclose(got, expected, atol=0.02)
  call = _call(decodes=2, chunks=1, rows=9, heads=4, kv_heads=2, channels=16)
  got, expected = _both(attend, call)
  np.testing.assert_allclose(got, expected, atol=3e-6)
  # A chunk of more rows than the native code takes is attended in plain JAX.
  np.testing.assert_array_equal(got[2:], expected[2:])


def test_bits_do_not_depend_on_the_other_sequences(attend):
  q, layer, positions = _call(
    decodes=9, chunks=0, rows=1, heads=4, kv_heads=2, channels=32
  )
  together = attend(q, layer, positions, Form())
  for n in range(9):
    alone = attend(
      q[:, n : n + 1],
      layer._replace(decode_table_DL=layer.decode_table_DL[n : n + 1]),
      positions[:, n : n + 1],
      Form(),
    )
    np.testing.assert_array_equal(alone[0, 0], together[0, n])


def test_tokens_that_are_not_finite_reach_those_alone_that_see_them(attend):
  q, layer, _ = _call(
    decodes=0, chunks=1, rows=6, heads=4, kv_heads=2, channels=16
  )
  positions = jnp.arange(60, 66)[None]
  page, place = layer.chunk_table_XL[0, 63 // _PAGE], 63 % _PAGE
  results = []
  for value in (0.0, np.nan, np.inf):
    for vector in (2, 3):  # a key and a value of the second head
      kv = layer.pages.kv_PQYC.at[page, place, vector].set(value)
      spoilt = layer._replace(pages=kv_cache.Pages(kv))
      results.append(np.asarray(attend(q, spoilt, positions, Form()))[0])
  of_keys, of_values = results[0], results[1]
  for found, clean in zip(results[2:], 2 * [of_keys, of_values], strict=True):
    # The first rows do not see the token, the first head never.
    np.testing.assert_array_equal(found[:3], clean[:3])
    np.testing.assert_array_equal(found[:, :2], clean[:, :2])
  for found in (*results[2:4], results[5]):
    assert np.isnan(found[3:, 2:]).all()


@pytest.mark.slow
@pytest.mark.parametrize('stored', ['float32', 'uint16', 'int8', 'uint8'])
def test_builds_for_other_processors_agree(attend, stored):
  call = _call(
    decodes=4, chunks=0, rows=1, heads=4, kv_heads=2, channels=24, stored=stored
  )
  expected, _ = _both(attend, call)
  for options in (_PLAIN, _AVX2):
    if options == _AVX2 and 'avx2' not in processor.described():
      continue
    target, _ = build.registered(options, source=build.PAGES)
    found, _ = _both(paged_cpu.Attend(target), call)
    np.testing.assert_allclose(found, expected, rtol=0, atol=3e-6)


def test_a_call_that_it_does_not_take_is_refused(attend):
  q, layer, positions = _call(
    decodes=2, chunks=0, rows=1, heads=4, kv_heads=2, channels=16
  )
  pool = layer.pages.kv_PQYC.astype(jnp.float16)
  with pytest.raises(ValueError, match=r'native attention: got .* float16, ex'):
    attend(q, layer._replace(pages=kv_cache.Pages(pool)), positions, Form())
