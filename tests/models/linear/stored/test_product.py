"""Products with stored kernels, against products with their float copy."""

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
