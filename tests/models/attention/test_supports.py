"""The table of attention: refusals name their field, claims are true."""

import dataclasses
import functools
import math

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from models import invariant, kv_cache
from models.attention import (
  cached,
  cudnn_gpu,
  dense,
  form as form_lib,
  paged,
  paged_gpu,
  paged_tpu,
  splash_tpu,
  supports,
)
from parallel import mesh as mesh_lib, parallel_config
from parallel.attention import context
from tests.helpers import tiny_models

PATHS = {
  name: path
  for name, path in vars(supports).items()
  if isinstance(path, supports.Path)
}
Request = supports.Request
Form = form_lib.Form
FORMS = {
  'window': Form(window=40),
  'softcap': Form(softcap=0.5),
  'scale': Form(scale=0.9),
}


def _pages(**fields):
  """Returns a request over pages; without `fields`, every kernel accepts it."""
  return Request(
    **{
      'num_heads': 8,
      'num_kv_heads': 4,
      'head_width': 128,
      'dtype': 'bfloat16',
      'page_dtype': 'bfloat16',
      'page_width': 128,
    }
    | fields
  )


# Of each capability: the field of `Path`, whether a path claims it, a request
# for it, and what a refusal has to name.
CAPABILITIES = [
  *(
    ('form', lambda path, f=field: f in path.form, Request(form=form), name)
    for (field, form), name in zip(
      FORMS.items(),
      (
        'model.window = 40',
        'model.attention_softcap = 0.5',
        'model.query_scale = 0.9',
      ),
      strict=True,
    )
  ),
  (
    'platforms',
    lambda path: not path.platforms,
    Request(platform='cpu'),
    'devices of platform cpu',
  ),
  (
    'has_split_rows',
    lambda path: path.has_split_rows,
    Request(context=2, row_length=128),
    'parallel.context = 2',
  ),
  (
    'row_parts',
    lambda path: False,
    Request(context=2, row_length=6),
    'parallel.context = ',
  ),
  (
    'heads',
    lambda path: path.heads == 'any',
    Request(num_heads=6, num_kv_heads=2, tensor=4),
    'model.num_heads = 6',
  ),
  (
    'heads',
    lambda path: path.heads != 'whole',
    Request(num_heads=8, num_kv_heads=2, tensor=4),
    'model.num_kv_heads = 2',
  ),
  (
    'has_dropout',
    lambda path: path.has_dropout,
    Request(has_dropout=True),
    'model.dropout_rate',
  ),
  (
    'has_segments',
    lambda path: path.has_segments,
    Request(has_segments=True),
    'segment ids',
  ),
  (
    'has_latent',
    lambda path: path.has_latent,
    Request(latent_width=16),
    'model.latent_width = 16',
  ),
  (
    'has_latent',
    lambda path: path.has_latent,
    Request(head_width=8, value_width=4),
    'values of 4 channels for keys of 8',
  ),
  (
    'has_int8',
    lambda path: path.has_int8,
    _pages(page_dtype='int8'),
    'pages in int8',
  ),
  (
    'dtypes',
    lambda path: not path.dtypes or 'float16' in path.dtypes,
    Request(dtype='float16'),
    'config.compute_dtype = float16',
  ),
  (
    'has_mixed_dtypes',
    lambda path: (
      path.has_mixed_dtypes and (not path.dtypes or 'float32' in path.dtypes)
    ),
    _pages(page_dtype='float32'),
    'queries in bfloat16 and pages in float32',
  ),
  (
    'head_width_multiple',
    lambda path: 12 % path.head_width_multiple == 0,
    Request(head_width=12),
    'model.head_width = 12',
  ),
  (
    'max_head_width',
    lambda path: not path.max_head_width,
    Request(head_width=512),
    'model.head_width = 512',
  ),
  (
    'row_multiple',
    lambda path: path.row_multiple == 1,
    Request(row_length=101),
    'rows of 101 tokens',
  ),
  (
    'page_width',
    lambda path: not path.page_width,
    _pages(page_width=64, head_width=64),
    'pages of 64',
  ),
  (
    'heads_of_pages',
    lambda path: not path.heads_of_pages,
    _pages(num_heads=6, num_kv_heads=3),
    '3 key/value heads',
  ),
  (
    'int8_pool_gap',
    lambda path: path.has_int8 and not path.int8_pool_gap[1],
    _pages(page_dtype='int8', pool_size=2**31),
    'pool of int8|pages in int8',
  ),
  (
    'max_table_entries',
    lambda path: not path.max_table_entries,
    _pages(page_size=16, table_sequences=256, table_pages=1024),
    'a table of 256 sequences',
  ),
]


