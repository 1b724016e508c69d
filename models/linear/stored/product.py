"""The product with a stored kernel, in place of a kernel of floats.

`Execution.stored` says how it is computed: `in_blocks`, or natively on a CPU
(`models/linear/native/`).

On one device no float copy of a whole matrix is made, unless it is small:
blocks of columns are dequantised and multiplied one after the other. The
backward pass dequantises the blocks again. The input has a gradient, the kernel
has none.

Of a mixture of experts, a kernel has all matrices, [E, I, O], and rows are
sorted by expert (`grouped`). Only matrices that have rows are read: a loop
takes some rows of one matrix after the other, on every platform. On a GPU each
launch of this loop takes time that `models.linear.grouped` saves with floats.
That product has no gradient.
"""

from collections.abc import Callable
import functools
from typing import Any, Protocol, runtime_checkable

import jax
import jax.numpy as jnp

from models.linear import grouped as grouped_lib, plain
from models.linear.stored import (
  across as across_lib,
  blocks as blocks_lib,
  kernel as kernel_lib,
)

Stored = kernel_lib.Kernel | blocks_lib.Blocks
# (x[..., I], w_IO, dtype, multiply) -> y[..., O], in any float dtype; multiply
# is a port for a block of floats. (x_JI, w_EIO, dtype, multiply, sizes_E) ->
# y_JO: rows of group 0, then of group 1, ..., each times the matrix of its
# group.
Computed = Callable[..., jax.Array]

# (multiply, x, w_IO, pair) -> the product with a part of a kernel and of an
# adapter; multiply is the port for floats of one part.
OfPart = Callable[[Any, jax.Array, Any, Any], jax.Array]


@runtime_checkable
class Parts(Protocol):
  """A port of products whose kernels are cut into parts, as over devices."""

  def over_parts(
    self,
    of_part: OfPart,
    x: jax.Array,
    w_IO: Any,
    dtype: Any,
    pair: tuple[jax.Array, jax.Array] | None = None,
  ) -> jax.Array:
    """Returns the product, of parts each of which `of_part` computes.

    Args:
      of_part: computes one.
      x: the input.
      w_IO: a stored kernel or one of floats; None if the pair is all.
      dtype: of the result.
      pair: the matrices A [in, ...] and B [..., out] of an adapter, of which
        the one on the side that is cut is cut, too.
    """
    ...


class AcrossParts(Parts, Protocol):
  """A port of sums over parts, for kernels that cannot be cut so, too."""

  def across_parts(
    self, of_part: OfPart, x: jax.Array, w_IO: across_lib.Across, dtype: Any
  ) -> jax.Array:
    """Returns the product with a kernel of which parts have some outputs."""
    ...


_OWN_DTYPES = 'float32', 'bfloat16', 'float16'
# Bytes of a block of columns in float32, which fit a core's cache. A matrix of
# at most this size is one block.
_BLOCK_BYTES = 2**20
_COLUMNS = 16  # a block has a multiple of them
_MOST_ROWS = 256  # of a group that are multiplied together


def refusal_of_own_code(w: Stored, dtype: Any, least_tile: int) -> str:
  """Returns why neither native code nor a kernel of Pallas takes a kernel.

  Args:
    w: a stored kernel.
    dtype: dtype of the computation.
    least_tile: inputs that share a scale, of `kernel.Kernel`: a multiple of it.

  Returns:
    '' if one may; each has further limits.
  """
  name = jnp.dtype(dtype).name
  if name not in _OWN_DTYPES:
    return f'got dtype {name}, expected one of {_OWN_DTYPES}'
  if w.ndim not in (2, 3):
    return f'got a kernel of {w.ndim} axes, expected 2, or 3 of experts'
  if jax.sharding.get_abstract_mesh().size > 1:
    return 'got a mesh of several devices, expected one device'
  if isinstance(w, kernel_lib.Kernel):
    tile_in = w.tile[1]
    if tile_in % least_tile and tile_in < w.shape[-2]:
      return (
        f'got a scale per {tile_in} inputs, expected a multiple of {least_tile}'
      )
  return ''


def in_blocks(
  x: jax.Array,
  w: Stored,
  dtype: Any,
  multiply: Any,
  sizes_E: jax.Array | None = None,
) -> jax.Array:
  """Returns the product, one block of columns after the other.

  Args:
    x: the input, [..., I].
    w: a stored kernel.
    dtype: dtype of a block of floats, and of the computation.
    multiply: (x, w_IB, None, dtype) -> y[..., B], for a block of floats.
    sizes_E: see `grouped`; None: the kernel is one matrix.
  """
  if sizes_E is None:
    return _in_blocks(x, w, dtype, multiply)
  return _in_pieces(x, w, dtype, multiply, sizes_E)


