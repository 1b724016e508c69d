"""JAX's paged attention for TPU: its arguments, and that it compiles.

The kernel does not run interpreted. JAX's own reference of it does, from the
same arguments; its result is compared with the reference in plain JAX.
"""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from models import kv_cache
from models.attention import cached, form as form_lib, paged
from models.attention.kernels import paged_tpu
from tests.helpers import absent_devices, tiny_models

_NUM_KV, _GROUPS = 2, 3
_SLOTS = 192
_ROWS = 24
# Two decoding sequences and an idle one; a chunk in the middle of a context,
# one that begins it and ends early, one whose padding would end past its last
# page, and one that is all padding.
_DECODES = (0, 150, -1)
_BLOCKS = ((100, 24), (0, 5), (180, 12), (-1, 0))
V5E, V5P = 'v5e:1x1', 'v5p:1x1x1'


def _positions():
  rows = [
    np.where(np.arange(_ROWS) < count, start + np.arange(_ROWS), -1)
    for start, count in _BLOCKS
  ]
  return jnp.asarray(np.concatenate([_DECODES, *rows])[None], jnp.int32)


def _call(page_size=16, channels=128, dtype=jnp.float32, width=128):
  """Returns queries of a mixed call, and a pool whose slots are all full."""
  rng = np.random.default_rng(0)
  num_sequences = len(_DECODES) + len(_BLOCKS)
  per_sequence = _SLOTS // page_size
  num_pages = num_sequences * per_sequence + 1
  shape = num_pages, page_size, 2 * _NUM_KV, channels
  kv_PQYC = jnp.pad(
    jnp.asarray(rng.normal(size=shape), dtype),
    [(0, 0)] * 3 + [(0, width - channels)],
  )
  tables = 1 + rng.permutation(num_pages - 1).reshape(num_sequences, -1)
  # Who has no tokens has no pages either.
  tables[len(_DECODES) - 1] = tables[-1] = 0
  tables = jnp.asarray(tables, jnp.int32)
  layer = kv_cache.PagedLayer(
    kv_cache.Pages(kv_PQYC), tables[: len(_DECODES)], tables[len(_DECODES) :]
  )
  shape = 1, _positions().shape[1], _NUM_KV * _GROUPS, channels
  return jnp.asarray(rng.normal(size=shape), dtype), layer


def _real(out_1THC, positions_1T=None):
  positions_1T = _positions() if positions_1T is None else positions_1T
  return np.asarray(out_1THC, np.float32)[np.asarray(positions_1T) >= 0]


@pytest.mark.slow
@pytest.mark.parametrize(
  ('page_size', 'form'),
  [
    (16, form_lib.Form()),
    (64, form_lib.Form(window=70, softcap=2.0, scale=0.05)),
    (1, form_lib.Form(window=3, scale=0.05)),
  ],
)
def test_the_kernel_is_asked_for_what_the_reference_gives(page_size, form):
  q_1THC, layer = _call(page_size)
  out = paged_tpu.attend(
    q_1THC, layer, _positions(), form, implementation='reference'
  )
  expected = paged.attend(q_1THC, layer, _positions(), form)
  assert np.isfinite(np.asarray(out)).all()  # padding means nothing, harms none
  # Scores are float32 sums of 128 terms, some 10 large, and then exponents.
  np.testing.assert_allclose(_real(out), _real(expected), atol=1e-5)


@pytest.mark.parametrize('kind', ['decodes', 'chunks'])
def test_calls_of_one_kind(kind):
  q_1THC, layer = _call()
  num_decodes = len(_DECODES)
  if kind == 'decodes':
    tokens = slice(None, num_decodes)
    layer = layer._replace(chunk_table_XL=layer.chunk_table_XL[:0])
  else:
    tokens = slice(num_decodes, None)
    layer = layer._replace(decode_table_DL=layer.decode_table_DL[:0])
  args = q_1THC[:, tokens], layer, _positions()[:, tokens], form_lib.Form()
  out = paged_tpu.attend(*args, implementation='reference')
  np.testing.assert_allclose(
    _real(out, args[2]),
    _real(paged.attend(*args), args[2]),
    atol=1e-5,  # as above
  )


