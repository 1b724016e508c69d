"""Matrix multiplication by a weight, with a backward pass XLA:CPU runs well.

The forward pass is `x @ w` on operands of the compute dtype, accumulated and
returned in float32: on CPU a bfloat16 product with a bfloat16 result misses
the fast kernel, and on TPU and GPU float32 accumulation is free.
"""

import functools

import jax
import jax.numpy as jnp


@functools.partial(jax.custom_vjp, nondiff_argnums=(2,))
def linear(x: jax.Array, w_IO: jax.Array, dtype: jnp.dtype) -> jax.Array:
  """Returns x[..., I] @ w[I, O], multiplied in `dtype`, as `dtype`."""
  return _matmul(x.astype(dtype), w_IO.astype(dtype), dtype)


def _matmul(x: jax.Array, w_IO: jax.Array, dtype: jnp.dtype) -> jax.Array:
  y = jax.lax.dot_general(
    x,
    w_IO,
    (((x.ndim - 1,), (0,)), ((), ())),
    preferred_element_type=jnp.float32,
  )
  return y.astype(dtype)


def _forward(x, w_IO, dtype):
  x_cast, w_cast = x.astype(dtype), w_IO.astype(dtype)
  # Zero-size arrays carry the input dtypes through the residuals.
  like = jnp.zeros((0,), x.dtype), jnp.zeros((0,), w_IO.dtype)
  return _matmul(x_cast, w_cast, dtype), (x_cast, w_cast, like)


def _backward(dtype, residuals, dy):
  x, w_IO, (x_like, w_like) = residuals
  dy = dy.astype(dtype)
  dx = jax.lax.dot_general(
    dy,
    w_IO,
    (((dy.ndim - 1,), (1,)), ((), ())),
    preferred_element_type=jnp.float32,
  )
  x, dy = materialised(x, dy)
  leading = tuple(range(x.ndim - 1))
  dw_IO = jax.lax.dot_general(
    x, dy, ((leading, leading), ((), ())), preferred_element_type=jnp.float32
  )
  return dx.astype(x_like.dtype), dw_IO.astype(w_like.dtype)


linear.defvjp(_forward, _backward)


def materialised(*arrays: jax.Array) -> tuple[jax.Array, ...]:
  """On CPU, stops XLA from fusing what produced the arrays into their reader.

  The weight gradient reads both operands transposed. Left alone, XLA:CPU
  fuses an elementwise recomputation into that strided read, which costs more
  than the multiplication (1.4 times a whole train step of a GPT-2-like
  model). TPU and GPU fuse well and see no barrier.
  """
  return jax.lax.platform_dependent(
    *arrays,
    cpu=lambda *xs: jax.lax.optimization_barrier(xs),
    default=lambda *xs: xs,
  )
