"""Matrix multiplication with one weight per group of rows.

This is the product of a mixture of experts: rows are sorted by expert, and each
row is multiplied by the matrix of its expert. No row is dropped, for any sizes
of the groups. On TPU the product is `jax.lax.ragged_dot`, a kernel of the
compiler, with a Pallas kernel for the gradient of the weights.

On other platforms XLA's ragged_dot multiplies every row by every matrix
(measured on CPU: 14 times the time of a dense product with 8 experts, 120 times
with 32). There the rows are cut into pieces of one group each. On CPU a loop
takes one piece after the other (1.5 to 2.5 times a dense product). On GPU all
pieces, at most 3E, are one batch, because a loop would wait for each launch.

As in `models.linear.plain`, operands have the compute dtype and sums are
float32.
"""

from collections.abc import Callable
import functools

import jax
import jax.numpy as jnp

from models import remat
from models.linear import plain

# (gather, scatter) for a weight of which this device holds a part: gather makes
# the whole weight, scatter turns the gradient of the whole weight into the
# part's. Both are applied here for two reasons. The whole weight must not be
# stored for the backward pass. And the weight is sent in the compute dtype, but
# its gradient is added up in float32.
Held = tuple[Callable[[jax.Array], jax.Array], Callable[[jax.Array], jax.Array]]

# Pieces on CPU. With four pieces per group, about an eighth of the work is on
# padding. Pieces larger than _MAX_PIECE are not faster.
_PIECES_PER_GROUP = 4
_MAX_PIECE = 256
_MIN_BATCH_ROWS = 16  # on GPU: smaller products leave tensor cores idle

# Tiles on TPU: multiples of its 128 lanes. At 512, the buffers of the kernel
# and its float32 sum take 5 to 7 of the 16 MiB that a kernel may use.
_TILES = (512, 384, 256, 128)


def _identity(w: jax.Array) -> jax.Array:
  return w


WHOLE: Held = (_identity, _identity)


@functools.partial(jax.custom_vjp, nondiff_argnums=(3, 4))
def grouped_linear(
  x_JI: jax.Array,
  w_EIO: jax.Array,
  sizes_E: jax.Array,
  dtype: jnp.dtype,
  held: Held = WHOLE,
) -> jax.Array:
  """Returns y[J, O]: each row times the matrix of its group.

  Args:
    x_JI: rows, sorted by group: the rows of group 0, then of group 1, ...
    w_EIO: one matrix per group, or the part that this device holds.
    sizes_E: int32, rows of each group. Rows past the sum of the sizes are in no
      group; their result is zero.
    dtype: dtype of the operands and the result.
    held: see `Held`.
  """
  y_JO, _ = _forward(x_JI, w_EIO, sizes_E, dtype, held)
  return y_JO


def _forward(x_JI, w_EIO, sizes_E, dtype, held):
  gather, _ = held
  x_cast = x_JI.astype(dtype)
  y_JO = _times(x_cast, gather(w_EIO.astype(dtype)), sizes_E, w_axis=1)
  y_JO = remat.named_product(y_JO)
  # Zero-size arrays carry the input dtype through the residuals.
  return y_JO, (x_cast, w_EIO, sizes_E, jnp.zeros((0,), x_JI.dtype))


def _backward(dtype, held, residuals, dy_JO):
  x_JI, w_EIO, sizes_E, x_like = residuals
  gather, scatter = held
  dy_JO = dy_JO.astype(dtype)
  dx_JI = _times(dy_JO, gather(w_EIO.astype(dtype)), sizes_E, w_axis=2)
  dw_EIO = scatter(_outer(x_JI, dy_JO, sizes_E)).astype(w_EIO.dtype)
  return dx_JI.astype(x_like.dtype), dw_EIO, None


grouped_linear.defvjp(_forward, _backward)


def _times(x_JI, w_EIO, sizes_E, *, w_axis: int) -> jax.Array:
  """Returns each row times the matrix of its group, summed over `w_axis`."""
  times = _times_in if w_axis == 1 else _times_out
  return times(x_JI, w_EIO, sizes_E)


# Ragged products, and loops whose length depends on data, cannot be vmapped
# well. A pipeline does vmap them, over its stages. But each stage has its own
# device, so that a sequential vmap costs nothing.


@jax.custom_batching.sequential_vmap
def _times_in(x_JI, w_EIO, sizes_E):
  return _on_platform(x_JI, w_EIO, sizes_E, w_axis=1)


@jax.custom_batching.sequential_vmap
def _times_out(x_JO, w_EIO, sizes_E):
  return _on_platform(x_JO, w_EIO, sizes_E, w_axis=2)


