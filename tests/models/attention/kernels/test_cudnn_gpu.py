"""cuDNN attention: the documents of packed rows, and XLA's calls of it.

Our calls are compiled ahead of time for an H100, and compared with the calls of
`jax.nn`. Values come from `cudnn_call.interpreted`, which reads the same
operands.
"""

import functools
import json
import re

import jax
from jax._src.cudnn import fused_attention_stablehlo as jax_cudnn
import jax.numpy as jnp
import numpy as np
import pytest

from models import execution, remat, transformer
from models.attention import dense, form as form_lib
from models.attention.kernels import cudnn_call, cudnn_gpu
from tests.helpers import absent_devices, tiny_models

BATCH, TIME, HEADS, KV_HEADS, CHANNELS = 2, 64, 4, 2, 8
ROWS = {
  'alone': ([1] * 64, [1] * 40 + [0] * 24),
  'packed': ([1] * 10 + [2] * 30 + [3] * 24, [1] * 64),
  'padded': ([1] * 10 + [2] * 30 + [0] * 24, [1] * 1 + [2] * 62 + [0] * 1),
  # The ids of evaluation tasks: any number, in no order.
  'any': ([7] * 3 + [2] * 61, [9] * 20 + [4] * 20 + [30] * 24),
}


def _inputs(kv_heads=KV_HEADS):
  keys = jax.random.split(jax.random.key(0), 4)
  shapes = (BATCH, TIME, HEADS, CHANNELS), (BATCH, kv_heads, TIME, CHANNELS)
  q, g = (jax.random.normal(key, shapes[0]) for key in keys[:2])
  k, v = (jax.random.normal(key, shapes[1]) for key in keys[2:])
  return q, k, v, g


def _run(attend, segments, weights, kv_heads=KV_HEADS):
  q, k, v, g = _inputs(kv_heads)
  out, pull = jax.vjp(
    lambda *qkv: attend(*qkv, segment_ids_BT=segments), q, k, v
  )
  return out * weights, *pull(g * weights)


@pytest.mark.fast_cases(7)
@pytest.mark.parametrize('kv_heads', [1, 2, 4])
@pytest.mark.parametrize(
  ('rows', 'max_documents', 'window'),
  [
    ('alone', 1, 0),
    ('alone', 1, 9),
    ('alone', 0, 0),
    ('packed', 3, 0),
    ('packed', 2, 0),  # four documents in two rows
    ('packed', 64, 0),
    ('packed', 3, 9),
    ('padded', 3, 0),
    ('any', 3, 0),
    ('any', 0, 7),
  ],
)
def test_documents_see_themselves_alone(rows, max_documents, window, kv_heads):
  segments = jnp.array(ROWS[rows], jnp.int32)
  # Padding may see the only document of its row: nothing reads it.
  weights = (segments > 0).astype(jnp.float32)[..., None, None]
  form = form_lib.Form(window=window)
  ours = functools.partial(
    cudnn_gpu.attend, form=form, max_documents=max_documents,
    implementation='xla',
  )  # fmt: skip
  got = _run(ours, segments, weights, kv_heads)
  expected = _run(
    functools.partial(dense.attend, form=form), segments, weights, kv_heads
  )
  for mine, reference in zip(got, expected, strict=True):
    # float32 sums of up to 64 terms of order one, in another order.
    np.testing.assert_allclose(mine, reference, rtol=2e-5, atol=2e-5)


@pytest.mark.parametrize(
  ('rows', 'max_documents', 'first_bad'),
  [
    ([1] * 8 + [2] * 8, 2, 16),
    ([1] * 8 + [2] * 4 + [0] * 4, 2, 12),  # padding is a document
    ([1] * 12 + [0] * 4, 1, 16),  # and none beside one document
    ([1] * 12 + [2] * 4, 1, 12),
    ([3] * 5 + [1] * 5 + [3] * 6, 2, 10),
  ],
)
def test_more_documents_than_expected_are_noticed(
  rows, max_documents, first_bad
):
  segments = jnp.array([rows, [1] * 16], jnp.int32)
  model = transformer.Transformer(
    tiny_models.llama_like(vocab_size=16, num_layers=1, max_length=16),
    execution=execution.Execution(
      attend=functools.partial(
        cudnn_gpu.attend,
        max_documents=max_documents,
        implementation='xla',
      ),
      max_documents=max_documents,
    ),
  )
  tokens = jnp.ones((2, 16), jnp.int32)
  params = model.init(jax.random.key(0), tokens)
  hidden, _ = model.apply(
    params, tokens, segment_ids_BT=segments, method='hidden'
  )
  is_bad_BT = np.isnan(np.asarray(hidden)).any(axis=2)
  assert is_bad_BT[0, first_bad:].all()
  assert is_bad_BT.any() == (first_bad < 16)


def test_lengths_and_offsets_are_those_that_cudnn_expects():
  segments = jnp.array([[1, 1, 2, 0], [5, 5, 5, 5]], jnp.int32)
  got = cudnn_call.documents(segments, 4, 2, 8, 3)
  # Documents of all rows from the left, then documents of no tokens.
  assert got.lengths_BM.tolist() == [[2, 1, 1], [4, 0, 0]]
  first = np.array([[0, 2, 3, 4], [8, 8, 8, 8]])
  np.testing.assert_array_equal(got.q_offsets_BL, first * 4 * 8)
  np.testing.assert_array_equal(got.kv_offsets_BL, first * 2 * 8)
  assert {x.dtype for x in got if x is not None} == {jnp.dtype('int32')}


