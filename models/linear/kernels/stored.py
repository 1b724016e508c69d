"""Products with stored kernels by Pallas: what GPU and TPU share.

A weight is a number of few bits times the scale of its tile. The numbers are
exact in 16 bits, except those of nf4, so they are multiplied first, and the sum
over a tile's inputs is scaled, in float32. This rounds less than weights that
are scaled first, and scales once per output in place of once per weight. A
minimum is added once per tile, times the sum of the inputs.

Codes of four bits stay packed: inputs 2i and 2i + 1 of a row share byte i.
So x is cut into its even and its odd columns, each of which meets one half of
all bytes.
"""

from collections.abc import Callable
import math
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp

from models.linear.kernels import tiles as tiles_lib
from models.linear.stored import (
  blocks as blocks_lib,
  kernel as kernel_lib,
  packing,
  product,
)

BOOKS = {'nf4': packing.NF4, 'fp4': packing.FP4}
LEAST_TILE = 16  # bytes of inputs that share a scale: rows of a tensor core
_MOST_BYTES = 2**31  # addresses within an array have 32 bits


class Operands(NamedTuple):
  """The arrays of a product, with K bytes per row of the store.

  Attributes:
    x_HPRK: tiles of rows, of even and of odd inputs if codes are packed (H 2).
    values_EOK: of the store.
    scales_EUT: of U tiles of outputs and T of inputs, in their own dtype; those
      that `scales` decodes as bits.
    mins_EUT: float32, or None.
    gain_E: float32, or None.
    tiles: of the rows.
  """

  x_HPRK: jax.Array
  values_EOK: jax.Array
  scales_EUT: jax.Array
  mins_EUT: jax.Array | None
  gain_E: jax.Array | None
  tiles: tiles_lib.Tiles


def refusal(w_IO: product.Stored, dtype: Any) -> str:
  """Returns why no kernel accepts a stored kernel, '' if one may."""
  if isinstance(w_IO, blocks_lib.Blocks):
    return (
      f'got blocks {w_IO.kind}, whose scales lie between codes, expected scales'
      ' apart; import the file on this machine with --weights=auto'
    )
  least = LEAST_TILE * (2 if w_IO.form in kernel_lib.PACKED else 1)
  if found := product.refusal_of_own_code(w_IO, dtype, least):
    return found
  if math.prod(w_IO.values.shape) >= _MOST_BYTES:
    return f'got values of {_MOST_BYTES} bytes or more, expected fewer'
  return ''