def _in_blocks(
  x: jax.Array, w: Stored, dtype: Any, multiply: Any, group: Any = None
) -> jax.Array:
  """Returns the product with a matrix, or with that of a group in w."""
  if w.order is not None:
    order = w.order if group is None else plain.matrix(w.order, group)
    x = jnp.take(x, order, axis=-1)
  columns, size = w.shape[-1], _block_columns(w)

  def block(start, size):
    return multiply(x, _block(w, start, size, dtype, group), None, dtype)

  if size == columns:
    if group is not None:
      return block(0, size)
    return multiply(x, w.rows(dtype).T, None, dtype)
  y = jax.lax.map(
    lambda start: block(start, size), jnp.arange(0, columns - size + 1, size)
  )
  y = jnp.moveaxis(y, 0, -2).reshape((*x.shape[:-1], -1))
  if rest := columns % size:
    y = jnp.concatenate([y, block(columns - rest, rest)], axis=-1)
  return y


def ordered(
  x: jax.Array, order: jax.Array, sizes_E: jax.Array | None = None
) -> jax.Array:
  """Returns rows in the order of a kernel's inputs, or of their group's.

  Args:
    x: the input, [..., I], or [J, I] of groups.
    order: int32 [I], or [E, I] of groups.
    sizes_E: int32, rows of each group; None: the kernel is one matrix.
  """
  if sizes_E is None:
    return jnp.take(x, order, axis=-1)
  end_E = jnp.cumsum(sizes_E)
  group_J = jnp.searchsorted(end_E, jnp.arange(x.shape[0]), side='right')
  order_JI = jnp.take(order, group_J, axis=0, mode='clip')
  return jnp.take_along_axis(x, order_JI, axis=-1)


def linear(
  x: jax.Array,
  w_IO: Any,
  bias_O: jax.Array | None,
  dtype: Any,
  multiply: Any = plain.linear,
  computed: Computed = in_blocks,
) -> jax.Array:
  """Returns x[..., I] @ w[I, O] + bias[O], computed and returned in `dtype`.

  Args:
    x: the input.
    w_IO: a stored kernel.
    bias_O: the bias, or None.
    dtype: dtype of the result.
    multiply: the port that multiplies by a block of floats; of `Parts` if the
      kernel is cut over devices in a way that the product has to know.
    computed: `Execution.stored`.
  """

  def of_part(multiply: Any, x: jax.Array, w_IO: Stored, _=None) -> jax.Array:
    return computed(x, w_IO, dtype, multiply).astype(dtype)

  y: Any
  if isinstance(w_IO, across_lib.Across):
    y = multiply.across_parts(of_part, x, w_IO, dtype)
  elif isinstance(multiply, Parts):
    y = multiply.over_parts(of_part, x, w_IO, dtype)
  else:
    y = _product(x, w_IO, jnp.dtype(dtype), multiply, computed)
  if bias_O is not None:
    y = y + bias_O.astype(dtype).reshape((1,) * (y.ndim - 1) + (-1,))
  return y


def grouped(
  x_JI: jax.Array,
  w_EIO: Any,
  sizes_E: jax.Array,
  dtype: Any,
  multiply: Any = plain.linear,
  computed: Computed = in_blocks,
) -> jax.Array:
  """Returns y[J, O]: each row times the matrix of its group, in `dtype`.

  Args:
    x_JI: rows, sorted by group: the rows of group 0, then of group 1, ...
    w_EIO: a kernel with a matrix per group; stored, or floats, if they are
      multiplied as stored ones are.
    sizes_E: int32, rows of each group. Rows past the sum of the sizes are in no
      group; their result is zero.
    dtype: dtype of the computation and the result.
    multiply: the port that multiplies by a block of floats; of `Parts` if the
      kernel is cut over devices in a way that the product has to know.
    computed: `Execution.stored`.
  """

  def of_part(multiply: Any, x_JI: jax.Array, w_EIO: Any, _=None) -> jax.Array:
    product = computed if isinstance(w_EIO, Stored) else _in_pieces
    y_JO = product(x_JI, w_EIO, jnp.dtype(dtype), multiply, sizes_E)
    return y_JO.astype(dtype)

  if isinstance(w_EIO, across_lib.Across):
    return multiply.across_parts(of_part, x_JI, w_EIO, dtype)
  if isinstance(multiply, Parts):
    return multiply.over_parts(of_part, x_JI, w_EIO, dtype)
  return of_part(multiply, x_JI, w_EIO)


