"""The paged attention kernel for GPUs, against the reference in plain JAX.

The kernel is interpreted, which needs no GPU. The last tests compile it for
GPUs that are not here, and one test runs it on a GPU if there is one.
"""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from models import kv_cache
from models.attention import dense, form as form_lib, paged, supports
from models.attention.kernels import paged_gpu
from tests.helpers import absent_devices, tiny_models

# On a GPU, where products of float32 are not of float32 by default: with the
# environment of `make test-gpu`.
pytestmark = pytest.mark.gpu

_NUM_KV, _GROUPS = 2, 3
_SLOTS = 192  # of a sequence, in three tiles
_ROWS = 24  # of a chunk; with three heads each more than one program takes
# Two decoding sequences and an idle one; a chunk in the middle of a context,
# one that begins it and ends early, and one that is all padding.
_DECODES = (0, 150, -1)
_BLOCKS = ((168, 24), (0, 5), (-1, 0))
_FORMS = {
  'plain': form_lib.Form(),
  'all': form_lib.Form(window=70, softcap=2.0, scale=0.5),
  'narrow': form_lib.Form(window=3),
}


def _positions():
  rows = [
    np.where(np.arange(_ROWS) < count, start + np.arange(_ROWS), -1)
    for start, count in _BLOCKS
  ]
  return jnp.asarray(np.concatenate([_DECODES, *rows])[None], jnp.int32)


def _call(page_size, channels=16, dtype=jnp.float32, stored=None):
  """Returns queries of a mixed call, and a pool whose slots are all full."""
  rng = np.random.default_rng(0)
  num_sequences = len(_DECODES) + len(_BLOCKS)
  per_sequence = _SLOTS // page_size
  num_pages = num_sequences * per_sequence + 1
  kv_PQYC = jnp.asarray(
    rng.normal(size=(num_pages, page_size, 2 * _NUM_KV, channels)), jnp.float32
  )
  pages = kv_cache.Pages(kv_PQYC.astype(stored or dtype))
  if stored == jnp.int8:
    pages = kv_cache.Pages(*kv_cache.quantize(kv_PQYC))
  tables = 1 + rng.permutation(num_pages - 1).reshape(num_sequences, -1)
  tables = jnp.asarray(tables, jnp.int32)
  layer = kv_cache.PagedLayer(
    pages, tables[: len(_DECODES)], tables[len(_DECODES) :]
  )
  shape = 1, _positions().shape[1], _NUM_KV * _GROUPS, channels
  return jnp.asarray(rng.normal(size=shape), dtype), layer


@functools.partial(jax.jit, static_argnums=(2, 3))
def _kernel(q_1THC, layer, form, num_splits=1):
  return paged_gpu.attend(
    q_1THC, layer, _positions(), form, num_splits=num_splits, interpret=True
  )


@functools.partial(jax.jit, static_argnums=2)
def _reference(q_1THC, layer, form):
  return paged.attend(q_1THC, layer, _positions(), form)


def _real(out_1THC):
  return np.asarray(out_1THC, np.float32)[np.asarray(_positions()) >= 0]


@pytest.mark.fast_cases(1)
@pytest.mark.parametrize(
  ('page_size', 'name'),
  [(1, 'narrow'), (16, 'plain'), (16, 'all'), (64, 'all')],
)
def test_the_kernel_gives_what_the_reference_gives(page_size, name):
  q_1THC, layer = _call(page_size)
  expected = _real(_reference(q_1THC, layer, _FORMS[name]))
  for num_splits in (1, 2):
    out = _kernel(q_1THC, layer, _FORMS[name], num_splits)
    # float32 sums of up to 192 terms of order one, in another order.
    np.testing.assert_allclose(_real(out), expected, atol=2e-6)
    # What sees nothing gets zeros, not what happened to be there.
    assert not np.asarray(out)[np.asarray(_positions()) < 0].any()


def test_a_wide_head_whose_width_is_no_power_of_two():
  q_1THC, layer = _call(64, 136)
  form = form_lib.Form(scale=0.2)  # so that no key has all the weight
  np.testing.assert_allclose(
    _real(_kernel(q_1THC, layer, form)),
    _real(_reference(q_1THC, layer, form)),
    atol=1e-5,  # scores are sums of 136 terms, some 10 large, then exponents
  )


