"""Matrix multiplication by a weight, with a backward pass XLA:CPU runs well.

Operands have the compute dtype, sums over an operand's axis are float32. On CPU
results are float32 as well, and cast: a bfloat16 product with a bfloat16 result
misses the fast kernel. Elsewhere the unit that adds up in float32 rounds by
itself, and where devices each have a part of a sum (`tensor`), it is rounded
parts that travel: half the bytes.
"""

import functools

import jax
import jax.numpy as jnp

from models import remat


@functools.partial(jax.custom_vjp, nondiff_argnums=(3,))
def linear(
  x: jax.Array, w_IO: jax.Array, bias_O: jax.Array | None, dtype: jnp.dtype
) -> jax.Array:
  """Returns x[..., I] @ w[I, O] + bias[O], multiplied in and as `dtype`."""
  y, _ = _forward(x, w_IO, bias_O, dtype)
  return y


def exact_linear(
  x: jax.Array, w_IO: jax.Array, bias_O: jax.Array | None, dtype: jnp.dtype
) -> jax.Array:
  """Multiplies in float32 everywhere: no TensorFloat-32, no bfloat16 passes."""
  del bias_O
  return jnp.matmul(
    x.astype(dtype), w_IO.astype(dtype), precision=jax.lax.Precision.HIGHEST
  )


def unembed(hidden: jax.Array, head_VD: jax.Array, dtype) -> jax.Array:
  """Returns float32 logits [..., V] of hidden states [..., D]."""
  return _contract(
    hidden.astype(dtype), head_VD.astype(dtype), (hidden.ndim - 1,), (1,)
  )


def _forward(x, w_IO, bias_O, dtype):
  x_cast, w_cast = x.astype(dtype), w_IO.astype(dtype)
  y = _product(x_cast, w_cast, (x.ndim - 1,), (0,), dtype)
  y = remat.named_product(y)
  if bias_O is not None:
    y = y + bias_O.astype(dtype).reshape((1,) * (y.ndim - 1) + (-1,))
  # Zero-size arrays carry the input dtypes through the residuals.
  like = jax.tree.map(lambda a: jnp.zeros((0,), a.dtype), (x, w_IO, bias_O))
  return y, (x_cast, w_cast, like)


def _backward(dtype, residuals, dy):
  x, w_IO, (x_like, w_like, bias_like) = residuals
  x, dy = materialised(x, dy.astype(dtype))
  leading = tuple(range(x.ndim - 1))
  dx = _product(dy, w_IO, (dy.ndim - 1,), (1,), x_like.dtype)
  dw_IO = weight_gradient(x, dy)
  dbias_O = None
  if bias_like is not None:
    dbias_O = jnp.sum(dy, axis=leading, dtype=jnp.float32)
    dbias_O = dbias_O.astype(bias_like.dtype)
  return dx, dw_IO.astype(w_like.dtype), dbias_O


linear.defvjp(_forward, _backward)


def weight_gradient(x: jax.Array, dy: jax.Array) -> jax.Array:
  """Returns x[..., I]^T @ dy[..., O], [I, O], in float32."""
  leading = tuple(range(x.ndim - 1))
  if x.shape[-1] > dy.shape[-1]:
    # The left operand is transposed in memory: let it be the smaller one.
    (dw_OI,) = materialised(_contract(dy, x, leading, leading))
    return dw_OI.T
  return _contract(x, dy, leading, leading)


def _product(a, b, a_axes, b_axes, dtype):
  """Sums over the given axes of both, in float32; returns `dtype`."""
  if dtype == jnp.float32:
    return _contract(a, b, a_axes, b_axes)
  return jax.lax.platform_dependent(
    a,
    b,
    cpu=lambda a, b: _contract(a, b, a_axes, b_axes).astype(dtype),
    default=lambda a, b: jax.lax.dot_general(
      a, b, ((a_axes, b_axes), ((), ())), preferred_element_type=dtype
    ),
  )


def _contract(a, b, a_axes: tuple[int, ...], b_axes: tuple[int, ...]):
  """Sums over the given axes of both; float32."""
  return jax.lax.dot_general(
    a, b, ((a_axes, b_axes), ((), ())), preferred_element_type=jnp.float32
  )


def materialised(*arrays: jax.Array) -> tuple[jax.Array, ...]:
  """On CPU, stops XLA from fusing what produced the arrays into their readers.

  The backward pass reads the cotangent three times, and for the weight
  gradient reads an operand transposed. Left alone, XLA:CPU repeats the
  elementwise work, or the sum over attention's blocks, in each of them, and in
  the strided one at a crawl. TPU and GPU fuse well and see no barrier.
  """
  return jax.lax.platform_dependent(
    *arrays,
    cpu=lambda *xs: jax.lax.optimization_barrier(xs),
    default=lambda *xs: xs,
  )
