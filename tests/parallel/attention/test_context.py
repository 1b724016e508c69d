"""Context parallelism: attention of split rows equals that of whole rows."""

import functools
import math

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from models import execution, transformer
from models.attention import dense, form as form_lib
from parallel import mesh as mesh_lib, parallel_config, rules
from parallel.attention import context, partial
from tests.helpers import tiny_models

KINDS = ('ring', 'gather')
BATCH, TIME, CHANNELS = 4, 48, 6


def _mesh(**sizes):
  return mesh_lib.make_mesh(
    parallel_config.ParallelConfig(**({'data': 1} | sizes))
  )


def _inputs(num_heads=4, num_kv=2, dtype=jnp.float32):
  """Returns q, k, v, and the cotangent of the output, of TIME tokens."""
  keys = jax.random.split(jax.random.key(0), 4)
  q_shape = BATCH, TIME, num_heads, CHANNELS
  kv_shape = BATCH, num_kv, TIME, CHANNELS
  shapes = q_shape, kv_shape, kv_shape, q_shape
  return [
    jax.random.normal(key, shape, dtype)
    for key, shape in zip(keys, shapes, strict=True)
  ]


def _segments(num_segments=3, num_padding=5):
  return tiny_models.batch(
    batch_size=BATCH,
    row_length=TIME,
    num_segments=num_segments,
    num_padding=num_padding,
  )['segment_ids']


def _run(attend, q, k, v, dout, segments, form=form_lib.Form()):
  """Returns the output and the three gradients, all as float32."""

  def loss(q, k, v):
    out = attend(q, k, v, segment_ids_BT=segments, dropout=None, form=form)
    total = jnp.sum((out * dout).astype(jnp.float32))
    return total, out

  grads, out = jax.jit(jax.grad(loss, (0, 1, 2), has_aux=True))(q, k, v)
  assert {x.dtype for x in (out, *grads)} == {q.dtype}
  return [np.asarray(x, np.float32) for x in (out, *grads)]


def _run_split(mesh, kind, q, k, v, dout, segments, form=form_lib.Form()):
  """As `_run`, over the mesh; permutes arguments, and results back."""
  order = context.balanced_order(TIME, mesh.shape['context'])
  back = np.argsort(order)
  with rules.applied(mesh):
    out, dq, dk, dv = _run(
      context.make_attend(mesh, kind),
      q[:, order],
      k[:, :, order],
      v[:, :, order],
      dout[:, order],
      None if segments is None else segments[:, order],
      form,
    )
  return [out[:, back], dq[:, back], dk[:, :, back], dv[:, :, back]]


@pytest.mark.fast_cases(2)
@pytest.mark.parametrize('kind', KINDS)
@pytest.mark.parametrize(
  ('sizes', 'num_heads', 'num_kv', 'segments'),
  [
    ({'context': 8}, 4, 2, (3, 5)),  # packed and padded, grouped queries
    ({'context': 8}, 3, 1, None),  # one document, multi-query
    ({'data': 4, 'context': 2}, 3, 3, (1, 40)),  # devices of padding alone
    pytest.param(
      *({'data': 2, 'context': 2, 'tensor': 2}, 4, 2, (4, 0)),
      marks=pytest.mark.slow,
    ),
    # Fewer key/value heads than parts: copied. 6 heads, 3 of them: 1 each.
    ({'data': 2, 'context': 2, 'tensor': 2}, 4, 1, (2, 7)),
    pytest.param(
      *({'data': 2, 'context': 2, 'tensor': 2}, 6, 3, (2, 7)),
      marks=pytest.mark.slow,
    ),
  ],
  ids=str,
)
def test_split_attention_is_attention(kind, sizes, num_heads, num_kv, segments):
  inputs = _inputs(num_heads, num_kv)
  segments = None if segments is None else _segments(*segments)
  expected = _run(dense.attend, *inputs, segments)
  got = _run_split(_mesh(**sizes), kind, *inputs, segments)
  for a, b in zip(got, expected, strict=True):
    # Sums of some tens of float32 terms of order one, in another order.
    np.testing.assert_allclose(a, b, atol=5e-6)


@pytest.mark.fast_cases(2)
@pytest.mark.parametrize('kind', KINDS)
@pytest.mark.parametrize(
  'form',
  [
    form_lib.Form(window=7, softcap=1.0, scale=0.6),  # within a part of 12
    form_lib.Form(window=29),  # over several
  ],
  ids=str,
)
def test_windows_soft_caps_and_scales_of_split_rows(kind, form):
  inputs = _inputs()
  expected = _run(dense.attend, *inputs, _segments(), form)
  mesh = _mesh(data=4, context=2)
  got = _run_split(mesh, kind, *inputs, _segments(), form)
  for a, b in zip(got, expected, strict=True):
    np.testing.assert_allclose(a, b, atol=5e-6)


