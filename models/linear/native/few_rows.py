"""The native product of few rows with floats: ports of an `Execution`.

XLA:CPU multiplies one row of float32 while it reads the weights. From two rows
on it takes 1.4 times as long, or more. Here up to 8 rows take about as long as
one: small batches and the verification of drafts. More rows are multiplied by
the plain product, and so is one row of float32.

Sums are float32, and the bits of a row do not depend on the other rows of the
call, of which there are at most 8.
"""

import dataclasses
from typing import Any

import jax
import jax.numpy as jnp

from models.linear import plain

MOST_ROWS = 8
# Measured with weights that no processor's cache holds. Smaller ones may stay
# in a cache: reading them again takes no time that could be saved.
LEAST_BYTES = 64 << 20
_DTYPES = 'float32', 'bfloat16'


def refusal(weight_dtype: Any, dtype: Any) -> str:
  """Returns why the native product does not accept dtypes, '' if it does.

  Args:
    weight_dtype: of the weights.
    dtype: of the computation, to which weights must not be rounded.
  """
  weight_dtype, dtype = jnp.dtype(weight_dtype), jnp.dtype(dtype)
  for each in (weight_dtype, dtype):
    if each.name not in _DTYPES:
      return f'got dtype {each.name}, expected one of {", ".join(_DTYPES)}'
  if weight_dtype.itemsize > dtype.itemsize:
    return f'got weights of {weight_dtype.name} in {dtype.name}'
  return ''


@dataclasses.dataclass(frozen=True)
class Linear:
  """The port `linear`, for a few rows; for more, the plain one."""

  target: str  # XLA's name of the function; it has the digest of its code
  is_transposed: bool  # kernels lie in memory as [O, I], see `models.layout`

  def __call__(
    self, x: jax.Array, w_IO: jax.Array, bias_O: jax.Array | None, dtype: Any
  ) -> jax.Array:
    """Returns x[..., I] @ w[I, O] + bias[O] in `dtype`."""
    if not _is_for_few(x, w_IO, dtype):
      return plain.linear(x, w_IO, bias_O, dtype)
    weights = w_IO.T if self.is_transposed else w_IO
    y = _multiplied(self.target, x, weights, dtype, self.is_transposed)
    y = y.astype(dtype)
    if bias_O is not None:
      y = y + bias_O.astype(dtype).reshape((1,) * (y.ndim - 1) + (-1,))
    return y


@dataclasses.dataclass(frozen=True)
class Unembed:
  """The port `unembed`, for a few rows; for more, the plain one."""

  target: str

  def __call__(
    self, hidden: jax.Array, head_VD: jax.Array, dtype: Any
  ) -> jax.Array:
    """Returns float32 logits [..., V] of hidden states [..., D]."""
    if not _is_for_few(hidden, head_VD, dtype):
      return plain.unembed(hidden, head_VD, dtype)
    return _multiplied(self.target, hidden, head_VD, dtype, is_along=True)


def most_logits(unembed: Any) -> int:
  """Returns the most rows that a port multiplies natively; 0: there is none."""
  return MOST_ROWS if isinstance(unembed, Unembed) else 0


def _is_for_few(x: jax.Array, weights: jax.Array, dtype: Any) -> bool:
  num_rows = x.size // max(x.shape[-1], 1)
  least = 2 if weights.dtype == jnp.float32 else 1
  return (
    weights.ndim == 2
    and least <= num_rows <= MOST_ROWS
    and not refusal(weights.dtype, dtype)
  )


def _multiplied(
  target: str, x: jax.Array, weights: jax.Array, dtype: Any, is_along: bool
) -> jax.Array:
  """Returns x[..., I] times weights [O, I] if they lie along, else [I, O]."""
  rows_RI = x.astype(dtype).astype(jnp.float32).reshape(-1, x.shape[-1])
  outputs = weights.shape[0 if is_along else 1]
  shape = jax.ShapeDtypeStruct((rows_RI.shape[0], outputs), jnp.float32)
  y_RO = jax.ffi.ffi_call(target, shape, vmap_method='sequential')(
    rows_RI, weights, is_along=is_along
  )
  return y_RO.reshape((*x.shape[:-1], outputs))
