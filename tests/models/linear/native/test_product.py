"""The native product, against the plain one."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from models.linear import plain
from models.linear.native import product as native_product
from models.linear.stored import (
  block_kinds,
  kernel as kernel_lib,
  product,
  round as rounding,
)
from models.native import build, processor
from tests.helpers import any_kernels

_KINDS = [*native_product._BLOCKS, *any_kernels.SCHEMES]
# Compiled quickly: they are slow all the same, and used for small products.
_AVX2 = ('-mavx2', '-mfma', '-O1')
_PLAIN = ('-mno-avx', '-O1')


@pytest.fixture(scope='session')
def ports(tmp_path_factory):
  """Returns (options of the compiler) -> port."""
  directory = tmp_path_factory.mktemp('native')

  def port(options=build.NATIVE):
    try:
      # That of this processor is the one that engines use: kept for the user.
      kept_in = None if options == build.NATIVE else directory
      return native_product.Port(*build.registered(options, kept_in))
    except build.BuildError as error:
      pytest.skip(str(error))

  return port


def _inputs(rows, columns, dtype=np.float32):
  x_RI = np.random.default_rng(1).normal(size=(rows, columns))
  return jnp.asarray(x_RI, dtype)


def _multiplied(port, x_RI, w_IO, dtype=jnp.float32):
  # As a layer calls it. A refusal would hide that nothing is tested.
  assert not native_product.refusal(w_IO, dtype)
  return np.asarray(
    jax.jit(lambda x, w: product.linear(x, w, None, dtype, computed=port))(
      x_RI, w_IO
    )
  )


def _bound(x_RI, w_IO):
  """Returns what the order of a float32 sum may change, for each number."""
  magnitudes = np.abs(x_RI) @ np.abs(np.asarray(w_IO.whole(jnp.float32)))
  return 2e-6 * magnitudes + 1e-30


@pytest.mark.fast_cases(6)
@pytest.mark.parametrize('kind', _KINDS)
@pytest.mark.parametrize('shape', [(1, 96, 37), (7, 200, 9), (33, 70, 4)])
def test_numbers_are_those_of_the_plain_product(ports, kind, shape):
  num_rows, inputs, outputs = shape
  w_IO = any_kernels.kernel(kind, inputs, outputs)
  x_RI = _inputs(num_rows, w_IO.shape[0])
  found = _multiplied(ports(), x_RI, w_IO)
  expected = np.asarray(x_RI) @ np.asarray(w_IO.whole(jnp.float32))
  assert found.shape == (num_rows, outputs)
  assert np.all(np.abs(found - expected) < _bound(x_RI, w_IO))


@pytest.mark.fast_cases(5)
@pytest.mark.parametrize('kind', _KINDS)
def test_a_row_has_the_same_bits_alone_and_among_others(ports, kind):
  # 260 columns are several parts, which threads take. Rows are multiplied up
  # to 6 at a time; more than 6 have another order of loops.
  w_IO = any_kernels.kernel(kind, 520, 260)
  x_RI = _inputs(33, w_IO.shape[0])
  multiply = jax.jit(
    lambda x, w: product.linear(x, w, None, jnp.float32, computed=ports())
  )
  alone = np.concatenate(
    [np.asarray(multiply(x_RI[i : i + 1], w_IO)) for i in range(33)]
  )
  for num_rows in (2, 3, 4, 5, 6, 7, 20, 33):
    found = multiply(x_RI[:num_rows], w_IO)
    np.testing.assert_array_equal(found, alone[:num_rows])


@pytest.mark.fast_cases(5)
@pytest.mark.parametrize('kind', _KINDS)
def test_builds_for_other_processors_agree(ports, kind):
  w_IO = any_kernels.kernel(kind, 296, 11)
  for num_rows in (1, 7):
    x_RI = _inputs(num_rows, w_IO.shape[0])
    expected = _multiplied(ports(), x_RI, w_IO)
    for options in (_PLAIN, _AVX2):
      if options == _AVX2 and 'avx2' not in processor.described():
        pytest.skip('this processor has no AVX2')
      port = ports(options)
      assert port.instructions == ('avx2' if options == _AVX2 else 'plain')
      found = _multiplied(port, x_RI, w_IO)
      assert np.all(np.abs(found - expected) < _bound(x_RI, w_IO))
      if options == _AVX2 and ports().instructions == 'avx512':
        np.testing.assert_array_equal(found, expected)


def _experts(kind, inputs, outputs, num):
  """Returns kernels whose rows in the store are turned by expert."""

  def turned(x):
    if not x.ndim:  # a gain
      return x * jnp.arange(1.0, num + 1)
    return jnp.stack([jnp.roll(x, n, axis=0) for n in range(num)])

  return jax.tree.map(turned, any_kernels.kernel(kind, inputs, outputs))


@pytest.mark.fast_cases(5)
@pytest.mark.parametrize('kind', _KINDS)
def test_experts_are_multiplied_in_one_call_with_the_bits_of_each(ports, kind):
  sizes = [2, 0, 9, 1, 0]
  w_EIO = _experts(kind, 520, 150, len(sizes))
  x_JI = _inputs(14, w_EIO.shape[-2])  # the last two are of no expert
  multiply = jax.jit(
    lambda x, w, sizes: product.grouped(
      x, w, sizes, jnp.float32, computed=ports()
    )
  )
  assert not native_product.refusal(w_EIO, 'float32')
  found = np.asarray(multiply(x_JI, w_EIO, jnp.array(sizes, jnp.int32)))
  start = 0
  for n, size in enumerate(sizes):
    rows = slice(start, start + size)
    if size:
      alone = _multiplied(ports(), x_JI[rows], w_EIO.matrix(n))
      np.testing.assert_array_equal(found[rows], alone)
    start += size
  np.testing.assert_array_equal(found[start:], 0)


def test_experts_without_rows_are_not_read(ports):
  w_EIO = _experts('int4', 64, 24, 3)
  w_EIO.scales = w_EIO.scales.at[1].set(jnp.nan)
  found = product.grouped(
    _inputs(5, 64), w_EIO, jnp.array([2, 0, 3], jnp.int32), jnp.float32,
    computed=ports(),
  )  # fmt: skip
  assert np.isfinite(found).all()


@pytest.mark.parametrize(
  'dtype', ['float16', 'bfloat16', 'float8_e4m3fn', 'float8_e8m0fnu']
)
def test_scales_of_any_dtype_are_the_numbers_that_jax_reads(ports, dtype):
  w_IO = any_kernels.kernel('int8', 64, 256)
  codes = np.arange(256, dtype=np.uint8)  # all scales of 8 bits
  if jnp.dtype(dtype).itemsize == 2:
    codes = np.linspace(0, 2**16 - 1, 256).astype(np.uint16)
  scales = jnp.asarray(codes.view(jnp.dtype(dtype))[:, None])
  w_IO.scales = jnp.where(jnp.isfinite(scales), scales, 1).astype(dtype)
  w_IO.gain = jnp.float32(0.5)
  x_RI = _inputs(2, 64)
  found = _multiplied(ports(), x_RI, w_IO)
  w_IO.scales = kernel_lib.with_gain(w_IO.scales, w_IO.gain)
  w_IO.gain = None
  np.testing.assert_array_equal(found, _multiplied(ports(), x_RI, w_IO))


@pytest.mark.parametrize('form', ['int4', 'uint4'])
@pytest.mark.parametrize('tile_in', [16, 32, 48, 128])
def test_packed_tiles_of_any_width(ports, form, tile_in):
  # 298 inputs: the last piece and the last tile are partial. A tile of 16 or 48
  # ends within a piece, whose even and odd inputs are decoded apart.
  w_IO = jnp.asarray(np.random.default_rng(0).normal(size=(298, 9)), 'float32')
  w_IO = rounding.quantise(w_IO, form, (1, tile_in))
  assert (w_IO.mins is None) == (form == 'int4')
  for num_rows in (1, 7):
    x_RI = _inputs(num_rows, 298)
    found = _multiplied(ports(), x_RI, w_IO)
    expected = np.asarray(x_RI) @ np.asarray(w_IO.whole(jnp.float32))
    assert np.all(np.abs(found - expected) < _bound(x_RI, w_IO))


@pytest.mark.slow
@pytest.mark.parametrize('kind', ['int8', 'uint4', 'Q4_1', 'Q6_K'])
def test_edges_of_shapes(ports, kind):
  for num_rows, inputs, outputs in ((0, 64, 8), (3, 2, 1), (1, 33, 3)):
    inputs += inputs % 2 if kind == 'uint4' else 0
    w_IO = any_kernels.kernel(kind, inputs, outputs)
    x_RI = _inputs(num_rows, w_IO.shape[0])
    found = _multiplied(ports(), x_RI, w_IO)
    expected = np.asarray(x_RI) @ np.asarray(w_IO.whole(jnp.float32))
    assert np.all(np.abs(found - expected) < _bound(x_RI, w_IO))


@pytest.mark.parametrize('kind', ['int8', 'int4', 'Q8_0', 'Q4_K'])
def test_numbers_that_are_not_finite_stay_in_their_row(ports, kind):
  w_IO = any_kernels.kernel(kind, 256, 5)
  x_RI = np.array(_inputs(4, 256))
  x_RI[1, 3], x_RI[2, 200] = np.nan, -np.inf
  plain_RO = product.linear(jnp.asarray(x_RI), w_IO, None, jnp.float32)
  found = _multiplied(ports(), jnp.asarray(x_RI), w_IO)
  # Minus infinity times a weight is infinite, or no number where that is 0.
  np.testing.assert_array_equal(np.isnan(found), np.isnan(plain_RO))
  np.testing.assert_array_equal(np.isinf(found), np.isinf(plain_RO))
  infinite = np.isinf(plain_RO)
  np.testing.assert_array_equal(found[infinite], plain_RO[infinite])
  assert np.isfinite(found[[0, 3]]).all()
  assert np.isnan(found[1]).all()


def test_scales_that_are_not_finite_stay_in_their_column(ports):
  w_IO = any_kernels.kernel('int8', 70, 9)
  w_IO.scales = w_IO.scales.at[2, 0].set(jnp.nan)
  found = _multiplied(ports(), _inputs(3, 70), w_IO)
  assert np.isnan(found[:, 2]).all()
  assert np.isfinite(np.delete(found, 2, axis=1)).all()


def test_bfloat16_inputs_meet_float32_weights(ports):
  w_IO = any_kernels.kernel('int4', 128, 6)
  x_RI = _inputs(3, 128, jnp.bfloat16)
  found = _multiplied(ports(), x_RI, w_IO, jnp.bfloat16)
  exact = np.asarray(x_RI, np.float32) @ np.asarray(w_IO.whole(jnp.float32))
  assert found.dtype == jnp.bfloat16
  # Rounded once, to 8 bits; near 0 the order of the sum counts.
  np.testing.assert_allclose(
    found.astype(np.float32), exact, rtol=2**-8, atol=1e-5
  )


def test_leading_axes_biases_and_logits(ports):
  w_IO = any_kernels.kernel('int8', 64, 24)
  x_BTI = _inputs(6, 64).reshape(2, 3, 64)
  bias_O = jnp.arange(24.0)
  found = product.linear(
    x_BTI, w_IO, bias_O, jnp.float32, plain.linear, ports()
  )
  logits = product.unembed(x_BTI, w_IO, jnp.bfloat16, plain.unembed, ports())
  expected = np.asarray(product.linear(x_BTI, w_IO, bias_O, jnp.float32))
  assert found.shape == logits.shape == (2, 3, 24)
  assert logits.dtype == jnp.float32
  np.testing.assert_allclose(found, expected, atol=1e-4)
  np.testing.assert_allclose(logits, expected - np.arange(24.0), atol=0.1)


def test_gradients_are_those_of_the_plain_product(ports):
  w_IO = any_kernels.kernel('int8', 70, 9)

  def loss(x_RI, *ports):
    y_RO = product.linear(x_RI, w_IO, None, jnp.float32, plain.linear, *ports)
    return jnp.sum(y_RO * jnp.arange(9.0)[None])

  x_RI = _inputs(3, 70)
  np.testing.assert_array_equal(
    jax.grad(loss)(x_RI, ports()), jax.grad(loss)(x_RI)
  )


def test_all_kinds_of_blocks_and_forms_are_native():
  assert {*native_product._BLOCKS} == {*block_kinds.KINDS}
  packed = {*native_product._BOOKS} & {*kernel_lib.FORMS}
  assert packed == {*kernel_lib.PACKED}
  assert packed | {*native_product._VALUES} == {*kernel_lib.FORMS}


@pytest.mark.parametrize('tile', [(1, 300), (3, 48), (128, 128)])
def test_all_floats_of_8_bits(ports, tile):
  codes = np.arange(256 * 300, dtype=np.uint32) * 7 % 256
  codes = codes.astype(np.uint8).reshape(256, 300)
  tiles = -(-256 // tile[0]), -(-300 // tile[1])
  scales = np.random.default_rng(0).normal(size=tiles).astype(np.float32)
  w_IO = kernel_lib.Kernel.make(
    jnp.asarray(codes.view(jnp.float8_e4m3fn)), jnp.asarray(scales),
    form='fp8', tile=tile,
  )  # fmt: skip
  rows_OI = np.asarray(w_IO.rows(jnp.float32))
  is_nan_O = np.isnan(rows_OI).any(axis=1)
  assert is_nan_O.any()  # two codes are no number
  unit_II = jnp.eye(300)
  has_avx2 = 'avx2' in processor.described()
  for options in (build.NATIVE, _PLAIN, *([_AVX2] if has_avx2 else [])):
    port = ports(options)
    found_IO = _multiplied(port, unit_II, w_IO)  # each weight, alone
    np.testing.assert_array_equal(
      np.isnan(found_IO), np.broadcast_to(is_nan_O, found_IO.shape)
    )
    np.testing.assert_array_equal(found_IO.T[~is_nan_O], rows_OI[~is_nan_O])


def test_the_table_says_what_is_refused():
  for kind, dtype, text in (
    ('int8', 'float64', 'got dtype float64, expected one of'),
  ):
    w_IO = any_kernels.kernel(kind, 64, 4)
    assert text in native_product.refusal(w_IO, dtype)
  w_IO = any_kernels.narrow(64, 4)
  text = 'got a scale per 8 inputs, expected a multiple of 16'
  assert text in native_product.refusal(w_IO, 'float32')
  kernel = any_kernels.kernel('int8', 64, 4)
  stack = jax.tree.map(lambda x: x[None, None], kernel)
  assert 'got a kernel of 4 axes' in native_product.refusal(stack, 'float32')


def test_a_kernel_that_is_refused_is_multiplied_plainly():
  port = native_product.Port('nothing', 'none')
  w_IO = any_kernels.narrow(64, 4)
  x_RI = _inputs(3, 64)
  np.testing.assert_array_equal(
    product.linear(x_RI, w_IO, None, jnp.float32, plain.linear, port),
    product.linear(x_RI, w_IO, None, jnp.float32),
  )