def _calls(attend, *more, kv_heads=KV_HEADS, wrap=lambda f: f):
  """Returns the cuDNN calls of a gradient, compiled for an H100, as text."""
  shape = functools.partial(jax.ShapeDtypeStruct, dtype=jnp.bfloat16)
  time, channels = 256, 64
  q = shape((BATCH, time, HEADS, channels))
  kv = shape((BATCH, time, kv_heads, channels))

  def step(g, q, k, v, *more):
    out, pull = jax.vjp(
      wrap(lambda q, k, v: attend(q, k, v, *more)), q, k, v
    )  # fmt: skip
    return out, pull(g)

  text = absent_devices.compile('h100:1', step, q, q, kv, kv, *more).as_text()
  return text, [
    line for line in text.splitlines() if 'custom_call_target="__cudnn' in line
  ]


def _parsed(call):
  """Returns shapes, target, operand shapes and configuration of a call."""
  config = json.loads(re.search(r'backend_config=(\{.*\})', call).group(1))
  fmha = config['cudnn_fmha_backend_config']
  fmha.pop('seed', None)  # of dropout, which there is none of
  scores = fmha['intermediate_tensor_shape']
  scores.pop('tuple_shapes', None)
  scores['layout'] = scores['layout']['minor_to_major']
  return (
    re.search(r'= (\(.*?\)) custom-call', call).group(1),
    re.search(r'custom_call_target="(.*?)"', call).group(1),
    re.search(r'operand_layout_constraints=\{(.*)\}, api', call).group(1),
    re.search(r'api_version=\w+', call).group(),
    config,
  )


@pytest.fixture
def _as_on_a_gpu(monkeypatch):
  monkeypatch.setattr(jax_cudnn, 'check_compute_capability', lambda _: True)
  monkeypatch.setattr(jax_cudnn, 'check_cudnn_version', lambda: 92800)


@pytest.mark.usefixtures('_as_on_a_gpu')
@pytest.mark.parametrize('window', [0, 32])
def test_calls_are_those_that_jax_makes(window):
  def theirs(q, k, v):
    return jax.nn.dot_product_attention(
      q, k, v, is_causal=True, scale=0.3, implementation='cudnn',
      local_window_size=(window - 1, 0) if window else None,
    )  # fmt: skip

  def ours(q, k, v):
    form = cudnn_call.Form(scale=0.3, window=window)
    return cudnn_call.attend(q, k, v, cudnn_call.Operands(), form)

  got, expected = _calls(ours)[1], _calls(theirs)[1]
  assert len(got) == 2
  assert list(map(_parsed, got)) == list(map(_parsed, expected))


@pytest.mark.usefixtures('_as_on_a_gpu')
def test_calls_of_packed_rows_are_those_that_jax_makes():
  def theirs(q, k, v, lengths, offsets):
    return jax_cudnn.dot_product_attention(
      q, k, v, None, None, lengths, lengths, offsets, offsets, scale=0.3,
      mask_type=jax_cudnn.MaskType.PADDING_CAUSAL,
    )  # fmt: skip

  def ours(q, k, v, segments):
    operands = cudnn_call.documents(segments, HEADS, KV_HEADS, 64, 3)
    form = cudnn_call.Form(scale=0.3, max_documents=3)
    return cudnn_call.attend(q, k, v, operands, form)

  def integers(*shape):
    return jax.ShapeDtypeStruct(shape, jnp.int32)

  got = _calls(ours, integers(BATCH, 256))[1]
  expected = _calls(theirs, integers(BATCH, 3), integers(BATCH, 4))[1]
  assert len(got) == 2
  assert list(map(_parsed, got)) == list(map(_parsed, expected))


@pytest.mark.parametrize('max_documents', [0, 1, 3])
@pytest.mark.parametrize(
  ('policy', 'num_forward'), [('minimal', 1), ('full', 2)]
)
def test_remat_keeps_what_the_kernel_needs(policy, num_forward, max_documents):
  def attend(q, k, v, segments):
    return cudnn_gpu.attend(
      q, k.swapaxes(1, 2), v.swapaxes(1, 2), segment_ids_BT=segments,
      max_documents=max_documents,
    )  # fmt: skip

  segments = jax.ShapeDtypeStruct((BATCH, 256), jnp.int32)
  wrap = functools.partial(jax.checkpoint, policy=remat.policy(policy))
  text, calls = _calls(attend, segments, wrap=wrap)
  targets = [_parsed(call)[1] for call in calls]
  assert sum('Backward' in target for target in targets) == 1
  assert sum('Backward' not in target for target in targets) == num_forward
  # No gradient of a mask, and no scores [B, H, T, T].
  sizes = re.findall(rf'\[{BATCH},{HEADS},256,256\]', text)
  assert not sizes
  assert ('[2,1,256,256]' in text) == (max_documents == 0)
  backward = next(call for call in calls if 'Backward' in call)
  assert '[2,1,256,256]' not in _parsed(backward)[0]


def test_a_machine_whose_cudnn_refuses_says_why():
  # A CPU has no such call at all.
  found = cudnn_gpu.refusal((128, 4, 64), 2, 3)
  assert '__cudnn' in found
  assert '\n' not in found