def _on_platform(x_JI, w_EIO, sizes_E, *, w_axis):
  y_JO = jax.lax.platform_dependent(
    x_JI,
    w_EIO,
    sizes_E,
    cpu=functools.partial(_times_in_pieces, w_axis=w_axis),
    cuda=functools.partial(_times_in_batches, w_axis=w_axis),
    default=functools.partial(_times_ragged, w_axis=w_axis),
  )
  # The result of a kernel is undefined in rows of no group.
  is_grouped_J = jnp.arange(x_JI.shape[0]) < jnp.sum(sizes_E)
  return jnp.where(is_grouped_J[:, None], y_JO, 0)


@jax.custom_batching.sequential_vmap
def _outer(x_JI, dy_JO, sizes_E) -> jax.Array:
  """Returns the sum over the rows of each group of x times dy, [E, I, O]."""
  return jax.lax.platform_dependent(
    x_JI,
    dy_JO,
    sizes_E,
    cpu=_outer_in_pieces,
    cuda=_outer_in_batches,
    tpu=_outer_in_tiles,
    default=_outer_ragged,
  )


def _times_ragged(x_JI, w_EIO, sizes_E, *, w_axis):
  dimensions = jax.lax.RaggedDotDimensionNumbers(
    dot_dimension_numbers=(((1,), (w_axis,)), ((), ())),
    lhs_ragged_dimensions=[0],
    rhs_group_dimensions=[0],
  )
  return jax.lax.ragged_dot_general(
    x_JI, w_EIO, sizes_E, dimensions, preferred_element_type=x_JI.dtype
  )


def _outer_ragged(x_JI, dy_JO, sizes_E):
  dimensions = jax.lax.RaggedDotDimensionNumbers(
    dot_dimension_numbers=(((0,), (0,)), ((), ())),
    lhs_ragged_dimensions=[0],
    rhs_group_dimensions=[],
  )
  return jax.lax.ragged_dot_general(
    x_JI, dy_JO, sizes_E, dimensions, preferred_element_type=jnp.float32
  )


