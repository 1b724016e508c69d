"""Matrix multiplication by a weight, with a backward pass that is fast on CPU.

Operands have the compute dtype, and sums over an axis are float32. On CPU the
result is float32 as well and is then cast, because a bfloat16 product with a
bfloat16 result misses XLA:CPU's fast kernel. So does a bfloat16 product of one
row, which therefore gets a second row. On other platforms the hardware rounds
the float32 sum to the compute dtype. So if devices each hold a part of a sum
(`tensor`), they send rounded parts, which are half the bytes.
"""

import functools

import jax
import jax.numpy as jnp

from models import remat


@functools.partial(jax.custom_vjp, nondiff_argnums=(3,))
def linear(
  x: jax.Array, w_IO: jax.Array, bias_O: jax.Array | None, dtype: jnp.dtype
) -> jax.Array:
  """Returns x[..., I] @ w[I, O] + bias[O], computed and returned in `dtype`."""
  y, _ = _forward(x, w_IO, bias_O, dtype)
  return y


def exact_linear(
  x: jax.Array, w_IO: jax.Array, bias_O: jax.Array | None, dtype: jnp.dtype
) -> jax.Array:
  """Returns x @ w in full float32: no TensorFloat-32, no bfloat16 passes."""
  del bias_O
  return jnp.matmul(
    x.astype(dtype), w_IO.astype(dtype), precision=jax.lax.Precision.HIGHEST
  )


def unembed(hidden: jax.Array, head_VD: jax.Array, dtype) -> jax.Array:
  """Returns float32 logits [..., V] of hidden states [..., D]."""
  return _contract(
    hidden.astype(dtype), head_VD.astype(dtype), (hidden.ndim - 1,), (1,)
  )


def matrix(stack: jax.Array, n: jax.Array) -> jax.Array:
  """Returns stack[n] in a loop over n."""
  # XLA:CPU slices bfloat16 in float32. Without the barrier it would convert the
  # whole stack before the loop, not one matrix in each iteration.
  stack, n = jax.lax.optimization_barrier((stack, n))
  return jax.lax.dynamic_index_in_dim(stack, n, keepdims=False)


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
  x, dy = materialised(x, dy.astype(dtype))  # read two and three times below
  leading = tuple(range(x.ndim - 1))
  dx = _product(dy, w_IO, (dy.ndim - 1,), (1,), x_like.dtype)
  dw_IO = weight_gradient(x, dy)
  dbias_O = None
  if bias_like is not None:
    # A sum over all tokens: bfloat16 would lose most of them.
    dbias_O = jnp.sum(dy, axis=leading, dtype=jnp.float32)
    dbias_O = dbias_O.astype(bias_like.dtype)
  return dx, dw_IO.astype(w_like.dtype), dbias_O


linear.defvjp(_forward, _backward)


def weight_gradient(x: jax.Array, dy: jax.Array) -> jax.Array:
  """Returns x[..., I]^T @ dy[..., O], [I, O], in float32."""
  leading = tuple(range(x.ndim - 1))
  if x.shape[-1] > dy.shape[-1]:
    # XLA:CPU transposes the left operand in memory, so the smaller one goes
    # left.
    (dw_OI,) = materialised(_contract(dy, x, leading, leading))
    return dw_OI.T
  return _contract(x, dy, leading, leading)


def _product(a, b, a_axes, b_axes, dtype):
  """Returns the product, summed over the given axes in float32, as `dtype`."""
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
  """Returns the product, summed over the given axes, in float32."""

  def product(a, b):
    return jax.lax.dot_general(
      a, b, ((a_axes, b_axes), ((), ())), preferred_element_type=jnp.float32
    )

  rows = [axis for axis in range(a.ndim) if axis not in a_axes]
  is_one_row = bool(rows) and all(a.shape[axis] == 1 for axis in rows)
  if not is_one_row or a.dtype != jnp.bfloat16:
    return product(a, b)
  # A vector times a matrix in bfloat16 would convert the whole matrix to
  # float32 in every call: 9 times the time (576 x 1536, a Xeon with AMX).
  return jax.lax.platform_dependent(
    a,
    b,
    cpu=lambda a, b: product(jnp.repeat(a, 2, rows[0]), b)[:1],
    default=product,
  )


def materialised(*arrays: jax.Array) -> tuple[jax.Array, ...]:
  """Returns the arrays; on CPU, their producers do not fuse into their readers.

  The backward pass reads the cotangent three times, and the weight gradient
  reads an operand transposed. Without the barrier, XLA:CPU repeats the
  elementwise work, or the sum over tiles of attention, in each reader, and very
  slowly in the transposed one. TPU and GPU fuse well and get no barrier.
  """
  return jax.lax.platform_dependent(
    *arrays,
    cpu=lambda *xs: jax.lax.optimization_barrier(xs),
    default=lambda *xs: xs,
  )