@pytest.mark.parametrize('path', PATHS.values(), ids=PATHS)
@pytest.mark.parametrize(
  ('field', 'is_claimed', 'request_', 'named'),
  CAPABILITIES,
  ids=[f'{field}-{named}' for field, _, _, named in CAPABILITIES],
)
def test_a_capability_is_claimed_or_refused_by_name(
  field, is_claimed, request_, named, path
):
  del field
  if path.platforms and not request_.platform:
    request_ = dataclasses.replace(request_, platform=path.platforms[0])
  refusal = supports.problem(path, request_)
  if is_claimed(path):
    assert not refusal
  else:
    assert any(name in refusal for name in named.split('|'))
    assert refusal.startswith('got ')
    assert ', expected ' in refusal
    assert refusal.endswith(path.otherwise)


def test_every_column_of_the_table_is_tested():
  columns = {field.name for field in dataclasses.fields(supports.Path)}
  tested = {field for field, *_ in CAPABILITIES}
  assert tested == columns - {'name', 'otherwise'}
  assert set(FORMS) == {field.name for field in dataclasses.fields(Form)}


@pytest.mark.parametrize('path', PATHS.values(), ids=PATHS)
def test_a_new_rule_of_scores_is_refused_until_a_row_names_it(path):
  @dataclasses.dataclass(frozen=True)
  class Sloped(Form):
    slope: float = 0.0

  assert not supports.problem(path, Request(form=Sloped()))
  refusal = supports.problem(path, Request(form=Sloped(slope=0.5)))
  assert 'got model.slope = 0.5, expected 0.0' in refusal
  path = dataclasses.replace(path, form=(*path.form, 'slope'))
  assert not supports.problem(path, Request(form=Sloped(slope=0.5)))


def test_the_request_of_a_model_has_its_form():
  model = tiny_models.llama_like(
    window=4, layer_pattern='gl', attention_softcap=3.0, query_scale=0.2
  )
  expected = Form(window=4, softcap=3.0, scale=0.2)
  assert supports.of_model(model).form == expected
  assert form_lib.of_layer(model, is_local=False) == dataclasses.replace(
    expected, window=0
  )


# Claims, against NumPy.

TIME, HEADS, KV_HEADS, CHANNELS = 128, 4, 2, 8


def _inputs(value_width=CHANNELS):
  rng = np.random.default_rng(0)
  return [
    rng.normal(size=shape).astype(np.float32)
    for shape in (
      (2, TIME, HEADS, CHANNELS),
      (2, KV_HEADS, TIME, CHANNELS),
      (2, KV_HEADS, TIME, value_width),
    )
  ]