def _outer_in_tiles(x_JI, dy_JO, sizes_E, *, interpret: bool = False):
  """Returns `_outer` by JAX's Pallas kernel.

  XLA:TPU (jax 0.10) would multiply all rows for every group.
  """
  # Imported here: other platforms start without Pallas.
  from jax.experimental.pallas.ops.tpu.megablox.gmm import tgmm

  num_rows, num_groups = x_JI.shape[0], sizes_E.shape[0]
  tile_I, tile_O = _tile(x_JI.shape[1]), _tile(dy_JO.shape[1])
  if not tile_I or not tile_O:
    return _outer_ragged(x_JI, dy_JO, sizes_E)
  # A tile that two groups share is computed twice, so a tile is not larger than
  # the average group.
  tile_J = _TILES[0]
  while tile_J > max(_TILES[-1], num_rows // num_groups):
    tile_J //= 2
  padding = ((0, -num_rows % tile_J), (0, 0))
  return tgmm(
    jnp.pad(x_JI, padding).T,
    jnp.pad(dy_JO, padding),
    sizes_E,
    jnp.float32,
    (tile_J, tile_I, tile_O),
    interpret=interpret,
  )


def _tile(width: int) -> int | None:
  """Returns the largest tile that divides the width, or None."""
  return next((tile for tile in _TILES if width % tile == 0), None)


def _times_in_pieces(x_JI, w_EIO, sizes_E, *, w_axis):
  num_rows, size = x_JI.shape[0], _piece_size(x_JI.shape[0], w_EIO.shape[0])
  if w_EIO.dtype == jnp.bfloat16:
    size = max(size, 2)  # as in `models.linear.plain`
  num_pieces, piece_at, _ = pieces(sizes_E, size)
  x_padded = jnp.pad(x_JI, ((0, size), (0, 0)))

  def add_piece(j, y_JO):
    group, row = piece_at(j)
    y_piece = jax.lax.dot_general(
      jax.lax.dynamic_slice_in_dim(x_padded, row, size),
      plain.matrix(w_EIO, group),
      (((1,), (w_axis - 1,)), ((), ())),
      preferred_element_type=jnp.float32,
    )
    # Rows past the end of the group belong to the next group. The first piece
    # of that group is written later and overwrites them.
    return jax.lax.dynamic_update_slice_in_dim(
      y_JO, y_piece.astype(y_JO.dtype), row, 0
    )

  y_JO = jnp.zeros((num_rows + size, w_EIO.shape[3 - w_axis]), x_JI.dtype)
  return jax.lax.fori_loop(0, num_pieces, add_piece, y_JO)[:num_rows]


def _outer_in_pieces(x_JI, dy_JO, sizes_E):
  size = _piece_size(x_JI.shape[0], sizes_E.shape[0])
  num_pieces, piece_at, end_E = pieces(sizes_E, size)
  x_padded, dy_padded = (
    jnp.pad(rows, ((0, size), (0, 0))) for rows in (x_JI, dy_JO)
  )

  def add_piece(j, dw_EIO):
    group, row = piece_at(j)
    is_inside = row + jnp.arange(size) < end_E[group]
    # Both operands are masked: 0 x NaN is NaN.
    x_piece, dy_piece = (
      jnp.where(
        is_inside[:, None], jax.lax.dynamic_slice_in_dim(rows, row, size), 0
      )
      for rows in (x_padded, dy_padded)
    )
    dw_IO = jax.lax.dot_general(
      x_piece,
      dy_piece,
      (((0,), (0,)), ((), ())),
      preferred_element_type=jnp.float32,
    )
    return dw_EIO.at[group].add(dw_IO)

  shape = sizes_E.shape[0], x_JI.shape[1], dy_JO.shape[1]
  return jax.lax.fori_loop(
    0, num_pieces, add_piece, jnp.zeros(shape, jnp.float32)
  )


def _piece_size(num_rows: int, num_groups: int) -> int:
  """Returns the rows of a piece: a power of two, below the average group."""
  wanted = num_rows // (_PIECES_PER_GROUP * num_groups)
  return min(_MAX_PIECE, 1 << max(wanted.bit_length() - 1, 0))


def _times_in_batches(x_JI, w_EIO, sizes_E, *, w_axis):
  place_NS, group_N, row_J = _batches(x_JI.shape[0], sizes_E)
  # Unused pieces repeat some rows; their results are never read.
  y_NSO = jax.lax.dot_general(
    jnp.take(x_JI, place_NS, axis=0, mode='clip'),
    jnp.take(w_EIO, group_N, axis=0, mode='clip'),
    (((2,), (w_axis,)), ((0,), (0,))),
    preferred_element_type=jnp.float32,
  ).astype(x_JI.dtype)
  y_O = y_NSO.reshape((-1, y_NSO.shape[-1]))
  return jnp.take(y_O, row_J, axis=0, mode='clip')


def _outer_in_batches(x_JI, dy_JO, sizes_E):
  place_NS, group_N, _ = _batches(x_JI.shape[0], sizes_E)
  end_N = jnp.take(jnp.cumsum(sizes_E), group_N, mode='clip')
  is_inside_NS = (place_NS < end_N[:, None]) & (group_N < sizes_E.shape[0])[
    :, None
  ]
  x_NSI, dy_NSO = (
    jnp.where(
      is_inside_NS[..., None], jnp.take(rows, place_NS, axis=0, mode='clip'), 0
    )
    for rows in (x_JI, dy_JO)
  )
  dw_NIO = jax.lax.dot_general(
    x_NSI,
    dy_NSO,
    (((1,), (1,)), ((0,), (0,))),
    preferred_element_type=jnp.float32,
  )
  return jax.ops.segment_sum(
    dw_NIO, group_N, sizes_E.shape[0], indices_are_sorted=True
  )


def _batches(num_rows, sizes_E):
  """Cuts groups into a static number of pieces, N, the most there can be.

  Returns:
    The places of the rows of each piece, [N, S]; the group of each piece, [N],
    at least E for an unused piece; and the place of each row among the rows of
    all pieces, [J].
  """
  num_groups = sizes_E.shape[0]
  # A power of two, at least half the average group. Then at most 3E matrices
  # are copied, and padding at most doubles the rows that are multiplied.
  half_group = num_rows // (2 * num_groups)
  size = max(_MIN_BATCH_ROWS, 1 << (half_group - 1).bit_length())
  num_pieces = num_rows // size + num_groups
  _, piece_at, end_E = pieces(sizes_E, size)
  group_N, start_N = jax.vmap(piece_at)(jnp.arange(num_pieces))
  places_J = jnp.arange(num_rows)
  group_J = jnp.searchsorted(end_E, places_J, side='right')
  pieces_E = (sizes_E + size - 1) // size
  first_E = (jnp.cumsum(pieces_E) - pieces_E) * size - (end_E - sizes_E)
  row_J = jnp.take(first_E, group_J, mode='clip') + places_J
  return start_N[:, None] + jnp.arange(size)[None, :], group_N, row_J


def pieces(sizes_E, size):
  """Cuts each group into pieces of `size` rows; the last piece may be partial.

  Returns:
    The number of pieces, a function from the index of a piece to its (group,
    first row), and one past the last row of each group, [E].
  """
  end_E = jnp.cumsum(sizes_E)
  pieces_E = (sizes_E + size - 1) // size
  last_piece_E = jnp.cumsum(pieces_E)

  def piece_at(j):
    group = jnp.searchsorted(last_piece_E, j, side='right')
    nth = j - (last_piece_E[group] - pieces_E[group])
    return group, end_E[group] - sizes_E[group] + nth * size

  return last_piece_E[-1], piece_at, end_E