def test_16_bits_lose_no_more_than_the_reference_does():
  dtype = jnp.bfloat16
  q_1THC, layer = _call(16, dtype=dtype)
  out = _kernel(q_1THC, layer, _FORMS['plain'])
  assert out.dtype == dtype
  exact = _real(
    _reference(
      q_1THC.astype(jnp.float32),
      jax.tree.map(
        lambda x: x.astype(jnp.float32) if x.dtype == dtype else x, layer
      ),
      _FORMS['plain'],
    )
  )
  plain = _real(_reference(q_1THC, layer, _FORMS['plain']))
  error, plain_error = (
    float(np.linalg.norm(x - exact)) for x in (_real(out), plain)
  )
  # Both round weights and results; the reference rounds scaled queries too.
  assert 0 < error <= 1.2 * plain_error


@pytest.mark.slow
def test_int8_pages_are_read_as_the_reference_reads_them():
  q_1THC, layer = _call(16, stored=jnp.int8)
  form = _FORMS['all']
  np.testing.assert_allclose(
    _real(_kernel(q_1THC, layer, form)),
    _real(_reference(q_1THC, layer, form)),
    atol=2e-6,
  )


def test_slots_beyond_a_context_are_not_read():
  """Infinities of another sequence, left in a page, must not leak."""
  q_1THC, layer = _call(16)
  expected = _kernel(q_1THC, layer, _FORMS['plain'])
  # Nobody's page, those beyond position 150 of the second sequence, and what is
  # left of the page of that position.
  kv_PQYC = layer.pages.kv_PQYC.at[0].set(jnp.nan)
  kv_PQYC = kv_PQYC.at[layer.decode_table_DL[1, 10:]].set(jnp.nan)
  kv_PQYC = kv_PQYC.at[layer.decode_table_DL[1, 9], 7:].set(jnp.inf)
  poisoned = layer._replace(pages=kv_cache.Pages(kv_PQYC))
  out = _kernel(q_1THC, poisoned, _FORMS['plain'])
  np.testing.assert_array_equal(out, expected)


@pytest.mark.slow
def test_page_size_and_neighbours_leave_every_bit_with_one_split():
  q_1THC, layer = _call(64)
  expected = np.asarray(_kernel(q_1THC, layer, _FORMS['plain']))
  # The same slots in pages a fourth of the size.
  pages = layer.pages.kv_PQYC
  small = kv_cache.PagedLayer(
    kv_cache.Pages(pages.reshape(-1, 16, *pages.shape[2:])),
    *(
      (4 * table[:, :, None] + jnp.arange(4)[None, None]).reshape(
        table.shape[0], -1
      )
      for table in layer[1:]
    ),
  )
  out = _kernel(q_1THC, small, _FORMS['plain'])
  np.testing.assert_array_equal(out, expected)
  alone = paged_gpu.attend(
    q_1THC[:, 1:2],
    layer._replace(
      decode_table_DL=layer.decode_table_DL[1:2],
      chunk_table_XL=layer.chunk_table_XL[:0],
    ),
    _positions()[:, 1:2],
    _FORMS['plain'],
    num_splits=1,
    interpret=True,
  )
  np.testing.assert_array_equal(alone[0, 0], expected[0, 1])


@pytest.mark.parametrize(
  ('num_programs', 'num_slots', 'expected'),
  [
    (8, 8192, 32),  # one sequence: as many as there is work for
    (8, 65536, 33),  # or as keep a GPU busy
    (256, 8192, 2),
    (512, 8192, 1),
    (8, 255, 1),  # a short context is nobody's to share
  ],
)
def test_splits_follow_from_shapes(num_programs, num_slots, expected):
  assert paged_gpu.splits(num_programs, num_slots) == expected