class Port:
  """A port `Execution.stored`; where a kernel is refused, the plain product.

  GPU and TPU have their own refusal, tiles of rows, and kernel.
  """

  def refusal(self, w_IO: product.Stored, dtype: Any) -> str:
    """Returns why the kernel does not accept a stored one, '' if it does."""
    raise NotImplementedError

  def tile_rows(
    self, num_rows: int, w_IO: kernel_lib.Kernel, dtype: Any
  ) -> int:
    """Returns the rows of a tile, for so many rows of a matrix."""
    raise NotImplementedError

  def multiply(self, given: 'Operands', w_IO: kernel_lib.Kernel) -> jax.Array:
    """Returns y[P, R, O] in float32."""
    raise NotImplementedError

  def __call__(
    self,
    x: jax.Array,
    w_IO: product.Stored,
    dtype: Any,
    multiply: Any,
    sizes_E: jax.Array | None = None,
  ) -> jax.Array:
    """Returns x[..., I] @ w[I, O], see `product.in_blocks`; in float32."""
    num_rows = x.size // max(x.shape[-1], 1)
    if self.refusal(w_IO, dtype) or not num_rows:
      return product.in_blocks(x, w_IO, dtype, multiply, sizes_E)
    assert isinstance(w_IO, kernel_lib.Kernel)
    num_groups = 1 if sizes_E is None else sizes_E.shape[0]
    tile_rows = self.tile_rows(-(-num_rows // num_groups), w_IO, dtype)
    given = operands(x, w_IO, dtype, sizes_E, tile_rows)
    y_JO = given.tiles.joined(self.multiply(given, w_IO), num_rows)
    return y_JO.reshape((*x.shape[:-1], w_IO.shape[-1]))


def operands(
  x: jax.Array,
  w_IO: kernel_lib.Kernel,
  dtype: Any,
  sizes_E: jax.Array | None,
  tile_rows: int,
) -> Operands:
  """Returns the arrays of x[..., I] @ w[I, O], or of a product of groups."""
  if w_IO.order is not None:
    x = product.ordered(x, w_IO.order, sizes_E)
  rows_JI = x.astype(dtype).reshape(-1, x.shape[-1])
  num_rows = rows_JI.shape[0]
  if sizes_E is None:
    w_IO = jax.tree.map(lambda leaf: leaf[None], w_IO)
    tiles = tiles_lib.of_matrix(num_rows, tile_rows)
  else:
    tiles = tiles_lib.of_groups(sizes_E, num_rows, tile_rows)
  rows_PRI = tiles.cut(rows_JI, tile_rows)
  if w_IO.form in kernel_lib.PACKED:
    x_HPRK = jnp.stack([rows_PRI[..., ::2], rows_PRI[..., 1::2]])
  else:
    x_HPRK = rows_PRI[None]
  mins, gain = w_IO.mins, w_IO.gain
  return Operands(
    x_HPRK,
    w_IO.values,
    readable(w_IO.scales),
    None if mins is None else mins.astype(jnp.float32),
    None if gain is None else gain.astype(jnp.float32),
    tiles,
  )


def readable(array: jax.Array) -> jax.Array:
  """Returns floats of dtypes that some device cannot read, as their bits."""
  name = jnp.dtype(array.dtype).name
  if name == 'float16':
    return jax.lax.bitcast_convert_type(array, jnp.uint16)
  if name.startswith('float8'):
    return jax.lax.bitcast_convert_type(array, jnp.uint8)
  return array


def numbers(
  values: jax.Array,
  form: str,
  half: int,
  look_up: Callable[[jax.Array, tuple[float, ...]], jax.Array],
) -> jax.Array:
  """Returns the numbers of values or codes in float32.

  Args:
    values: int8, or uint8 codes.
    form: of `kernel.FORMS`.
    half: 0 or 1, the low or the high bits of packed codes.
    look_up: finds codes of four bits in a book.
  """
  if form == 'int8':
    return values.astype(jnp.float32)
  codes = values.astype(jnp.int32)
  if form == 'fp8':
    return _of_e4m3(codes)
  codes = codes >> 4 if half else codes & 15
  if form == 'int4':
    codes = (codes ^ 8) - 8
  if form in BOOKS:
    return look_up(codes, BOOKS[form])
  return codes.astype(jnp.float32)


def scales(values: jax.Array, dtype: Any) -> jax.Array:
  """Returns scales in float32, of `Operands` and the dtype of the kernel's."""
  decode = _DECODED.get(jnp.dtype(dtype).name)
  if decode is None:
    return values.astype(jnp.float32)
  return decode(values.astype(jnp.int32))


def _of_float16(codes: jax.Array) -> jax.Array:
  """Returns the numbers of float16, int32 0 to 65535."""
  magnitude = codes & 0x7FFF
  bias = jnp.where(magnitude < 0x7C00, 112 << 23, 224 << 23)  # 2nd: not finite
  normal = jax.lax.bitcast_convert_type((magnitude << 13) + bias, jnp.float32)
  small = magnitude.astype(jnp.float32) * 2.0**-24
  found = jnp.where(magnitude < 0x400, small, normal)
  return jnp.where(codes < 0x8000, found, -found)


def _of_e8m0(codes: jax.Array) -> jax.Array:
  """Returns the powers of two of float8_e8m0fnu, int32 0 to 255."""
  bits = jnp.where(codes == 0, 1 << 22, codes << 23)
  found = jax.lax.bitcast_convert_type(bits, jnp.float32)
  return jnp.where(codes == 255, jnp.nan, found)


def _of_e4m3(codes: jax.Array) -> jax.Array:
  """Returns the numbers of float8_e4m3fn, int32 0 to 255."""
  magnitude = codes & 127
  normal = jax.lax.bitcast_convert_type(
    (magnitude << 20) + (120 << 23), jnp.float32
  )
  small = magnitude.astype(jnp.float32) * 2.0**-9
  found = jnp.where(magnitude < 8, small, normal)
  found = jnp.where(magnitude == 127, jnp.nan, found)
  return jnp.where(codes < 128, found, -found)


_DECODED = {
  'float16': _of_float16,
  'float8_e4m3fn': _of_e4m3,
  'float8_e8m0fnu': _of_e8m0,
}


def dot(a_MK: jax.Array, b_NK: jax.Array) -> jax.Array:
  """Returns a @ b.T in float32, which stays float32 on every device."""
  is_float32 = a_MK.dtype == jnp.float32
  return jax.lax.dot_general(
    a_MK,
    b_NK,
    (((1,), (1,)), ((), ())),
    precision=jax.lax.Precision.HIGHEST if is_float32 else None,
    preferred_element_type=jnp.float32,
  )