def _in_pieces(x_JI, w_EIO, dtype, multiply, sizes_E) -> jax.Array:
  """Returns `grouped`: some rows of one group after the other."""
  num_rows, columns = x_JI.shape[0], w_EIO.shape[-1]
  size = _piece_rows(num_rows, sizes_E.shape[0])
  num_pieces, piece_at, _ = grouped_lib.pieces(sizes_E, size)
  x_padded = jnp.pad(x_JI, ((0, size), (0, 0)))

  def add_piece(j, y_JO):
    group, row = piece_at(j)
    x_piece = jax.lax.dynamic_slice_in_dim(x_padded, row, size)
    if isinstance(w_EIO, Stored):
      y_piece = _in_blocks(x_piece, w_EIO, dtype, multiply, group)
    else:
      y_piece = multiply(x_piece, plain.matrix(w_EIO, group), None, dtype)
    # Rows past the end of the group belong to the next group. The first piece
    # of that group is written later and overwrites them.
    return jax.lax.dynamic_update_slice_in_dim(
      y_JO, y_piece.astype(dtype), row, 0
    )

  y_JO = jnp.zeros((num_rows + size, columns), dtype)
  y_JO = jax.lax.fori_loop(0, num_pieces, add_piece, y_JO)[:num_rows]
  is_grouped_J = jnp.arange(num_rows) < jnp.sum(sizes_E)
  return jnp.where(is_grouped_J[:, None], y_JO, 0)


def _piece_rows(num_rows: int, num_groups: int) -> int:
  """Returns the rows of a piece, a power of two."""
  # One row is multiplied while it is dequantised: on a CPU three of them take
  # as long as two together, for which XLA writes the floats of a block first.
  if num_rows <= 2 * num_groups:
    return 1
  # Twice the average group: most groups are one piece, and each piece
  # dequantises its matrix, which takes as long as some 50 rows on a CPU.
  wanted = -(-2 * num_rows // num_groups)
  return min(_MOST_ROWS, 1 << (wanted - 1).bit_length())


def unembed(
  hidden: jax.Array,
  table_DV: Stored,
  dtype: Any,
  port: Any = plain.unembed,
  computed: Computed = in_blocks,
) -> jax.Array:
  """Returns float32 logits [..., V] of hidden states [..., D].

  Args:
    hidden: final hidden states.
    table_DV: the table of the head, as the kernel of this product.
    dtype: dtype of the computation.
    port: `Execution.unembed`.
    computed: `Execution.stored`.
  """

  def of_part(port: Any, hidden: jax.Array, table_DV: Stored, _=None):
    def multiply(x, w_IB, _, dtype):
      return port(x, w_IB.T, dtype)

    return computed(hidden, table_DV, dtype, multiply)

  if isinstance(port, Parts):
    return port.over_parts(of_part, hidden, table_DV, jnp.float32)
  return of_part(port, hidden, table_DV)


@functools.partial(jax.custom_vjp, nondiff_argnums=(2, 3, 4))
def _product(x, w_IO, dtype, multiply, computed):
  return computed(x, w_IO, dtype, multiply).astype(dtype)


def _forward(x, w_IO, dtype, multiply, computed):
  # A zero-size array carries the dtype of the input through the residuals.
  y = _product(x, w_IO, dtype, multiply, computed)
  return y, (w_IO, jnp.zeros((0,), x.dtype))


def _backward(dtype, multiply, computed, residuals, dy):
  del multiply, computed
  w_IO, x_like = residuals
  rows, columns = w_IO.shape
  size = _block_columns(w_IO)

  def add_block(dx, start, size):
    dy_block = jax.lax.dynamic_slice_in_dim(dy, start, size, dy.ndim - 1)
    w_IB = _block(w_IO, start, size, dtype)
    return dx + plain.unembed(dy_block, w_IB, dtype)

  if size == columns:
    dx = plain.unembed(dy, w_IO.rows(dtype).T, dtype)
  else:
    dx = jax.lax.fori_loop(
      0,
      columns // size,
      lambda n, dx: add_block(dx, n * size, size),
      jnp.zeros((*dy.shape[:-1], rows), jnp.float32),
    )
    if rest := columns % size:
      dx = add_block(dx, columns - rest, rest)
  if w_IO.order is not None:
    dx = jnp.take(dx, jnp.argsort(w_IO.order), axis=-1)
  return dx.astype(x_like.dtype), None


_product.defvjp(_forward, _backward)


def _block(
  w: Stored, start: Any, size: int, dtype: Any, group: Any = None
) -> jax.Array:
  """Returns columns of a matrix, transposed: floats, [in, size]."""
  # Without the barrier XLA:CPU would convert all numbers of 8 bits to 16 bits
  # before the loop over blocks.
  w, start, group = jax.lax.optimization_barrier((w, start, group))
  if group is not None:
    w = w.matrix(group)
  return w.part(start, size).rows(dtype).T


def _block_columns(w: Stored) -> int:
  """Returns the columns of a block: all, or some that fit a cache."""
  rows, columns = w.shape[-2:]
  mesh = jax.sharding.get_abstract_mesh()
  if mesh.size > 1 and not mesh.are_all_axes_manual:
    return columns  # the devices of a mesh may each have a part of the columns
  if 4 * rows * columns <= _BLOCK_BYTES:
    return columns
  fitting = _BLOCK_BYTES // (4 * rows)
  return min(columns, max(fitting // _COLUMNS, 1) * _COLUMNS)
