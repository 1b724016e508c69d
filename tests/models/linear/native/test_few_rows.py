"""The native product of few rows with floats, against the plain one."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from models.linear import plain
from models.linear.native import few_rows
from models.native import build, processor

_AVX2 = ('-mavx2', '-mfma', '-O1')
_PLAIN = ('-mno-avx', '-O1')
# Parts of threads, rests of every unit, and less than one of them.
_SHAPES = (64, 256), (70, 259), (5, 7)
_DTYPES = 'float32', 'bfloat16'


@pytest.fixture(scope='session')
def target(tmp_path_factory):
  """Returns (options of the compiler) -> XLA's name of the product."""
  directory = tmp_path_factory.mktemp('native')

  def name(options=build.NATIVE):
    try:
      kept_in = None if options == build.NATIVE else directory
      return build.registered(options, kept_in, build.FEW_ROWS)[0]
    except build.BuildError as error:
      pytest.skip(str(error))

  return name


def _random(shape, dtype='float32', seed=0):
  numbers = np.random.default_rng(seed).normal(size=shape)
  return jnp.asarray(numbers, dtype)


def _called(function, *arrays):
  """Returns the result of a jitted call that is native, in float32."""
  lowered = jax.jit(function).lower(*arrays)
  assert 'two_lives_multiply' in lowered.as_text()
  return np.asarray(lowered.compile()(*arrays), np.float32)


@pytest.mark.fast_cases(10)
@pytest.mark.parametrize('is_transposed', [False, True])
@pytest.mark.parametrize('dtype', _DTYPES)
@pytest.mark.parametrize('shape', _SHAPES)
def test_numbers_are_those_of_the_plain_product(
  target, shape, dtype, is_transposed
):
  w_IO, bias_O = _random(shape, dtype), _random(shape[1:], dtype, seed=1)
  port = few_rows.Linear(target(), is_transposed)
  stored = np.ascontiguousarray(w_IO.T) if is_transposed else w_IO
  for num_rows in (2, 3, 8):
    x_1RI = _random((1, num_rows, shape[0]), dtype, seed=2)
    found = _called(
      lambda x, w, b: port(x, w.T if is_transposed else w, b, x.dtype),
      x_1RI,
      stored,
      bias_O,
    )
    exact = np.float64(x_1RI) @ np.float64(w_IO)
    expected = np.float32(jnp.asarray(exact, dtype)) + np.float32(bias_O)
    magnitude = np.abs(np.float64(x_1RI)) @ np.abs(np.float64(w_IO))
    # bfloat16 is rounded after the sum, and again with the bias.
    rounding = 2e-6 if dtype == 'float32' else 2**-7
    assert found.shape == expected.shape
    difference = np.abs(found - expected)
    assert np.all(difference <= rounding * (magnitude + 1))


@pytest.mark.parametrize('dtype', _DTYPES)
def test_logits_are_float32_sums(target, dtype):
  head_VD, hidden_1RD = _random((259, 70), dtype), _random((1, 5, 70), dtype)
  found = _called(
    lambda h, w: few_rows.Unembed(target())(h, w, h.dtype), hidden_1RD, head_VD
  )
  expected = np.float64(hidden_1RD) @ np.float64(head_VD).T
  np.testing.assert_allclose(found, expected, atol=2e-5)


@pytest.mark.parametrize('is_transposed', [False, True])
@pytest.mark.parametrize('dtype', _DTYPES)
def test_a_row_has_the_same_bits_in_every_call(target, dtype, is_transposed):
  w_IO = _random((70, 259), dtype)
  stored = np.ascontiguousarray(w_IO.T) if is_transposed else w_IO
  x_RI = _random((8, 70), 'float32', seed=2)

  def multiply(x, w):
    return few_rows._multiplied(target(), x, w, x.dtype, is_transposed)

  whole = _called(multiply, x_RI, stored)
  for num_rows in range(1, 8):
    found = _called(multiply, x_RI[:num_rows], stored)
    np.testing.assert_array_equal(found, whole[:num_rows])


@pytest.mark.parametrize('dtype', _DTYPES)
def test_builds_for_other_processors_agree(target, dtype):
  x_RI = _random((7, 70))

  def multiply(name, weights, is_along):
    return _called(
      lambda x, w: few_rows._multiplied(name, x, w, x.dtype, is_along),
      x_RI,
      weights,
    )

  for options in (_PLAIN, _AVX2):
    if options == _AVX2 and 'avx2' not in processor.described():
      continue
    for is_along in (False, True):
      shape = (259, 70) if is_along else (70, 259)
      weights = _random(shape, dtype, seed=3)
      expected = multiply(target(), weights, is_along)
      found = multiply(target(options), weights, is_along)
      if options == _AVX2 and 'avx512f' in processor.described():
        np.testing.assert_array_equal(found, expected)
      np.testing.assert_allclose(found, expected, rtol=0, atol=3e-5)


def test_many_rows_and_one_of_float32_are_plain(target):
  w_IO = _random((64, 96))
  port = few_rows.Linear(target(), is_transposed=False)
  for dtype, num_rows in (('float32', 1), ('float32', 9), ('bfloat16', 9)):
    x_RI, w = _random((num_rows, 64), dtype), w_IO.astype(dtype)
    found, expected = (
      jax.jit(lambda x, w, port=port: port(x, w, None, x.dtype))(x_RI, w)
      for port in (port, plain.linear)
    )
    np.testing.assert_array_equal(found, expected)


def test_dtypes_are_refused_that_would_be_rounded():
  assert not few_rows.refusal('bfloat16', 'float32')
  assert not few_rows.refusal('float32', 'float32')
  assert few_rows.refusal('float32', 'bfloat16') == (
    'got weights of float32 in bfloat16'
  )
  assert few_rows.refusal('float16', 'float32') == (
    'got dtype float16, expected one of float32, bfloat16'
  )