@pytest.mark.parametrize('kind', KINDS)
def test_values_may_be_narrower_than_keys(kind):
  q, k, v, dout = _inputs()
  inputs = q, k, v[..., :4], dout[..., :4]
  expected = _run(dense.attend, *inputs, None)
  got = _run_split(_mesh(data=4, context=2), kind, *inputs, None)
  for a, b in zip(got, expected, strict=True):
    np.testing.assert_allclose(a, b, atol=5e-6)


@pytest.mark.parametrize('kind', KINDS)
def test_queries_are_taken_in_tiles(kind, monkeypatch):
  """Several tiles of queries per part, of a size that divides it."""
  monkeypatch.setattr(partial, 'MAX_TILE_ROWS', 5)
  assert partial.num_tiles(12) == 3
  inputs = _inputs()
  got = _run_split(_mesh(data=4, context=2), kind, *inputs, _segments())
  expected = _run(dense.attend, *inputs, _segments())
  for a, b in zip(got, expected, strict=True):
    np.testing.assert_allclose(a, b, atol=5e-6)


@pytest.mark.parametrize('kind', KINDS)
@pytest.mark.parametrize(
  'sizes',
  [
    {'data': 2, 'context': 2, 'tensor': 2},
    pytest.param({'context': 8}, marks=pytest.mark.slow),
    pytest.param({'data': 4, 'context': 2}, marks=pytest.mark.slow),
  ],
  ids=str,
)
def test_bfloat16_is_as_close_as_unsplit_attention(kind, sizes):
  """Both against float32: splitting may not lose precision of bfloat16."""
  inputs = _inputs(dtype=jnp.bfloat16)
  exact_inputs = [x.astype(jnp.float32) for x in inputs]
  exact = _run(dense.attend, *exact_inputs, _segments())
  plain = _run(dense.attend, *inputs, _segments())
  got = _run_split(_mesh(**sizes), kind, *inputs, _segments())
  for a, b, reference in zip(got, plain, exact, strict=True):
    # A bfloat16 has 8 bits: an ulp of the largest result is 2^-8 of it, and
    # each of scores, weights and results is rounded once.
    scale = np.abs(reference).max()
    np.testing.assert_allclose(a, reference, atol=4 * 2**-8 * scale)
    error, plain_error = np.abs([a, b] - reference[None]).mean((1, 2, 3, 4))
    assert error < 1.5 * plain_error


def _dot_flops(jaxpr, repeats=1):
  """Returns the multiply-adds of all products of one device, with loops."""
  total = 0
  for equation in jaxpr.eqns:
    if equation.primitive.name == 'dot_general':
      left = equation.invars[0].aval.shape
      contracted = equation.params['dimension_numbers'][0][0]
      total += repeats * math.prod(
        (*equation.outvars[0].aval.shape, *(left[i] for i in contracted))
      )
    inner = repeats * equation.params.get('length', 1)
    for part in jax.tree.leaves(
      equation.params, is_leaf=lambda x: hasattr(x, 'eqns')
    ):
      part = getattr(part, 'jaxpr', part)
      if hasattr(part, 'eqns'):
        total += _dot_flops(part, inner)
  return total


