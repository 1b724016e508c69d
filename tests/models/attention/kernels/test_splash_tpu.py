"""The fused attention kernels against the plain one, values and gradients.

Splash runs interpreted, which needs no TPU; test_ahead_of_time.py compiles it
for TPUs. The cuDNN entry runs its unfused equivalent, with the same operands
and the same mask.
"""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from models.attention import dense, form as form_lib
from models.attention.kernels import cudnn_gpu, splash_tpu

TIME = 256  # two tiles of 128: one of them above the diagonal
KERNELS = {
  'splash': functools.partial(splash_tpu.attend, interpret=True),
  'cudnn': functools.partial(cudnn_gpu.attend, implementation='xla'),
}


def _inputs(heads=4, kv_heads=2, channels=16, dtype=jnp.float32):
  keys = jax.random.split(jax.random.key(0), 4)
  q = jax.random.normal(keys[0], (2, TIME, heads, channels), dtype)
  k, v = (
    jax.random.normal(key, (2, kv_heads, TIME, channels), dtype)
    for key in keys[1:3]
  )
  cotangent = jax.random.normal(keys[3], q.shape, dtype)
  return q, k, v, cotangent


def _packed_segments():
  """Returns documents that cross and meet tile borders, with padding."""
  rows = [
    np.repeat([1, 2, 3], [100, 28, 128]),
    np.repeat([1, 2, 0], [130, 70, 56]),
  ]
  return jnp.array(np.stack(rows), jnp.int32)


@functools.partial(jax.jit, static_argnums=0)
def _value_and_gradients(attend, q, k, v, cotangent, segments):
  out, pull = jax.vjp(
    lambda q, k, v: attend(q, k, v, segment_ids_BT=segments), q, k, v
  )
  return out, *pull(cotangent)


@pytest.fixture
def small_tiles(monkeypatch):
  monkeypatch.setattr(splash_tpu, 'MAX_TILE_ROWS', 128)


@pytest.mark.fast_cases(2)
@pytest.mark.usefixtures('small_tiles')
@pytest.mark.parametrize(
  ('kernel', 'heads', 'kv_heads', 'channels', 'is_packed'),
  [
    ('splash', 4, 2, 16, True),  # grouped queries
    ('splash', 3, 1, 16, True),  # one key/value head
    ('splash', 2, 2, 10, False),  # no segments; a width that is no power of 2
    ('cudnn', 4, 2, 16, True),
    ('cudnn', 2, 2, 10, False),
  ],
)
def test_kernels_equal_plain_attention(
  kernel, heads, kv_heads, channels, is_packed
):
  inputs = _inputs(heads, kv_heads, channels)
  segments = _packed_segments() if is_packed else None
  got = _value_and_gradients(KERNELS[kernel], *inputs, segments)
  expected = _value_and_gradients(dense.attend, *inputs, segments)
  for ours, reference in zip(got, expected, strict=True):
    assert ours.shape == reference.shape
    # float32 sums of up to 256 terms of order one, in another order.
    np.testing.assert_allclose(ours, reference, rtol=2e-5, atol=2e-5)


@pytest.mark.usefixtures('small_tiles')
@pytest.mark.parametrize(
  ('kernel', 'form'),
  [
    ('splash', form_lib.Form(window=90, softcap=1.5, scale=0.4)),
    ('cudnn', form_lib.Form(window=90, scale=0.4)),
  ],
)
def test_kernels_have_windows_soft_caps_and_scales(kernel, form):
  inputs = _inputs(4, 2)
  attends = KERNELS[kernel], dense.attend
  got, expected = (
    _value_and_gradients(
      functools.partial(attend, form=form), *inputs, _packed_segments()
    )
    for attend in attends
  )
  for ours, reference in zip(got, expected, strict=True):
    np.testing.assert_allclose(ours, reference, rtol=2e-5, atol=2e-5)


