"""A kernel in 8 or 4 bits, which stands where a kernel W [in, out] stands.

The numbers that one output sums over lie together, as in the files of other
programs: rows of the stored arrays are columns of W. A tile of
(tile_out, tile_in) numbers shares a scale; the last tiles may be partial.

    values  [out, in]      int8, or float8_e4m3fn
            [out, in / 2]  uint8, two per byte, see packing.py
    scales  [out / tile_out, in / tile_in], any float dtype
    mins    None, or as scales: added after scaling
    order   None, or int32 [in]: column j of a row is of input order[j]
    gain    None, or a float32 number that multiplies all scales

    w[order[j], o] = number(values[o, j]) * scales * gain + mins

    form   number of a value
    int8   itself
    int4   two's complement, -8 to 7
    uint4  itself, 0 to 15
    nf4    of the book of QLoRA
    fp8    itself
    fp4    e2m1

Every array may have leading axes, as of layers or experts.
"""

import math
from typing import Any

import jax
import jax.numpy as jnp

from checks import expect
from models.linear.stored import packing

FORMS = ('int8', 'int4', 'uint4', 'nf4', 'fp8', 'fp4')
PACKED = ('int4', 'uint4', 'nf4', 'fp4')  # two per byte
ARRAYS = ('values', 'scales', 'mins', 'order', 'gain')
_BYTES = {'int8': jnp.int8, 'fp8': jnp.float8_e4m3fn}


