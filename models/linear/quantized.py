"""Matrix multiplication by a weight in 8 bits, for faster training.

`int8` and `fp8` are ports of `models.execution.Execution`, in place of
`models.linear.plain.linear`. Operands are quantised during the product; the
weights stay float32. Each vector along the summed axis has its own scale, its
largest magnitude. Products accumulate in a wide dtype and are scaled back.
Rounding has a straight-through gradient: gradients are taken of the product, at
the quantised values.

    product          int8            fp8
    y = x w          int8 x int8     e4m3 x e4m3
    dx = dy w^T      int8 x int8     e5m2 x e4m3
    dw = x^T dy      compute dtype   e5m2 x e4m3

The gradient of a weight is a sum over tokens, and a few tokens are far larger
than the others. In int8, evenly spaced and rounded to nearest, most tokens
would become zero; e5m2 has the range for them (FP8 formats: Micikevicius et
al., arXiv:2209.05433, section 3; int8 training: Zhang et al.,
arXiv:2105.03536). Embedding, head, norms and the products inside attention are
not quantised.

The package qwix quantises and multiplies; it is imported at its first use.
"""

import functools
from typing import Any

import jax
import jax.numpy as jnp

from models import remat
from models.linear import plain

FORMATS = ('int8', 'fp8')

_FORWARD = {'int8': jnp.int8, 'fp8': jnp.float8_e4m3fn}
_COTANGENT = {'int8': jnp.int8, 'fp8': jnp.float8_e5m2}
_QUANTISES_WEIGHT_GRADIENT = {'int8': False, 'fp8': True}


def check_installed(field: str = 'execution.matmul') -> None:
  """Raises ValueError, naming the field, unless qwix can be imported."""
  try:
    qwix_module()
  except ImportError as error:
    raise ValueError(
      f'{field}: got {error}, expected qwix; pip install -r'
      f' requirements-quant.txt or set {field} = float'
    ) from error


def int8(
  x: jax.Array, w_IO: jax.Array, bias_O: jax.Array | None, dtype: Any
) -> jax.Array:
  """Returns x[..., I] @ w[I, O] + bias[O] in `dtype`, multiplied in int8."""
  return _linear(x, w_IO, bias_O, dtype, 'int8')


def fp8(
  x: jax.Array, w_IO: jax.Array, bias_O: jax.Array | None, dtype: Any
) -> jax.Array:
  """Returns x[..., I] @ w[I, O] + bias[O] in `dtype`, multiplied in fp8."""
  return _linear(x, w_IO, bias_O, dtype, 'fp8')


def _linear(x, w_IO, bias_O, dtype, form: str):
  y: Any = _product(x, w_IO, jnp.dtype(dtype), form)
  if bias_O is not None:
    y = y + bias_O.astype(dtype).reshape((1,) * (y.ndim - 1) + (-1,))
  return y


@functools.partial(jax.custom_vjp, nondiff_argnums=(2, 3))
def _product(x, w_IO, dtype, form: str):
  y, _ = _forward(x, w_IO, dtype, form)
  return y


def _forward(x, w_IO, dtype, form: str):
  y = _contract(x, w_IO, (x.ndim - 1,), (0,), (_FORWARD[form], _FORWARD[form]))
  y = remat.named_product(y.astype(dtype))
  return y, (x, w_IO)


def _backward(dtype, form: str, residuals, dy):
  x, w_IO = residuals
  x_dtype = x.dtype
  # As in the float product: otherwise XLA:CPU computes dy again in every
  # reader.
  x, dy = plain.materialised(x.astype(dtype), dy.astype(dtype))
  narrow = (_COTANGENT[form], _FORWARD[form])
  dx = _contract(dy, w_IO, (dy.ndim - 1,), (1,), narrow)
  leading = tuple(range(x.ndim - 1))
  if _QUANTISES_WEIGHT_GRADIENT[form]:
    dw_IO = _contract(dy, x, leading, leading, narrow).T
  else:
    dw_IO = plain.weight_gradient(x, dy)
  return dx.astype(x_dtype), dw_IO.astype(w_IO.dtype)


_product.defvjp(_forward, _backward)


def _contract(a, b, a_axes, b_axes, qtypes):
  """Returns the quantised product, summed over the given axes, in float32."""
  qwix = qwix_module()

  def quantised(array, axes, qtype):
    # From float32: scales computed in bfloat16 would have 8 bits.
    kept = tuple(axis for axis in range(array.ndim) if axis not in axes)
    return qwix.quantize(
      array.astype(jnp.float32), qtype, channelwise_axes=kept
    )

  return qwix.dot_general(
    quantised(a, a_axes, qtypes[0]),
    quantised(b, b_axes, qtypes[1]),
    ((a_axes, b_axes), ((), ())),
  )


def qwix_module() -> Any:
  """Returns the package qwix, which is imported at its first use."""
  import qwix  # noqa: PLC0415  takes seconds; an optional requirement

  return qwix