@pytest.mark.usefixtures('small_tiles')
def test_bfloat16_loses_no_more_than_plain_attention_does():
  inputs = _inputs(dtype=jnp.bfloat16)
  exact = [x.astype(jnp.float32) for x in inputs]
  segments = _packed_segments()
  got = _value_and_gradients(KERNELS['splash'], *inputs, segments)
  plain = _value_and_gradients(dense.attend, *inputs, segments)
  expected = _value_and_gradients(dense.attend, *exact, segments)
  for ours, theirs, reference in zip(got, plain, expected, strict=True):
    assert ours.dtype == jnp.bfloat16
    error, plain_error = (
      float(jnp.linalg.norm(x.astype(jnp.float32) - reference))
      for x in (ours, theirs)
    )
    # Both round operands and results to 8 bits; neither may round more.
    assert error <= 1.5 * plain_error
    assert error <= 2e-2 * float(jnp.linalg.norm(reference))


@pytest.mark.usefixtures('small_tiles')
def test_nothing_flows_between_documents_or_backwards_in_time():
  """The gradients of one token's output are zero for keys it cannot see."""
  q, k, v, _ = _inputs()
  segments = _packed_segments()
  probe = 110  # in the second document of the first row, tokens 100 to 127

  def one_output(k, v):
    out = KERNELS['splash'](q, k, v, segment_ids_BT=segments)
    return jnp.sum(out[0, probe])

  for gradient in jax.jit(jax.grad(one_output, (0, 1)))(k, v):
    reaches_T = np.abs(np.asarray(gradient)[0]).max((0, 2)) > 0
    assert reaches_T[100 : probe + 1].all()
    assert not reaches_T[:100].any()
    assert not reaches_T[probe + 1 :].any()
    assert not np.any(np.asarray(gradient)[1])


@pytest.mark.parametrize(
  ('time', 'expected'), [(128, 128), (256, 256), (640, 128), (1536, 512)]
)
def test_tiles_divide_rows(time, expected):
  assert splash_tpu.tile_rows(time) == expected


@pytest.mark.parametrize(
  ('attend', 'fields', 'message'),
  [
    (
      splash_tpu.attend,
      {'time': 100},
      'got rows of 100 tokens, expected a mult',
    ),
    (splash_tpu.attend, {'dropout': lambda x: x}, 'got dropout of attention'),
    (cudnn_gpu.attend, {'dropout': lambda x: x}, 'got dropout of attention'),
    (
      cudnn_gpu.attend,
      {},
      'got config.compute_dtype = float32, expected bfloat16',
    ),
    (
      cudnn_gpu.attend,
      {'channels': 12, 'dtype': jnp.bfloat16},
      'got model.head_width = 12, expected a multiple of 8 up to 128',
    ),
    (
      cudnn_gpu.attend,
      {'time': 129, 'dtype': jnp.bfloat16},
      'got rows of 129 tokens, expected a multiple of 2',
    ),
  ],
)
def test_what_a_kernel_cannot_do_is_refused(attend, fields, message):
  fields = {
    'time': 128, 'channels': 8, 'dtype': jnp.float32, 'dropout': None
  } | fields  # fmt: skip
  q = jnp.ones((1, fields['time'], 2, fields['channels']), fields['dtype'])
  kv = q.swapaxes(1, 2)
  with pytest.raises(ValueError, match=message):
    attend(q, kv, kv, dropout=fields['dropout'])


def test_cudnn_refuses_soft_caps_and_values_of_another_width():
  q = jnp.ones((1, 128, 2, 8), jnp.bfloat16)
  kv = q.swapaxes(1, 2)
  with pytest.raises(ValueError, match='model.attention_softcap = 2.0, expect'):
    cudnn_gpu.attend(q, kv, kv, form=form_lib.Form(softcap=2.0))
  with pytest.raises(ValueError, match='values of 4 channels for keys of 8'):
    cudnn_gpu.attend(q, kv, kv[..., :4])
