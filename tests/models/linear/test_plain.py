"""The backward pass of `plain.linear` against autodiff of x @ w + b."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from models.linear import plain as plain_lib


# Either operand of the weight gradient may be the wider one.
@pytest.mark.parametrize(('width_in', 'width_out'), [(5, 7), (7, 5)])
@pytest.mark.parametrize('use_bias', [True, False])
def test_linear_has_the_gradients_of_a_product(width_in, width_out, use_bias):
  keys = jax.random.split(jax.random.key(0), 3)
  x = jax.random.normal(keys[0], (2, 3, width_in))
  w = jax.random.normal(keys[1], (width_in, width_out))
  bias = jax.random.normal(keys[2], (width_out,)) if use_bias else None

  def ours(x, w, bias):
    return jnp.sum(jnp.sin(plain_lib.linear(x, w, bias, jnp.float32)))

  def plain(x, w, bias):
    y = x @ w
    return jnp.sum(jnp.sin(y if bias is None else y + bias[None, None]))

  np.testing.assert_allclose(ours(x, w, bias), plain(x, w, bias), rtol=1e-5)
  argnums = (0, 1, 2) if use_bias else (0, 1)
  for got, expected in zip(
    jax.grad(ours, argnums)(x, w, bias),
    jax.grad(plain, argnums)(x, w, bias),
    strict=True,
  ):
    np.testing.assert_allclose(got, expected, rtol=1e-5, atol=1e-6)


def test_a_row_alone_is_a_row_among_others_in_bfloat16():
  keys = jax.random.split(jax.random.key(0), 3)
  x, w, head = (
    jax.random.normal(key, shape, jnp.bfloat16)
    for key, shape in zip(keys, ((2, 3, 64), (64, 96), (128, 64)), strict=True)
  )
  linear = functools.partial(plain_lib.linear, dtype=jnp.bfloat16)
  for alone, among in (
    (linear(x[1:, 2:], w, None), linear(x, w, None)),
    (
      plain_lib.unembed(x[1:, 2:], head, jnp.bfloat16),
      plain_lib.unembed(x, head, jnp.bfloat16),
    ),
  ):
    assert alone.shape == (1, 1, among.shape[-1])
    # Sums in another order, rounded to bfloat16.
    np.testing.assert_allclose(
      np.float32(alone[0, 0]), np.float32(among[1, 2]), rtol=2**-7, atol=1e-5
    )


def test_linear_returns_gradients_in_the_dtype_of_the_weights():
  x = jnp.ones((2, 5), jnp.bfloat16)
  w = jnp.ones((5, 7), jnp.float32)
  bias = jnp.ones(7, jnp.float32)
  y, pull = jax.vjp(
    lambda x, w, b: plain_lib.linear(x, w, b, jnp.bfloat16), x, w, bias
  )
  assert y.dtype == jnp.bfloat16
  dx, dw, dbias = pull(y)
  assert dx.dtype == jnp.bfloat16
  assert dw.dtype == dbias.dtype == jnp.float32


@pytest.mark.parametrize(
  ('platform', 'has_barrier'), [('cpu', True), ('tpu', False), ('cuda', False)]
)
def test_only_cpu_programs_have_the_barrier(platform, has_barrier):
  """Lowered for each platform, on any machine."""
  x, w = jnp.ones((4, 8)), jnp.ones((8, 2))

  def loss(x, w):
    return jnp.sum(plain_lib.linear(x, w, None, jnp.bfloat16))

  lowered = (
    jax.jit(jax.grad(loss, (0, 1)))
    .trace(x, w)
    .lower(lowering_platforms=(platform,))
  )
  assert ('optimization_barrier' in lowered.as_text()) == has_barrier
