"""Kernels of Pallas for products in fewer bits, against the plain product.

They are interpreted, which needs no GPU and no TPU. The last tests compile them
for devices that are not here.
"""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from models.linear import plain
from models.linear.kernels import stored, stored_gpu, stored_tpu, tiles
from models.linear.stored import kernel as kernel_lib, product
from tests.helpers import absent_devices, any_kernels

_MODULES = {'gpu': stored_gpu, 'tpu': stored_tpu}
# Kinds with tiles of at least 32 inputs.
_KINDS = (
  'int8', 'int8-g32', 'int4', 'uint4', 'nf4', 'fp8', 'mxfp4', 'ordered',
)  # fmt: skip


def _port(platform):
  return _MODULES[platform].Port(interpret=True)


def _inputs(rows, columns, dtype=jnp.float32):
  x_RI = np.random.default_rng(1).normal(size=(rows, columns))
  return jnp.asarray(x_RI, dtype)


def _multiplied(platform, x_RI, w_IO, dtype=jnp.float32):
  # A refusal would hide that nothing is tested.
  assert not _MODULES[platform].refusal(w_IO, dtype)
  return np.asarray(
    product.linear(x_RI, w_IO, None, dtype, computed=_port(platform))
  )


def _close(found, x_RI, w_IO):
  whole_IO = np.asarray(w_IO.whole(jnp.float32))
  magnitudes = np.abs(x_RI) @ np.abs(whole_IO)
  difference = np.abs(found - np.asarray(x_RI) @ whole_IO)
  return np.all(difference < 2e-6 * magnitudes + 1e-30)


@pytest.mark.fast_cases(6)
@pytest.mark.parametrize('platform', _MODULES)
@pytest.mark.parametrize('kind', _KINDS)
@pytest.mark.parametrize('num_rows', [1, 70])
def test_numbers_are_those_of_the_plain_product(platform, kind, num_rows):
  # 300 outputs: tiles end within; 512 inputs: several tiles of inputs.
  w_IO = any_kernels.kernel(kind, 512, 300)
  x_RI = _inputs(num_rows, 512)
  found = _multiplied(platform, x_RI, w_IO)
  assert found.shape == (num_rows, 300)
  assert _close(found, x_RI, w_IO)


def test_rows_of_any_length_on_gpu():
  # The last piece and the last tile of inputs are partial.
  for kind, inputs in (('int8', 33), ('int4', 298), ('uint4', 96)):
    w_IO = any_kernels.kernel(kind, inputs, 9)
    x_RI = _inputs(3, inputs)
    assert _close(_multiplied('gpu', x_RI, w_IO), x_RI, w_IO)