def test_heads_narrower_than_their_pages():
  q_1THC, layer = _call(channels=64)
  exact = layer._replace(pages=kv_cache.Pages(layer.pages.kv_PQYC[..., :64]))
  form = form_lib.Form()  # its scale is of 64 channels, not of 128
  out = paged_tpu.attend(
    q_1THC, layer, _positions(), form, implementation='reference'
  )
  expected = paged.attend(q_1THC, exact, _positions(), form)
  assert out.shape == q_1THC.shape
  np.testing.assert_allclose(_real(out), _real(expected), atol=1e-5)


def test_a_calls_tokens_as_sequences():
  _, layer = _call()
  lengths_B, table_BL, ends, count = paged_tpu.sequences(layer, _positions()[0])
  # Up to the last token; an idle one has a slot nevertheless.
  np.testing.assert_array_equal(lengths_B, [1, 151, 1, 124, 5, 192, 1])
  np.testing.assert_array_equal(ends, [0, 1, 2, 3, 27, 51, 75, 99])
  np.testing.assert_array_equal(
    table_BL, np.concatenate([layer.decode_table_DL, layer.chunk_table_XL])
  )
  assert count.tolist() == [7]


def test_slots_that_were_never_written_enter_no_sum():
  # As their owner before left them.
  q_1THC, layer = _call(16)
  ends = [*_DECODES, *(start + count - 1 for start, count in _BLOCKS)]
  tables = np.concatenate([layer.decode_table_DL, layer.chunk_table_XL])
  clean = np.array(layer.pages.kv_PQYC)
  clean[0] = 0  # the page of those without tokens
  spoilt = clean.copy()
  for table, end in zip(tables, ends, strict=True):
    for position in range(end + 1, _SLOTS if table.any() else 0):
      spoilt[table[position // 16], position % 16] = np.nan
  assert np.isnan(spoilt).any()
  got, expected = (
    paged_tpu.attend(
      q_1THC,
      layer._replace(pages=kv_cache.Pages(jnp.asarray(kv))),
      _positions(),
      form_lib.Form(),
      implementation='reference',
    )
    for kv in (spoilt, clean)
  )
  np.testing.assert_array_equal(_real(got), _real(expected))


@pytest.mark.slow
def test_pages_in_int8_and_dense_caches_are_attended_as_ever():
  q_1THC, layer = _call(channels=16, width=16)
  pages = kv_cache.Pages(*kv_cache.quantize(layer.pages.kv_PQYC))
  dense = kv_cache.LayerCache(
    *jax.random.normal(jax.random.key(0), (2, 1, _NUM_KV, _SLOTS, 16))
  )
  for cache in (layer._replace(pages=pages), dense):
    args = q_1THC, cache, _positions(), form_lib.Form()
    np.testing.assert_array_equal(paged_tpu.attend(*args), cached.attend(*args))


def _shapes(
  heads=8,
  kv_heads=4,
  channels=128,
  width=128,
  dtype=jnp.bfloat16,
  stored=None,
  sequences=8,
  pages=16,
  page_size=16,
):
  pool = 64, page_size, 2 * kv_heads, width
  table = jax.ShapeDtypeStruct((sequences // 2, pages), jnp.int32)
  layer = kv_cache.PagedLayer(
    kv_cache.Pages(jax.ShapeDtypeStruct(pool, stored or dtype)), table, table
  )
  return jax.ShapeDtypeStruct((1, 64, heads, channels), dtype), layer


@pytest.mark.parametrize(
  ('fields', 'message'),
  [
    (
      {'channels': 64, 'width': 64},
      'got heads of 64 channels in pages of 64, expected pages of 128',
    ),
    (
      {'channels': 256, 'width': 256},
      'got heads of 256 channels in pages of 256, expected pages of 128',
    ),
    (
      {'dtype': jnp.float32, 'stored': jnp.bfloat16},
      'got queries in float32 and pages in bfloat16, expected both in',
    ),
    ({'dtype': jnp.float16}, 'got queries in float16 and pages in float16'),
    (
      {'heads': 6, 'kv_heads': 3},
      'got 3 key/value heads in bfloat16, expected 1, 2 or 4, or a multiple',
    ),
    (
      {'kv_heads': 8, 'dtype': jnp.float32},
      'got 8 query heads over 8 key/value heads in float32, of which a tile',
    ),
    (
      {'sequences': 256, 'pages': 1024},
      'got a table of 256 sequences with 1024 pages of 16 tokens each',
    ),
  ],
)
def test_what_the_kernel_cannot_do_is_refused(fields, message):
  q_1THC, layer = _shapes(**fields)
  message = f'ragged paged attention: {message}'
  with pytest.raises(ValueError, match=message):
    paged_tpu.attend(q_1THC, layer, None, form_lib.Form())


@pytest.mark.parametrize(
  ('fields', 'pages', 'rows'),
  [
    ({}, 16, 32),  # no more copies than that in the program
    ({'page_size': 64}, 8, 32),
    ({'page_size': 1024}, 1, 32),
    ({'pages': 4}, 4, 32),
    ({'heads': 128}, 16, 16),
    # Seven query heads each: no part of them fills registers, so a tile has
    # all, and fewer slots.
    ({'heads': 224, 'kv_heads': 32, 'page_size': 32}, 4, 9),
  ],
)
def test_tiles_are_cut_to_on_chip_memory(fields, pages, rows):
  q_1THC, layer = _shapes(**fields)
  sizes = paged_tpu.tile_sizes(64, q_1THC.shape[2], layer)
  assert sizes == {
    'num_kv_pages_per_block': pages,
    'num_queries_per_block': rows,
  }


# Compiled for TPUs that are not here.


@pytest.mark.slow
@pytest.mark.parametrize('target', [V5E, V5P])
@pytest.mark.parametrize(
  ('num_chunks', 'fields', 'form'),
  [
    (0, {}, form_lib.Form()),
    (1, {}, form_lib.Form()),
    (1, {'channels': 64}, form_lib.Form(window=70, softcap=2.0)),
    # As much as is let into on-chip and scalar memory.
    (1, {'heads': 64, 'kv_heads': 8, 'page_size': 32}, form_lib.Form()),
    (1, {'sequences': 240, 'pages': 1024}, form_lib.Form()),
  ],
)
def test_it_compiles_for_tpus(target, num_chunks, fields, form):
  q_1THC, layer = _shapes(**fields)
  num_decodes, width = layer.decode_table_DL.shape
  layer = layer._replace(
    decode_table_DL=jax.ShapeDtypeStruct(
      (2 * num_decodes - num_chunks, width), jnp.int32
    ),
    chunk_table_XL=jax.ShapeDtypeStruct((num_chunks, width), jnp.int32),
  )
  num_tokens = 2 * num_decodes + 31 * num_chunks
  text = absent_devices.compile(
    target,
    functools.partial(paged_tpu.attend, form=form),
    jax.ShapeDtypeStruct((1, num_tokens, *q_1THC.shape[2:]), q_1THC.dtype),
    layer,
    jax.ShapeDtypeStruct((1, num_tokens), jnp.int32),
  ).as_text()
  assert text.count('custom_call_target="tpu_custom_call"') == 1


@pytest.mark.slow
@pytest.mark.parametrize('target', [V5E, V5P])
def test_a_model_compiles_for_tpus_and_writes_its_pages_in_place(target):
  config = tiny_models.llama_like(
    model_width=128, head_width=128, mlp_width=128
  )
  compiled = absent_devices.check_pages_are_updated_in_place(
    target,
    config,
    paged_tpu.attend,
    jax.eval_shape(_positions),
    jax.eval_shape(lambda: _call()[1][1:]),
    num_pages=2048,
  )
  text = compiled.as_text()
  assert text.count('custom_call_target="tpu_custom_call"') == config.num_layers