def _expected(q_BTHC, k_BKTC, v_BKTC, segments_BT=None, form=Form()):
  """Returns attention by its definition, in float64."""
  k_BHTC, v_BHTC = (
    np.repeat(x.astype(np.float64), HEADS // KV_HEADS, axis=1)
    for x in (k_BKTC, v_BKTC)
  )
  scores = np.einsum('BTHC,BHSC->BHTS', q_BTHC.astype(np.float64), k_BHTC)
  scores *= 1 / math.sqrt(CHANNELS) if form.scale is None else form.scale
  if form.softcap:
    scores = form.softcap * np.tanh(scores / form.softcap)
  distance = np.arange(TIME)[:, None] - np.arange(TIME)[None, :]
  mask = (distance >= 0) & (distance < (form.window or TIME))
  mask = mask[None, None]
  if segments_BT is not None:
    same = segments_BT[:, :, None] == segments_BT[:, None, :]
    mask = mask & same[:, None]
  weights = np.where(mask, np.exp(scores), 0)
  weights /= weights.sum(-1, keepdims=True)
  return np.einsum('BHTS,BHSC->BTHC', weights, v_BHTC)


def _split(kind, q, k, v, *, segment_ids_BT=None, form=Form()):
  mesh = mesh_lib.make_mesh(
    parallel_config.ParallelConfig(data=2, context=2, tensor=2)
  )
  order = context.balanced_order(TIME, 2)
  segments = None if segment_ids_BT is None else segment_ids_BT[:, order]
  out = jax.jit(functools.partial(context.make_attend(mesh, kind), form=form))(
    q[:, order], k[:, :, order], v[:, :, order], segment_ids_BT=segments
  )
  return out[:, np.argsort(order)]


def _dense_cache(attend, q, k, v, *, form=Form()):
  positions = jnp.tile(jnp.arange(TIME), (2, 1))
  return attend(q, kv_cache.LayerCache(k, v), positions, form)


def _paged_cache(
  attend, q, k, v, *, form=Form(), width=CHANNELS, length=TIME, is_int8=False
):
  """Returns attention with every sequence as one chunk, in pages of 64.

  Tokens from `length` on are padding of the chunk.
  """
  kv = np.stack([x.swapaxes(1, 2) for x in (k, v)], axis=3)
  kv = kv.reshape(4, 64, 2 * KV_HEADS, CHANNELS)
  kv = np.pad(kv, ((1, 0), (0, 0), (0, 0), (0, width - CHANNELS)))
  pages = kv_cache.Pages(jnp.asarray(kv))
  if is_int8:
    pages = kv_cache.Pages(*kv_cache.quantize(pages.kv_PQYC))
  layer = kv_cache.PagedLayer(
    pages,
    jnp.zeros((0, 2), jnp.int32),
    jnp.asarray([[1, 2], [3, 4]], jnp.int32),
  )
  place = jnp.arange(TIME)
  positions = jnp.tile(jnp.where(place < length, place, -1), 2)[None]
  out = attend(q.reshape(1, 2 * TIME, HEADS, CHANNELS), layer, positions, form)
  return out.reshape(q.shape)


def _latent_pages(attend, q, kv_B1TC, *, form=Form()):
  """As `_paged_cache`, of one head whose keys are its values."""
  kv = np.pad(kv_B1TC.reshape(4, 64, 1, CHANNELS), ((1, 0), *[(0, 0)] * 3))
  layer = kv_cache.PagedLayer(
    kv_cache.Pages(jnp.asarray(kv)),
    jnp.zeros((0, 2), jnp.int32),
    jnp.asarray([[1, 2], [3, 4]], jnp.int32),
  )
  positions = jnp.tile(jnp.arange(TIME), 2)[None]
  out = attend(q.reshape(1, 2 * TIME, HEADS, CHANNELS), layer, positions, form)
  return out.reshape(q.shape)


RUN = {
  'DENSE': dense.attend,
  'SPLASH': functools.partial(splash_tpu.attend, interpret=True),
  'CUDNN': functools.partial(cudnn_gpu.attend, implementation='xla'),
  'RING': functools.partial(_split, 'ring'),
  'GATHER': functools.partial(_split, 'gather'),
  'CACHED': functools.partial(_dense_cache, cached.attend),
  'PAGED': functools.partial(_paged_cache, paged.attend),
  'PAGED_TPU': functools.partial(
    _paged_cache,
    functools.partial(paged_tpu.attend, implementation='reference'),
    width=supports.LANES,
  ),
  'PAGED_GPU': functools.partial(
    _paged_cache, functools.partial(paged_gpu.attend, interpret=True)
  ),
  'INVARIANT': functools.partial(_dense_cache, invariant.attend_cached),
}


@pytest.mark.parametrize(
  ('name', 'field'),
  [(name, field) for name, path in PATHS.items() for field in path.form],
)
def test_a_path_computes_the_form_that_it_claims(name, field):
  inputs, form = _inputs(), FORMS[field]
  expected = _expected(*inputs, form=form)
  assert np.abs(expected - _expected(*inputs)).max() > 0.1  # it matters
  got = RUN[name](*map(jnp.asarray, inputs), form=form)
  # Float32 sums of 128 terms below 4, in any order.
  np.testing.assert_allclose(got, expected, atol=2e-5)


@pytest.mark.parametrize(
  'name', [name for name, path in PATHS.items() if path.has_segments]
)
def test_a_path_keeps_documents_apart_where_it_claims_to(name):
  inputs = _inputs()
  segments = np.stack([np.repeat([1, 2], [50, 78]), np.repeat([1, 2], 64)])
  got = RUN[name](
    *map(jnp.asarray, inputs), segment_ids_BT=jnp.asarray(segments)
  )
  np.testing.assert_allclose(got, _expected(*inputs, segments), atol=2e-5)


@pytest.mark.parametrize('name', ['DENSE', 'RING', 'GATHER', 'CACHED'])
def test_a_path_takes_values_of_another_width_where_it_claims_to(name):
  assert PATHS[name].has_latent
  inputs = _inputs(value_width=4)
  got = RUN[name](*map(jnp.asarray, inputs))
  np.testing.assert_allclose(got, _expected(*inputs), atol=2e-5)


# Tokens that are not finite, and the queries that do not see them.

CUT = 70  # tokens from here on are not finite, or those before


def _spoilt(x, tokens, value):
  """Returns [B, K, T, C] or [B, T, H, C] with `value` in some numbers."""
  x = x.copy()
  axis = 1 if x.shape[1] == TIME else 2
  x.swapaxes(1, axis)[:, tokens, :, ::3] = value
  return x


def _assert_unspoilt(run, inputs, tokens, free, value, spoils=(1, 2)):
  """Asserts that queries `free` of spoilt tokens give the bits of zeros.

  Args:
    run: attention of a list of arrays.
    inputs: queries, then keys and values.
    tokens: that are spoilt.
    free: the queries that see none of them.
    value: NaN or infinity.
    spoils: indices of the inputs that are spoilt.
  """
  got, expected = (
    np.asarray(
      run(
        *(
          jnp.asarray(_spoilt(x, tokens, each) if n in spoils else x)
          for n, x in enumerate(inputs)
        )
      )
    )
    for each in (value, 0.0)
  )
  assert np.isfinite(expected).all()
  np.testing.assert_array_equal(got[:, free], expected[:, free])
  return got


CAUSAL = slice(CUT, None), slice(None, CUT)  # spoilt tokens, free queries


@pytest.mark.parametrize('value', [np.nan, np.inf])
@pytest.mark.parametrize('name', PATHS)
def test_what_no_query_sees_never_enters_a_sum(name, value):
  run = RUN[name]
  if name == 'PAGED_TPU':  # its kernel guards the end of a sequence only
    run = functools.partial(run, length=CUT)
  # The values alone, too: a key that is not finite may hide them.
  for spoils in ((1, 2), (2,)):
    got = _assert_unspoilt(run, _inputs(), *CAUSAL, value, spoils)
    if name != 'PAGED_TPU':  # queries that do see them say so
      assert np.isnan(got[:, CUT:]).any((2, 3)).all()


@pytest.mark.parametrize(
  'name', [name for name, path in PATHS.items() if 'window' in path.form]
)
def test_what_a_window_has_left_behind_never_enters_a_sum(name):
  if name == 'PAGED_TPU':
    return  # its kernel adds the mask to the scores
  form = Form(window=40)
  run = functools.partial(RUN[name], form=form)
  tokens, free = slice(None, 20), slice(59, None)
  got = _assert_unspoilt(run, _inputs(), tokens, free, np.nan)
  assert np.isnan(got[:, :59]).any((2, 3)).all()


@pytest.mark.parametrize(
  'name', [name for name, path in PATHS.items() if path.has_segments]
)
@pytest.mark.parametrize('is_first', [True, False])
def test_a_document_that_is_not_finite_leaves_the_others_alone(name, is_first):
  segments = jnp.asarray(np.repeat([[1, 2]] * 2, [CUT, TIME - CUT], axis=1))
  run = functools.partial(RUN[name], segment_ids_BT=segments)
  parts = CAUSAL if not is_first else CAUSAL[::-1]
  got = _assert_unspoilt(run, _inputs(), *parts, np.nan, (0, 1, 2))
  assert np.isnan(got[:, parts[0]]).any((2, 3)).all()

  def gradients(*inputs):
    def total(*inputs):
      return jnp.sum(jnp.sin(run(*inputs)[:, parts[1]]))

    return jax.tree.map(np.asarray, jax.grad(total, (0, 1, 2))(*inputs))

  got, expected = (
    gradients(*(jnp.asarray(_spoilt(x, parts[0], v)) for x in _inputs()))
    for v in (np.nan, 0.0)
  )
  for ours, theirs, axis in zip(got, expected, (1, 2, 2), strict=True):
    np.testing.assert_array_equal(
      ours.swapaxes(1, axis)[:, parts[1]], theirs.swapaxes(1, axis)[:, parts[1]]
    )
    assert np.abs(theirs).max() > 0.1


@pytest.mark.parametrize(
  'name',
  [name for name, path in PATHS.items() if path.has_int8],
)
def test_pages_in_int8_that_no_query_sees_never_enter_a_sum(name):
  # The scale of such a vector is not finite.
  attend = {
    'PAGED': paged.attend,
    'PAGED_GPU': functools.partial(paged_gpu.attend, interpret=True),
    'INVARIANT': invariant.attend_cached,
  }[name]
  run = functools.partial(_paged_cache, attend, is_int8=True)
  got = _assert_unspoilt(run, _inputs(), *CAUSAL, np.nan)
  assert np.isnan(got[:, CUT:]).any((2, 3)).all()


@pytest.mark.parametrize('is_paged', [True, False])
@pytest.mark.parametrize(
  'attend', [cached.attend, invariant.attend_cached], ids=['fast', 'invariant']
)
def test_latents_that_no_query_sees_never_enter_a_sum(attend, is_paged):
  q, k, _ = _inputs()
  positions = jnp.tile(jnp.arange(TIME), (2, 1))

  def dense_latents(q, kv):
    return attend(q, kv_cache.LatentCache(kv), positions, Form())

  run = functools.partial(_latent_pages, attend) if is_paged else dense_latents
  got = _assert_unspoilt(run, [q, k[:, :1]], *CAUSAL, np.nan)
  assert np.isnan(got[:, CUT:]).any((2, 3)).all()


def test_a_row_that_sees_nothing_yet_adds_no_huge_numbers():
  # Finite, but their sum is not: 64 of them beside a weight of 1.
  q, k, v = _inputs()
  v[:, :, :64] = 3e38
  got = RUN['PAGED'](*map(jnp.asarray, (q, k, v)), form=Form(window=40))
  assert np.isfinite(got[:, 103:]).all()