def test_a_dense_cache_is_attended_as_ever():
  k_BKSC = jax.random.normal(jax.random.key(0), (1, 2, 8, 16))
  q_BTHC = jax.random.normal(jax.random.key(1), (1, 3, 4, 16))
  slots_BT = jnp.asarray([[2, 3, 4]])
  out = paged_gpu.attend(
    q_BTHC, kv_cache.LayerCache(k_BKSC, k_BKSC), slots_BT, form_lib.Form()
  )
  expected = dense.attend(q_BTHC, k_BKSC, k_BKSC, slots_BT=slots_BT)
  np.testing.assert_array_equal(out, expected)


@pytest.mark.parametrize(
  ('fields', 'message'),
  [
    ({'channels': 264}, 'got model.head_width = 264, expected at most 256'),
    ({'dtype': jnp.float8_e4m3fn}, 'got queries in float8_e4m3fn and pages in'),
    ({'stored': jnp.int16}, 'got queries in float32 and pages in int16, expec'),
  ],
)
def test_what_the_kernel_cannot_do_is_refused(fields, message):
  q_1THC, layer = _call(64, **fields)
  with pytest.raises(ValueError, match=message):
    paged_gpu.attend(q_1THC, layer, _positions(), form_lib.Form())


def test_a_pool_of_int8_that_addresses_would_wrap_in_is_refused():
  def problem(num_pages):
    pool = jax.ShapeDtypeStruct((num_pages, 64, 16, 128), jnp.int8)
    scale = jax.ShapeDtypeStruct(pool.shape[:3], jnp.float32)
    table = jax.ShapeDtypeStruct((1, 4), jnp.int32)
    layer = kv_cache.PagedLayer(kv_cache.Pages(pool, scale), table, table)
    q_1THC = jax.ShapeDtypeStruct((1, 2, 16, 128), jnp.bfloat16)
    return supports.problem(
      supports.PAGED_GPU, supports.of_call(q_1THC, layer, form_lib.Form())
    )

  assert problem(2**14 - 1) == ''
  assert 'got 2147483648 numbers in a pool of int8' in problem(2**14)
  assert problem(2**15 + 1) == ''


def test_the_kernel_on_a_gpu_that_is_here():
  try:
    gpu = jax.devices('gpu')[0]
  except RuntimeError:
    pytest.skip('no GPU; where there is one, set JAX_PLATFORMS=cuda,cpu')
  for dtype, tolerance in (
    (jnp.float32, 1e-5),  # sums in another order, and fast exponentials
    (jnp.bfloat16, 0.02),  # weights, results and scaled queries in 8 bits
  ):
    with jax.default_device(gpu):
      q_1THC, layer = _call(16, 64, dtype)
      for form in _FORMS.values():
        out = paged_gpu.attend(q_1THC, layer, _positions(), form)
        expected = _reference(q_1THC, layer, form)
        np.testing.assert_allclose(_real(out), _real(expected), atol=tolerance)


# Compiled for a GPU that is not here.


@pytest.mark.slow
@pytest.mark.parametrize(
  ('dtype', 'stored', 'channels', 'page_size', 'name'),
  [
    (jnp.bfloat16, None, 128, 16, 'plain'),
    (jnp.bfloat16, None, 64, 1, 'all'),
    (jnp.bfloat16, jnp.int8, 80, 64, 'all'),
    (jnp.bfloat16, None, 256, 64, 'plain'),
    (jnp.float16, None, 64, 16, 'plain'),
    (jnp.float32, None, 64, 16, 'all'),
  ],
)
def test_it_compiles_for_an_h100(dtype, stored, channels, page_size, name):
  call = jax.eval_shape(lambda: _call(page_size, channels, dtype, stored))
  attend = functools.partial(paged_gpu.attend, form=_FORMS[name])
  positions_1T = jax.eval_shape(_positions)
  compiled = absent_devices.compile('h100:1', attend, *call, positions_1T)
  assert compiled.memory_analysis().output_size_in_bytes > 0


@pytest.mark.slow
def test_a_model_compiles_for_an_h100_and_writes_its_pages_in_place():
  config = tiny_models.llama_like(model_width=64, head_width=64, mlp_width=64)
  absent_devices.check_pages_are_updated_in_place(
    'h100:1',
    config,
    paged_gpu.attend,
    jax.eval_shape(_positions),
    jax.eval_shape(lambda: _call(16)[1][1:]),
    num_pages=1024,
  )
