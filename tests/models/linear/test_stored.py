"""Kernels in 8 and 4 bits, against qwix and against products of floats."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from models.linear import plain, stored

qwix = pytest.importorskip(
  'qwix', reason='not installed: pip install -r requirements-quant.txt'
)


def _kernel(*shape, seed=0):
  return jax.random.normal(jax.random.key(seed), shape)


@pytest.mark.parametrize('form', stored.FORMATS)
@pytest.mark.parametrize('rows', [128, 96, 20])
def test_values_are_those_of_qwix(form, rows):
  w_IO = _kernel(rows, 24)
  kernel = stored.quantise(w_IO, form)
  tile = {128: 64, 96: 48, 20: 20}[rows]
  assert kernel.scales.shape == (rows // tile, 24)
  theirs = qwix.quantize(
    w_IO, form, channelwise_axes=(1,), tiled_axes={0: tile}
  )
  np.testing.assert_allclose(
    kernel.whole(jnp.float32), qwix.dequantize(theirs), rtol=1e-6, atol=1e-7
  )


@pytest.mark.parametrize(('form', 'bits'), [('int8', 8), ('int4', 4)])
def test_a_kernel_takes_its_bits_and_rounds_by_half_a_step(form, bits):
  w_IO = _kernel(128, 24)
  kernel = stored.quantise(w_IO, form)
  assert kernel.values.nbytes == w_IO.size * bits // 8
  assert kernel.shape == w_IO.shape
  step = np.repeat(np.asarray(kernel.scales), 64, axis=0)
  error = np.abs(kernel.whole(jnp.float32) - w_IO)
  assert np.all(error <= 0.5001 * step)


@pytest.mark.parametrize('form', stored.FORMATS)
def test_stacked_kernels_are_quantised_one_by_one(form):
  w_NIO = _kernel(3, 64, 8)
  stack = stored.quantise(w_NIO, form)
  assert stack.shape == (3, 64, 8)
  for n in range(3):
    alone = stored.quantise(w_NIO[n], form)
    np.testing.assert_array_equal(stack.values[n], alone.values)
    np.testing.assert_array_equal(
      stack.whole(jnp.float32)[n], alone.whole(jnp.float32)
    )


@pytest.mark.parametrize('dtype', ['float32', 'bfloat16'])
@pytest.mark.parametrize('form', stored.FORMATS)
def test_a_product_and_its_gradient_are_those_of_the_whole_kernel(form, dtype):
  dtype = jnp.dtype(dtype)
  kernel = stored.quantise(_kernel(64, 24), form)
  x = _kernel(5, 64, seed=1).astype(dtype)
  bias_O = jnp.arange(24, dtype=jnp.float32)

  def ours(x):
    return stored.linear(x, kernel, bias_O, dtype)

  def whole(x):
    return plain.linear(x, kernel.whole(jnp.float32), bias_O, dtype)

  np.testing.assert_array_equal(jax.jit(ours)(x), jax.jit(whole)(x))
  for function in (ours, whole):
    assert function(x).dtype == dtype

  def gradient(function):
    def loss(x):
      return jnp.sum(jnp.sin(function(x).astype(jnp.float32)))

    return np.asarray(jax.jit(jax.grad(loss))(x), np.float32)

  found, expected = gradient(ours), gradient(whole)
  # The cosine of a bfloat16 is rounded, or not, as XLA fuses it.
  bound = 2 * float(jnp.finfo(dtype).eps) * np.abs(expected).max()
  np.testing.assert_allclose(found, expected, atol=bound, rtol=0)


def test_the_backward_pass_keeps_no_whole_kernel():
  kernel = stored.quantise(_kernel(64, 24), 'int4')
  x = _kernel(5, 64, seed=1)
  _, vjp = jax.vjp(lambda x: stored.linear(x, kernel, None, jnp.float32), x)
  kept = sum(leaf.nbytes for leaf in jax.tree.leaves(vjp))
  assert kept < 64 * 24 * 4
