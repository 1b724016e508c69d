"""The table of attention: refusals name their field, claims are true."""

import dataclasses
import math

import jax.numpy as jnp
import numpy as np
import pytest

from models.attention import form as form_lib, supports
from tests.helpers import attention_paths, tiny_models

PATHS, RUN = attention_paths.PATHS, attention_paths.RUN
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
    lambda path: not path.platforms or 'cpu' in path.platforms,
    Request(platform='cpu'),
    'devices of platform cpu',
  ),
  (
    'least_capability',
    lambda path: path.least_capability <= (7, 0),
    Request(capability=(7, 0)),
    'compute capability 7.0',
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

TIME, HEADS = attention_paths.TIME, attention_paths.HEADS
KV_HEADS, CHANNELS = attention_paths.KV_HEADS, attention_paths.CHANNELS
_inputs = attention_paths.inputs


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


@pytest.mark.fast_cases(8)
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