def _tiled(form, tile, dtype='float32', num=None):
  """Returns a kernel of 256 x 200 of any codes; `num` of them for experts."""
  rng = np.random.default_rng(0)
  lead = () if num is None else (num,)
  width = 128 if form in kernel_lib.PACKED else 256
  values = rng.integers(0, 256, (*lead, 200, width), np.uint8)
  if form == 'fp8':
    values = np.where(values & 127 == 127, 0, values).view(jnp.float8_e4m3fn)
  elif form == 'int8':
    values = values.view(np.int8)
  shape = *lead, -(-200 // tile[0]), -(-256 // tile[1])
  scales = jnp.asarray(rng.uniform(0.01, 2, shape), dtype)
  mins = jnp.asarray(rng.normal(size=shape), 'float32')
  return kernel_lib.Kernel.make(
    jnp.asarray(values), scales, form=form, tile=tile,
    mins=mins if form == 'uint4' else None,
    gain=jnp.full(lead, 0.7) if form == 'fp4' else None,
  )  # fmt: skip


@pytest.mark.parametrize('platform', _MODULES)
@pytest.mark.parametrize(
  ('form', 'tile', 'dtype'),
  [
    ('fp8', (128, 128), 'float32'),  # blocks of DeepSeek
    ('fp8', (200, 256), 'bfloat16'),
    ('int8', (3, 64), 'float16'),
    ('uint4', (1, 256), 'float32'),  # a minimum of a whole row
    ('fp4', (1, 32), 'float8_e8m0fnu'),
    ('fp4', (1, 64), 'float8_e4m3fn'),
  ],
)
def test_tiles_and_scales_of_any_kind(platform, form, tile, dtype):
  w_IO = _tiled(form, tile, dtype)
  x_RI = _inputs(5, 256)
  assert _close(_multiplied(platform, x_RI, w_IO), x_RI, w_IO)


@pytest.mark.parametrize('name', ['float16', 'float8_e4m3fn', 'float8_e8m0fnu'])
def test_scales_are_decoded_as_jax_reads_them(name):
  bits = np.arange(65536 if name == 'float16' else 256)
  bits = bits.astype(np.uint16 if name == 'float16' else np.uint8)
  found = stored.scales(jnp.asarray(bits), name)
  expected = bits.view(jnp.dtype(name)).astype(np.float32)
  # A CPU takes the smallest numbers for 0.
  is_normal = (np.abs(expected) >= np.finfo(np.float32).tiny) | (expected == 0)
  kept = is_normal | ~np.isfinite(expected)
  np.testing.assert_array_equal(np.asarray(found)[kept], expected[kept])
  assert kept.sum() >= len(bits) - 1


@pytest.mark.fast_cases(2)
@pytest.mark.parametrize('platform', _MODULES)
@pytest.mark.parametrize('form', ['int8', 'uint4', 'fp4', 'fp8'])
def test_rows_of_experts_meet_their_own_matrix(platform, form):
  tile = (1, 256) if form == 'int8' else (1, 64)
  w_EIO = _tiled(form, tile, num=4)
  sizes = [3, 0, 40, 1]
  x_JI = _inputs(46, 256)  # the last two are of no expert
  found = product.grouped(
    x_JI, w_EIO, jnp.array(sizes, jnp.int32), jnp.float32,
    computed=_port(platform),
  )  # fmt: skip
  start = 0
  for n, size in enumerate(sizes):
    rows = slice(start, start + size)
    assert _close(np.asarray(found[rows]), x_JI[rows], w_EIO.matrix(n))
    start += size
  np.testing.assert_array_equal(found[start:], 0)


@pytest.mark.parametrize('tile_rows', [1, 4, 16])
def test_each_row_of_a_group_has_one_place(tile_rows):
  rng = np.random.default_rng(0)
  for _ in range(20):
    sizes = rng.integers(0, 9, 5)
    num_rows = 40  # or more than all groups have
    found = tiles.of_groups(jnp.asarray(sizes, jnp.int32), num_rows, tile_rows)
    group_J = np.repeat(np.arange(5), sizes)
    seen = set()
    for row, group in enumerate(group_J):
      tile, place = divmod(int(found.place_J[row]), tile_rows)
      assert found.group_P[tile] == group
      assert place < found.count_P[tile]
      assert found.source_PR[tile, place] == row
      seen.add((tile, place))
    assert len(seen) == found.count_P.sum() == len(group_J)
    assert list(found.is_grouped_J) == [
      row < len(group_J) for row in range(num_rows)
    ]


@pytest.mark.parametrize('platform', _MODULES)
def test_numbers_that_are_not_finite_stay_in_their_row(platform):
  w_IO = any_kernels.kernel('int4', 256, 5)
  x_RI = np.array(_inputs(4, 256))
  x_RI[1, 3] = np.nan
  found = _multiplied(platform, jnp.asarray(x_RI), w_IO)
  assert np.isnan(found[1]).all()
  assert np.isfinite(np.delete(found, 1, axis=0)).all()


@pytest.mark.parametrize('platform', _MODULES)
def test_bfloat16_loses_no_more_than_the_plain_product(platform):
  w_IO = any_kernels.kernel('int4', 512, 64)
  x_RI = _inputs(8, 512, jnp.bfloat16)
  exact = np.asarray(x_RI, np.float32) @ np.asarray(w_IO.whole(jnp.float32))
  error, plain_error = (
    np.abs(np.asarray(y_RO, np.float32) - exact).mean()
    for y_RO in (
      _multiplied(platform, x_RI, w_IO, jnp.bfloat16),
      product.linear(x_RI, w_IO, None, jnp.bfloat16),
    )
  )
  assert 0 < error <= plain_error


@pytest.mark.parametrize('platform', _MODULES)
def test_logits_gradients_and_no_rows(platform):
  port = _port(platform)
  w_IO = any_kernels.kernel('int8', 128, 24)
  x_BTI = _inputs(6, 128).reshape(2, 3, 128)
  logits = product.unembed(x_BTI, w_IO, jnp.float32, plain.unembed, port)
  assert logits.shape == (2, 3, 24)
  flat_RI = x_BTI.reshape(6, 128)
  assert _close(np.asarray(logits).reshape(6, 24), flat_RI, w_IO)

  def loss(x_RI, *ports):
    y_RO = product.linear(x_RI, w_IO, None, jnp.float32, plain.linear, *ports)
    return jnp.sum(y_RO * jnp.arange(24.0)[None])

  np.testing.assert_array_equal(
    jax.grad(loss)(flat_RI, port), jax.grad(loss)(flat_RI)
  )
  empty = product.linear(flat_RI[:0], w_IO, None, jnp.float32, computed=port)
  assert empty.shape == (0, 24)


def _shape_of(form, tile, inputs, outputs=128):
  width = inputs // 2 if form in kernel_lib.PACKED else inputs
  dtype = 'uint8' if form in kernel_lib.PACKED else 'int8'
  scales = -(-outputs // tile[0]), -(-inputs // tile[1])
  return kernel_lib.Kernel.make(
    jax.ShapeDtypeStruct((outputs, width), dtype),
    jax.ShapeDtypeStruct(scales, 'float32'),
    form=form,
    tile=tile,
  )


@pytest.mark.parametrize(
  ('w_IO', 'dtype', 'text'),
  [
    (_shape_of('int8', (1, 128), 128), 'float64', 'got dtype float64'),
    (_shape_of('int8', (1, 8), 128), 'float32', 'a scale per 8 inputs'),
    (_shape_of('int4', (1, 48), 256), 'float32', 'expected a multiple of 32'),
    (_shape_of('int8', (1, 512), 512, 2**22), 'float32', '2147483648 bytes'),
  ],
)
def test_both_refuse(w_IO, dtype, text):
  for module in _MODULES.values():
    assert text in module.refusal(w_IO, dtype)


def test_a_tpu_refuses_more():
  for w_IO, dtype, text in (
    (_shape_of('int8', (1, 96), 96), 'float32', 'rows of 96 bytes'),
    (_shape_of('int8', (1, 96), 384), 'float32', 'tiles that fill 128 lanes'),
    (_shape_of('int8', (1, 128), 128), 'float16', 'got dtype float16'),
    (_shape_of('int8', (1, 128), 2**20), 'float32', 'got 1048576 inputs'),
  ):
    assert text in stored_tpu.refusal(w_IO, dtype)
    assert not stored_gpu.refusal(w_IO, dtype)


@pytest.mark.parametrize('platform', _MODULES)
def test_a_kernel_that_is_refused_is_multiplied_plainly(platform):
  w_IO = any_kernels.narrow(64, 4)
  x_RI = _inputs(3, 64)
  np.testing.assert_array_equal(
    product.linear(x_RI, w_IO, None, jnp.float32, computed=_port(platform)),
    product.linear(x_RI, w_IO, None, jnp.float32),
  )
  blocks = any_kernels.kernel('Q4_K', 256, 4)
  assert 'got blocks Q4_K, whose scales lie between' in stored.refusal(
    blocks, 'float32'
  )


def test_a_kernel_on_a_gpu_that_is_here():
  try:
    gpu = jax.devices('gpu')[0]
  except RuntimeError:
    pytest.skip('no GPU; where there is one, set JAX_PLATFORMS=cuda,cpu')
  with jax.default_device(gpu):
    for kind in _KINDS:
      w_IO = any_kernels.kernel(kind, 512, 300)
      for num_rows in (1, 70):
        x_RI = _inputs(num_rows, 512)
        y_RO = product.linear(
          x_RI, w_IO, None, jnp.float32, computed=stored_gpu.Port()
        )
        assert _close(np.asarray(y_RO), x_RI, w_IO)


# Compiled for devices that are not here.


@pytest.mark.slow
@pytest.mark.parametrize('target', ['h100:1', 'v5e:1x1', 'v5p:1x1x1'])
@pytest.mark.parametrize(
  ('form', 'tile'),
  [('int8', (1, 2048)), ('int4', (1, 128)), ('nf4', (1, 64)),
   ('fp8', (128, 128)), ('fp4', (1, 32))],
)  # fmt: skip
def test_no_matrix_of_floats_is_made(target, form, tile):
  module = stored_gpu if target.startswith('h100') else stored_tpu
  w_IO = jax.eval_shape(
    lambda: kernel_lib.Kernel.make(
      jnp.zeros(
        (2048, 1024 if form in kernel_lib.PACKED else 2048),
        {'int8': 'int8', 'fp8': 'float8_e4m3fn'}.get(form, 'uint8'),
      ),
      jnp.zeros((2048 // tile[0], 2048 // tile[1]), 'bfloat16'),
      form=form,
      tile=tile,
    )
  )
  assert not module.refusal(w_IO, 'bfloat16')
  multiply = functools.partial(
    product.linear, bias_O=None, dtype=jnp.bfloat16, computed=module.Port()
  )
  for num_rows in (1, 16, 64):
    x_RI = jax.ShapeDtypeStruct((num_rows, 2048), 'bfloat16')
    compiled = absent_devices.compile(target, multiply, x_RI, w_IO)
    assert 'custom-call' in compiled.as_text()
    # Partial sums take room: of few rows less than the codes do.
    most = 2 * w_IO.nbytes if num_rows > 16 else w_IO.nbytes
    assert compiled.memory_analysis().temp_size_in_bytes < most