@jax.tree_util.register_pytree_with_keys_class
class Kernel:
  """A quantised kernel W [..., in, out]; see the top of this file."""

  def __init__(
    self, values: Any, scales: Any, mins: Any, order: Any, gain: Any,
    form: str, tile: tuple[int, int],
  ):  # fmt: skip
    """Takes the fields as they are; `make` checks them."""
    self.values, self.scales, self.mins = values, scales, mins
    self.order, self.gain = order, gain
    self.form, self.tile = form, tile

  @classmethod
  def make(
    cls,
    values: Any,
    scales: Any,
    *,
    form: str,
    tile: tuple[int, int],
    mins: Any = None,
    order: Any = None,
    gain: Any = None,
  ) -> 'Kernel':
    """Returns a kernel of arrays, or of their shapes, that fit each other.

    Raises:
      ValueError: the arrays do not fit each other.
    """
    kernel = cls(values, scales, mins, order, gain, form, (tile[0], tile[1]))
    expect.one_of('form', form, FORMS)
    dtype = jnp.dtype(jnp.uint8 if form in PACKED else _BYTES[form])
    _expect('dtype of values', jnp.dtype(values.dtype), dtype)
    *leading, rows, columns = kernel.shape
    for side, size in zip(('tile_out', 'tile_in'), kernel.tile, strict=True):
      expect.at_least(side, size, 1)
    tiles = (-(-columns // kernel.tile[0]), -(-rows // kernel.tile[1]))
    for name, array, shape in (
      ('scales', scales, tiles),
      ('mins', mins, tiles),
      ('order', order, (rows,)),
      ('gain', gain, ()),
    ):
      if array is not None:
        _expect(f'shape of {name}', tuple(array.shape), (*leading, *shape))
    return kernel

  def tree_flatten_with_keys(self):
    """Returns the arrays by name, for JAX."""
    key = jax.tree_util.DictKey
    children = tuple((key(name), getattr(self, name)) for name in ARRAYS)
    return children, (self.form, self.tile)

  @classmethod
  def tree_unflatten(cls, static, children):
    """Returns the kernel of the arrays, for JAX."""
    return cls(*children, *static)

  @property
  def shape(self) -> tuple[int, ...]:
    """The shape of the kernel that is stored, [..., in, out]."""
    *leading, columns, width = self.values.shape
    return (*leading, width * (2 if self.form in PACKED else 1), columns)

  @property
  def ndim(self) -> int:
    """The number of axes of the kernel."""
    return len(self.values.shape)

  @property
  def nbytes(self) -> int:
    """Bytes of all arrays."""
    return sum(
      math.prod(x.shape) * jnp.dtype(x.dtype).itemsize
      for x in jax.tree.leaves(self)
    )

  @property
  def bits(self) -> float:
    """Bits per weight, scales included."""
    return 8 * self.nbytes / math.prod(self.shape)

  def matrix(self, n: Any) -> 'Kernel':
    """Returns matrix n of the first axis, by a static or traced number."""
    return jax.tree.map(
      lambda x: jax.lax.dynamic_index_in_dim(x, n, keepdims=False), self
    )

  def part(self, start: Any, size: int) -> 'Kernel':
    """Returns `size` columns of the kernel, from a static or traced one on."""

    if self.tile[0] > 1:  # the part may begin within a tile
      return self.columns(start + jnp.arange(size))
    values, scales, mins = (
      None
      if x is None
      else jax.lax.dynamic_slice_in_dim(x, start, size, x.ndim - 2)
      for x in (self.values, self.scales, self.mins)
    )
    return Kernel(
      values, scales, mins, self.order, self.gain, self.form, self.tile
    )

  def split(self, num: int, axis: int) -> list['Kernel']:
    """Returns `num` equal parts of a kernel [in, out].

    Args:
      num: of the parts.
      axis: 0 cuts inputs, of a kernel without an order, and 1 outputs. No
        tile may be cut: see `inference.engine.spread.stored`.
    """
    own = -1 - axis  # of the stored arrays, whose rows are outputs

    def parts(x: Any) -> list[Any]:
      if x is None or x.shape[own] == 1:  # one scale of all inputs
        return [x] * num
      return jnp.split(x, num, own)

    return [
      Kernel(values, scales, mins, self.order, self.gain, self.form, self.tile)
      for values, scales, mins in zip(
        parts(self.values), parts(self.scales), parts(self.mins), strict=True
      )
    ]

  def columns(self, ids: jax.Array) -> 'Kernel':
    """Returns the columns of the ids [n], in that order."""
    tile_out, tile_in = self.tile
    values, scales, mins = (
      None if x is None else jnp.take(x, rows, x.ndim - 2, mode='clip')
      for x, rows in (
        (self.values, ids),
        (self.scales, ids // tile_out),
        (self.mins, ids // tile_out),
      )
    )
    return Kernel(
      values, scales, mins, self.order, self.gain, self.form, (1, tile_in)
    )

  def rows(self, dtype: Any) -> jax.Array:
    """Returns the rows as they lie, dequantised in float32, [..., out, in]."""
    if self.form in PACKED:
      numbers = packing.unpack(self.values)
      if self.form == 'int4':
        numbers = packing.signed(numbers)
      elif self.form in ('nf4', 'fp4'):
        book = packing.NF4 if self.form == 'nf4' else packing.FP4
        numbers = packing.look_up(numbers, book)
    else:
      numbers = self.values
    *_, rows, columns = self.shape

    def of_each(of_tiles):
      return spread(of_tiles.astype(jnp.float32), self.tile, columns, rows)

    scales = with_gain(self.scales, self.gain)
    whole = numbers.astype(jnp.float32) * of_each(scales)
    if self.mins is not None:
      whole = whole + of_each(self.mins)
    return whole.astype(dtype)

  def whole(self, dtype: Any) -> jax.Array:
    """Returns the kernel, [..., in, out], dequantised in float32."""
    whole = self.rows(dtype)
    if self.order is not None:
      place = jnp.argsort(self.order, axis=-1)
      whole = jnp.take_along_axis(whole, place[..., None, :], axis=-1)
    return jnp.swapaxes(whole, -1, -2)


def with_gain(scales: jax.Array, gain: jax.Array | None) -> jax.Array:
  """Returns float32 scales [..., out / tile_out, in / tile_in]."""
  scales = scales.astype(jnp.float32)
  return scales if gain is None else scales * gain[..., None, None]


def spread(
  of_tiles: jax.Array, tile: tuple[int, int], columns: int, rows: int
) -> jax.Array:
  """Returns for each weight the value of its tile, [..., out, in]."""
  for axis, size, length in ((-2, tile[0], columns), (-1, tile[1], rows)):
    if size > 1:
      of_tiles = jnp.repeat(of_tiles, size, axis=axis)
      of_tiles = jax.lax.slice_in_dim(of_tiles, 0, length, axis=axis)
  return of_tiles


def _expect(name: str, got: Any, expected: Any) -> None:
  if got != expected:
    raise ValueError(
      f'{name}: got {got}, expected {expected}, so that all arrays of a'
      ' quantised kernel fit each other; check the file that they come from'
    )