@pytest.mark.parametrize('num_shards', [2, 4, 8])
def test_masked_halves_are_not_computed(num_shards):
  """The share of the square that is computed, by the products' shapes."""
  mesh = _mesh(data=8 // num_shards, context=num_shards)
  q, k, v, _ = _inputs()
  square = BATCH * TIME**2 * q.shape[2] * CHANNELS / mesh.size
  shares = {}
  for kind in KINDS:
    attend = context.make_attend(mesh, kind)
    forward = _dot_flops(jax.make_jaxpr(attend)(q, k, v).jaxpr)
    gradient = jax.grad(
      lambda q, k, v, attend=attend: jnp.sum(attend(q, k, v)), (0, 1, 2)
    )
    both = _dot_flops(jax.make_jaxpr(gradient)(q, k, v).jaxpr)
    # Two products forward (scores, values), five backward (scores again).
    shares[kind] = forward / (2 * square), (both - forward) / (5 * square)
  ring = (2 * num_shards + 1) / (4 * num_shards)
  assert shares == {'ring': (ring, ring), 'gather': (0.75, 0.75)}


def test_devices_have_the_same_number_of_visible_pairs():
  time, num_shards = 240, 5
  order = context.balanced_order(time, num_shards)
  assert order is not None
  pairs = (order + 1).reshape(num_shards, -1).sum(1)  # token t sees t + 1
  assert set(pairs) == {time * (time + 1) // 2 // num_shards}
  # Contiguous shards would give the last of five devices nine times the first.
  uneven = (np.arange(time) + 1).reshape(num_shards, -1).sum(1)
  assert uneven[-1] > 8 * uneven[0]
  assert sorted(order) == list(range(time))
  assert context.balanced_order(7, 1) is None


def test_what_does_not_divide_is_refused():
  with pytest.raises(
    ValueError,
    match='data.row_length: got 20, expected a multiple of 2 x parallel.context'
    ' = 8; change one of them',
  ):
    context.balanced_order(20, 4)
  mesh = _mesh(data=2, context=4)
  q, k, v, _ = _inputs()
  with pytest.raises(ValueError, match='got 20, expected a multiple of 2 x'):
    context.make_attend(mesh, 'ring')(q[:, :20], k[:, :, :20], v[:, :, :20])
  assert context.kv_repeats(8, 2, 4) == 2
  assert context.kv_repeats(8, 4, 2) == 1
  with pytest.raises(
    ValueError,
    match='parallel.tensor: got 2 with parallel.context > 1 and model.num_heads'
    ', num_kv_heads = 9, 3, expected .* hence of 6; change one of them',
  ):
    context.kv_repeats(9, 3, 2)


def test_what_cannot_be_split_is_refused():
  mesh = _mesh(data=2, context=4)
  q, k, v, _ = _inputs()
  with pytest.raises(
    ValueError, match=r'got dropout .* expected none.*set model.dropout_rate'
  ):
    context.make_attend(mesh, 'ring')(q, k, v, dropout=lambda x: x)
  with pytest.raises(
    ValueError, match="got 'all', expected one of ring, gather"
  ):
    context.make_attend(mesh, 'all')
  with pytest.raises(ValueError, match='got parallel.context = 1, expected'):
    context.make_attend(_mesh(data=8), 'ring')


@pytest.mark.parametrize('kind', KINDS)
def test_a_token_learns_from_what_it_sees_alone(kind):
  """Causality and packing, by gradients through a model of split rows."""
  time, mesh = 16, _mesh(context=8)
  config = tiny_models.llama_like(num_layers=1)
  attend = context.make_attend(mesh, kind)
  model = transformer.Transformer(
    config, execution=execution.Execution(attend=attend)
  )
  plain = transformer.Transformer(config)
  params = jax.jit(plain.init)(jax.random.key(0), jnp.zeros((1, 1), jnp.int32))
  # All tokens differ: a row of the table has the gradient of one token.
  batch = tiny_models.batch(
    batch_size=1, row_length=time, num_segments=2, num_padding=3
  )
  batch['tokens'] = np.arange(time, dtype=np.int32)[None]
  order = context.balanced_order(time, 8)
  placed = {name: x[:, order] for name, x in batch.items()}

  @jax.jit
  def influence_T(params, is_chosen_T):
    def loss(params):
      hidden_BTD, _ = model.apply(
        params,
        placed['tokens'],
        placed['positions'],
        segment_ids_BT=placed['segment_ids'],
        method='hidden',
      )
      return jnp.sum(jnp.sin(hidden_BTD) * is_chosen_T[None, :, None])

    table_VD = jax.grad(loss)(params)['params']['embed']['embedding']
    return jnp.abs(table_VD).max(1)[:time]

  with rules.applied(mesh):
    influence_TT = np.stack(
      [
        influence_T(params, (order == t).astype(np.float32))
        for t in range(time)
      ]
    )
  segments_T = batch['segment_ids'][0]
  is_seen_TT = np.tri(time, dtype=bool) & (segments_T[:, None] == segments_T)
  assert is_seen_TT.sum() == 7 * 8 / 2 + 6 * 7 / 2 + 3 * 4 / 2
  np.testing.assert_array_equal(influence_TT > 0, is_seen_TT)


@pytest.mark.parametrize(('saved_name', 'products'), [('kept', 7), ('', 9)])
def test_what_a_policy_keeps_is_not_computed_again(saved_name, products):
  """Rematerialisation repeats a forward pass unless its result is kept."""
  num_shards = 4
  mesh = _mesh(data=2, context=num_shards)
  q, k, v, _ = _inputs()
  attend = context.make_attend(mesh, 'ring', saved_name)

  def loss(q, k, v):
    return jnp.sum(jnp.sin(attend(q, k, v)))

  policy = jax.checkpoint_policies.save_only_these_names('kept')
  gradient = jax.grad(jax.checkpoint(loss, policy=policy), (0, 1, 2))
  square = BATCH * TIME**2 * q.shape[2] * CHANNELS / mesh.size
  share = (2 * num_shards + 1) / (4 * num_shards)
  found = _dot_flops(jax.make_jaxpr(gradient)(q, k, v).jaxpr)
  assert found == products * share * square


@pytest.mark.parametrize('kind', KINDS)
def test_the_ring_never_holds_a_whole_row(kind):
  """Keys of the full length exist on a device only if they are gathered."""
  mesh = _mesh(data=1, context=8)
  q, k, v, dout = _inputs()
  attend = context.make_attend(mesh, kind)

  def loss(q, k, v):
    return jnp.sum(attend(q, k, v) * dout)

  with rules.applied(mesh):
    gradient = jax.jit(jax.grad(loss, (0, 1, 2)))
    shard = functools.partial(jax.NamedSharding, mesh)
    split = [
      jax.device_put(x, shard(jax.P(*[None] * axis, 'context')))
      for x, axis in ((q, 1), (k, 2), (v, 2))
    ]
    text = gradient.lower(*split).compile().as_text()
  whole = f'f32[{BATCH},2,{TIME},{CHANNELS}]'
  assert (whole in text) == (kind == 'gather')
  assert ('collective-permute' in text) == (kind == 'ring')
