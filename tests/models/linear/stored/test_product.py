"""Products with stored kernels, against products with their float copy."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from models.linear import invariant, plain
from models.linear.stored import (
  blocks as blocks_lib,
  product,
  round as rounding,
)


def _normal(*shape, seed=0):
  return jax.random.normal(jax.random.key(seed), shape)


def _stored(name, rows=64, columns=24):
  if name == 'Q8_0':
    data = np.zeros((columns, rows // 32, 34), np.uint8)
    rng = np.random.default_rng(0)
    data[..., 2:] = rng.integers(0, 256, (*data.shape[:2], 32), np.uint8)
    data[..., :2] = np.full((*data.shape[:2], 1), 0.01, np.float16).view(
      np.uint8
    )
    return blocks_lib.Blocks.make(
      jnp.asarray(data.reshape(columns, -1)), kind='Q8_0'
    )
  if name == 'ordered':
    kernel = rounding.by_scheme(_normal(rows, columns), 'int4')
    kernel.order = jax.random.permutation(jax.random.key(3), rows)
    return kernel
  if name == 'square tiles':
    return rounding.quantise(_normal(rows, columns), 'fp8', (5, 16))
  return rounding.by_scheme(_normal(rows, columns), name)


_NAMES = ['int8', 'int4', 'nf4', 'nvfp4', 'ordered', 'square tiles', 'Q8_0']


@pytest.fixture(params=['whole', 'blocks'])
def in_blocks(request, monkeypatch):
  """Makes a product take all columns, or 16 and then 8 of 24 (of 40: 2, 8)."""
  if request.param == 'blocks':
    monkeypatch.setattr(product, '_BLOCK_BYTES', 16 * 64 * 4)
  return request.param == 'blocks'


@pytest.mark.fast_cases(5)
@pytest.mark.parametrize('dtype', ['float32', 'bfloat16'])
@pytest.mark.parametrize('name', _NAMES)
@pytest.mark.parametrize('columns', [24, 40])
def test_a_product_and_its_gradient_are_those_of_the_whole_kernel(
  name, dtype, columns, in_blocks
):
  dtype = jnp.dtype(dtype)
  kernel = _stored(name, columns=columns)
  x = _normal(2, 5, 64, seed=1).astype(dtype)
  bias_O = jnp.arange(columns, dtype=jnp.float32)

  def ours(x):
    return product.linear(x, kernel, bias_O, dtype)

  def whole(x):
    return plain.linear(x, kernel.whole(jnp.float32), bias_O, dtype)

  eps = float(jnp.finfo(dtype).eps)
  found, expected = jax.jit(ours)(x), jax.jit(whole)(x)
  if name == 'ordered' or in_blocks:  # sums have another order
    scale = np.abs(np.asarray(expected, np.float32)).max()
    np.testing.assert_allclose(
      np.asarray(found, np.float32),
      np.asarray(expected, np.float32),
      atol=4 * eps * scale,
      rtol=0,
    )
  else:
    np.testing.assert_array_equal(found, expected)
  assert ours(x).dtype == dtype

  def gradient(function):
    def loss(x):
      return jnp.sum(jnp.sin(function(x).astype(jnp.float32)))

    return np.asarray(jax.jit(jax.grad(loss))(x), np.float32)

  found, expected = gradient(ours), gradient(whole)
  # The cosine of a bfloat16 is rounded, or not, as XLA fuses it; a sum in
  # another order moves the argument of the cosine by some eps.
  bound = (2 + 30 * in_blocks) * eps * np.abs(expected).max()
  if name == 'ordered':
    bound = 32 * eps * np.abs(expected).max()
  np.testing.assert_allclose(found, expected, atol=bound, rtol=0)


def test_the_backward_pass_keeps_no_whole_kernel():
  kernel = _stored('int4')
  x = _normal(5, 64, seed=1)
  _, vjp = jax.vjp(lambda x: product.linear(x, kernel, None, jnp.float32), x)
  kept = sum(leaf.nbytes for leaf in jax.tree.leaves(vjp))
  assert kept < 64 * 24 * 4


@pytest.mark.fast_cases(7)
@pytest.mark.parametrize('name', [*_NAMES, 'fp8', 'mxfp4'])
@pytest.mark.parametrize('dtype', ['float32', 'bfloat16'])
@pytest.mark.parametrize('num_rows', [1, 32])
def test_a_compiled_product_makes_no_float_copy(name, dtype, num_rows):
  dtype = jnp.dtype(dtype)
  rows, columns = 1024, 2048
  if name != 'Q8_0':
    kernel = jax.eval_shape(lambda: _stored(name, rows, columns))
  else:
    data = jax.ShapeDtypeStruct((columns, rows // 32 * 34), jnp.uint8)
    kernel = blocks_lib.Blocks.make(data, kind='Q8_0')
  x = jax.ShapeDtypeStruct((num_rows, rows), dtype)

  def forward(x, kernel):
    return product.linear(x, kernel, None, dtype)

  def backward(x, kernel):
    y, vjp = jax.vjp(lambda x: forward(x, kernel), x)
    return vjp(y)

  for function in (forward, backward):
    memory = jax.jit(function).lower(x, kernel).compile().memory_analysis()
    # A copy in 16 bits has 4 MiB; blocks of 1 MiB have up to three forms.
    assert memory.temp_size_in_bytes < 0.85 * rows * columns * 2


def test_devices_that_have_a_part_of_the_columns_each_multiply_theirs():
  kernel = _stored('int8', 1024, 2048)
  mesh = jax.make_mesh((2,), ('tensor',), devices=jax.devices()[:2])
  split = jax.NamedSharding(mesh, jax.P('tensor', None))
  whole = jax.NamedSharding(mesh, jax.P())
  x = jax.device_put(_normal(4, 1024), whole)

  def multiply(x, kernel):
    return product.linear(x, kernel, None, jnp.float32)

  expected = multiply(_normal(4, 1024), kernel)
  with jax.set_mesh(mesh):
    kernel = jax.device_put(kernel, split)
    compiled = jax.jit(multiply).lower(x, kernel).compile()
  assert 'all-gather' not in compiled.as_text()
  found = compiled(x, kernel)
  np.testing.assert_allclose(found, expected, atol=1e-3)


def test_an_invariant_product_does_not_depend_on_the_other_rows(monkeypatch):
  monkeypatch.setattr(product, '_BLOCK_BYTES', 16 * 64 * 4)
  kernel, x = _stored('int4'), _normal(33, 64, seed=1)

  @jax.jit
  def multiply(x):
    return product.linear(x, kernel, None, jnp.float32, invariant.linear)

  together = multiply(x)
  for row in (0, 17, 32):
    np.testing.assert_array_equal(multiply(x[row : row + 1])[0], together[row])


_SIZES_E = [0, 3, 40, 1, 0, 6]  # rows of each expert; 50 of 53


def _experts(name, columns=40):
  kernels = [_stored(name, columns=columns) for _ in _SIZES_E]
  for n, kernel in enumerate(kernels):  # each has the columns in another order
    kernels[n] = kernel.columns(jnp.roll(jnp.arange(columns), n))
  return jax.tree.map(lambda *each: jnp.stack(each), *kernels)


def _looped(x_JI, w_EIO):
  """Returns the rows times the floats of their expert, in float64."""
  whole_EIO = np.asarray(w_EIO.whole(jnp.float32), np.float64)
  y_JO, start = np.zeros((len(x_JI), w_EIO.shape[-1])), 0
  for w_IO, size in zip(whole_EIO, _SIZES_E, strict=True):
    rows = slice(start, start + size)
    y_JO[rows] = np.asarray(x_JI, np.float64)[rows] @ w_IO
    start += size
  return y_JO


@pytest.mark.fast_cases(3)
@pytest.mark.parametrize('multiply', [plain.linear, invariant.linear])
@pytest.mark.parametrize('name', [*_NAMES, 'mxfp4'])
def test_rows_meet_the_matrix_of_their_expert(name, multiply, in_blocks):
  w_EIO = _experts(name)
  sizes_E = jnp.asarray(_SIZES_E, jnp.int32)
  for dtype in (jnp.float32, jnp.bfloat16):
    x_JI = _normal(53, 64, seed=1).astype(dtype)
    found = jax.jit(
      lambda x, w, sizes, dtype=dtype: product.grouped(
        x, w, sizes, dtype, multiply
      )
    )(x_JI, w_EIO, sizes_E)
    assert found.dtype == dtype
    expected = _looped(x_JI, w_EIO)
    # In bfloat16, weights and results are rounded to 8 bits.
    bound = 4 * float(jnp.finfo(dtype).eps) * np.abs(expected).max()
    np.testing.assert_allclose(
      np.asarray(found, np.float64), expected, atol=bound, rtol=0
    )


def test_only_matrices_of_chosen_experts_are_multiplied():
  w_EIO, x_JI = _experts('int4'), _normal(2, 64, seed=1)
  w_EIO.scales = w_EIO.scales.at[jnp.array([0, 2, 3, 5])].set(jnp.nan)
  calls = []

  def multiply(x, w_IO, bias_O, dtype):
    jax.debug.callback(lambda: calls.append(x.shape[0]))
    return plain.linear(x, w_IO, bias_O, dtype)

  sizes_E = jnp.array([0, 1, 0, 0, 1, 0], jnp.int32)
  y_JO = jax.jit(lambda *args: product.grouped(*args, jnp.float32, multiply))(
    x_JI, w_EIO, sizes_E
  )
  jax.effects_barrier()
  assert calls == [1, 1]
  assert np.isfinite(y_JO).all()


@pytest.mark.fast_cases(4)
@pytest.mark.parametrize('name', ['int8', 'nf4', 'mxfp4', 'square tiles'])
@pytest.mark.parametrize('multiply', [plain.linear, invariant.linear])
def test_a_compiled_product_makes_no_float_copy_of_an_expert(name, multiply):
  rows, columns, num_experts = 1024, 2048, 8
  one = jax.eval_shape(lambda: _stored(name, rows, columns))
  w_EIO = jax.tree.map(
    lambda x: jax.ShapeDtypeStruct((num_experts, *x.shape), x.dtype), one
  )
  sizes_E = jax.ShapeDtypeStruct((num_experts,), jnp.int32)
  for num_rows, dtype in ((2, jnp.float32), (128, jnp.bfloat16)):
    grouped = functools.partial(product.grouped, dtype=dtype, multiply=multiply)
    x_JI = jax.ShapeDtypeStruct((num_rows, rows), dtype)
    lowered = jax.jit(grouped).lower(x_JI, w_EIO, sizes_E)
    memory = lowered.compile().memory_analysis()
    # One matrix in 16 bits has 4 MiB, and all have 32.
    assert memory.temp_size_in_bytes < 0.85 * rows * columns * 2


def test_an_invariant_row_has_the_same_bits_alone_and_among_others(monkeypatch):
  monkeypatch.setattr(product, '_BLOCK_BYTES', 16 * 64 * 4)
  w_EIO, x_JI = _experts('int4'), _normal(53, 64, seed=1)

  @jax.jit
  def multiply(x_JI, sizes_E):
    return product.grouped(x_JI, w_EIO, sizes_E, jnp.float32, invariant.linear)

  together = multiply(x_JI, jnp.asarray(_SIZES_E, jnp.int32))
  for row, expert in ((0, 1), (2, 1), (3, 2), (42, 2), (43, 3), (49, 5)):
    alone = multiply(
      x_JI[row : row + 1], jax.nn.one_hot(expert, 6, dtype=jnp.int32)
    )
    np.testing.assert_array_equal(alone[0], together[row])
