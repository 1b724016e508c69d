"""The native product with a stored kernel: a port `Execution.stored`.

Of the experts of a mixture, one call multiplies all rows; experts that no row
has chosen are not read.

The weights have the same values as in the plain product
(`models/linear/stored/`). Weights and sums are float32 for every dtype of the
computation. The bits of a row do not depend on the other rows of the call.
"""

import dataclasses
from typing import Any

import jax
import jax.numpy as jnp

from models.linear.stored import (
  kernel as kernel_lib,
  packing,
  product,
  super_blocks,
)

# Numbers of the forms, as in `PartOf` of kernel.cc.
_NIBBLES = 1
_VALUES = {'int8': 0, 'fp8': 2}  # a byte each; all others are _NIBBLES
_BLOCKS = {
  name: number
  for number, name in enumerate(
    (
      'Q8_0', 'Q4_0', 'Q4_1', 'Q5_0', 'Q5_1', 'IQ4_NL',
      'Q2_K', 'Q3_K', 'Q4_K', 'Q5_K', 'Q6_K', 'IQ4_XS',
    ),
    start=3,
  )
}  # fmt: skip
# The numbers of the 16 codes of a form.
_BOOKS = {
  'uint4': tuple(float(code) for code in range(16)),
  'int4': tuple(float((code ^ 8) - 8) for code in range(16)),
  'nf4': packing.NF4,
  'fp4': packing.FP4,
  **dict.fromkeys(('IQ4_NL', 'IQ4_XS'), tuple(map(float, super_blocks.BOOK))),
}
_LANES = 16  # weights of a group that shares one scale
# As in scales.h.
_SCALES = 'float32', 'bfloat16', 'float16', 'float8_e4m3fn', 'float8_e8m0fnu'


def refusal(w_IO: product.Stored, dtype: Any) -> str:
  """Returns why the native product does not accept a kernel, '' if it does."""
  return product.refusal_of_own_code(w_IO, dtype, _LANES)


@dataclasses.dataclass(frozen=True)
class Port:
  """Multiplies natively, or as the plain product where that is refused."""

  target: str  # XLA's name of the function; it has the digest of its code
  instructions: str  # that the code uses

  def __call__(
    self,
    x: jax.Array,
    w_IO: product.Stored,
    dtype: Any,
    multiply: Any,
    sizes_E: jax.Array | None = None,
  ) -> jax.Array:
    """Returns x[..., I] @ w[I, O], see `product.in_blocks`; in float32."""
    if refusal(w_IO, dtype):
      return product.in_blocks(x, w_IO, dtype, multiply, sizes_E)
    if w_IO.order is not None:
      x = product.ordered(x, w_IO.order, sizes_E)
    sizes = jnp.zeros((0,), jnp.int32) if sizes_E is None else sizes_E
    rows_RI = x.astype(dtype).astype(jnp.float32).reshape(-1, x.shape[-1])
    none = jnp.zeros((0,), jnp.float32)
    tile, scales, gains, mins = (1, 1), none, none, none
    if isinstance(w_IO, kernel_lib.Kernel):
      form = _VALUES.get(w_IO.form, _NIBBLES)
      data, book, tile = w_IO.values, _BOOKS.get(w_IO.form), w_IO.tile
      scales = w_IO.scales
      if scales.dtype.name not in _SCALES:
        scales = scales.astype(jnp.float32)
      gains = none if w_IO.gain is None else w_IO.gain.reshape(-1)
      mins = none if w_IO.mins is None else w_IO.mins.astype(jnp.float32)
    else:
      form, data, book = _BLOCKS[w_IO.kind], w_IO.data, _BOOKS.get(w_IO.kind)
    book = jnp.asarray(book or (0.0,) * _LANES, jnp.float32)
    shape = jax.ShapeDtypeStruct(
      (rows_RI.shape[0], w_IO.shape[-1]), jnp.float32
    )
    y_RO = jax.ffi.ffi_call(self.target, shape, vmap_method='sequential')(
      rows_RI, data, scales, gains.astype(jnp.float32), mins, book, sizes,
      form=form, tile_out=tile[0], tile_in=tile[1],
    )  # fmt: skip
    return y_RO.reshape((*x.shape[:-1], w_IO.shape[-1]))
