"""Matrix multiplication by one weight per group of rows.

What a mixture of experts is made of: rows sorted by expert, each multiplied by
its own expert's matrix, none dropped whatever the sizes of the groups. On TPU
this is `jax.lax.ragged_dot`, a kernel of the compiler's, with a Pallas kernel
for the gradient of the weights. Elsewhere XLA multiplies every row by every
matrix (measured on CPU: 14 times a dense product with 8 experts, 120 times with
32). There rows are cut into blocks of one group each: taken one by one on CPU
(1.5 to 2.5 times), as one batch of at most 3E on GPU, where a loop would
wait for each launch.

As in `models.linear.plain`, operands have the compute dtype, sums float32.
"""

from collections.abc import Callable
import functools

import jax
from jax.experimental.pallas.ops.tpu.megablox.gmm import tgmm
import jax.numpy as jnp

from models import remat

# How a weight of which this device holds a part becomes whole, and how the
# gradient of the whole becomes that of the part. Done here, because the whole
# weight is not to wait for the backward pass, and because the weight travels
# in the compute dtype while its gradient is added up in float32.
Held = tuple[Callable[[jax.Array], jax.Array], Callable[[jax.Array], jax.Array]]

# Blocks on CPU: with four to a group, about an eighth of the work is on rows
# that do not count. Larger than this they gain nothing.
_BLOCKS_PER_GROUP = 4
_MAX_BLOCK = 256
_MIN_BATCH_ROWS = 16  # on GPU, where small products leave tensor cores idle

# Tiles on TPU: multiples of its 128 lanes. At 512 the kernel's buffers and its
# float32 sum take 5 to 7 of the 16 MiB that it may use.
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
  """Returns y[J, O]: row j times the matrix of the group that j is in.

  Args:
    x_JI: rows, those of group 0 first, then those of group 1, ...
    w_EIO: one matrix per group; what this device holds of them.
    sizes_E: int32, rows of each group. Rows past their sum are in no group:
      they come out as zeros.
    dtype: of the operands and the result.
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
  """Multiplies rows by their group's matrix, over its axis `w_axis`."""
  times = _times_in if w_axis == 1 else _times_out
  return times(x_JI, w_EIO, sizes_E)


# Neither ragged products nor loops of data-dependent length like to be
# vectorised. Stages of a pipeline, which are, have a device each: taking one
# after the other costs them nothing.


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
    cpu=functools.partial(_times_in_blocks, w_axis=w_axis),
    cuda=functools.partial(_times_in_batches, w_axis=w_axis),
    default=functools.partial(_times_ragged, w_axis=w_axis),
  )
  # What kernels leave in rows of no group is not defined.
  is_grouped_J = jnp.arange(x_JI.shape[0]) < jnp.sum(sizes_E)
  return jnp.where(is_grouped_J[:, None], y_JO, 0)


@jax.custom_batching.sequential_vmap
def _outer(x_JI, dy_JO, sizes_E) -> jax.Array:
  """Returns [E, I, O]: the sum over each group's rows of x times dy."""
  return jax.lax.platform_dependent(
    x_JI,
    dy_JO,
    sizes_E,
    cpu=_outer_in_blocks,
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
  """JAX's Pallas kernel: XLA:TPU (0.10) takes every group with all rows."""
  num_rows, num_groups = x_JI.shape[0], sizes_E.shape[0]
  tile_I, tile_O = _tile(x_JI.shape[1]), _tile(dy_JO.shape[1])
  if not tile_I or not tile_O:
    return _outer_ragged(x_JI, dy_JO, sizes_E)
  # A tile that two groups share is taken twice: no larger than a group.
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
  """Returns the largest tile that the width divides by, if any does."""
  return next((tile for tile in _TILES if width % tile == 0), None)


def _times_in_blocks(x_JI, w_EIO, sizes_E, *, w_axis):
  num_rows, size = x_JI.shape[0], _block_size(x_JI.shape[0], w_EIO.shape[0])
  num_blocks, block_at, _ = _blocks(sizes_E, size)
  x_padded = jnp.pad(x_JI, ((0, size), (0, 0)))

  def add_block(j, y_JO):
    group, row = block_at(j)
    y_block = jax.lax.dot_general(
      jax.lax.dynamic_slice_in_dim(x_padded, row, size),
      jax.lax.dynamic_index_in_dim(w_EIO, group, keepdims=False),
      (((1,), (w_axis - 1,)), ((), ())),
      preferred_element_type=jnp.float32,
    )
    # Rows past the group's end are the next group's: its own first block,
    # which is written later, puts them right.
    return jax.lax.dynamic_update_slice_in_dim(
      y_JO, y_block.astype(y_JO.dtype), row, 0
    )

  y_JO = jnp.zeros((num_rows + size, w_EIO.shape[3 - w_axis]), x_JI.dtype)
  return jax.lax.fori_loop(0, num_blocks, add_block, y_JO)[:num_rows]


def _outer_in_blocks(x_JI, dy_JO, sizes_E):
  size = _block_size(x_JI.shape[0], sizes_E.shape[0])
  num_blocks, block_at, end_E = _blocks(sizes_E, size)
  x_padded, dy_padded = (
    jnp.pad(rows, ((0, size), (0, 0))) for rows in (x_JI, dy_JO)
  )

  def add_block(j, dw_EIO):
    group, row = block_at(j)
    is_inside = row + jnp.arange(size) < end_E[group]
    x_block = jax.lax.dynamic_slice_in_dim(x_padded, row, size)
    dw_IO = jax.lax.dot_general(
      jnp.where(is_inside[:, None], x_block, 0),
      jax.lax.dynamic_slice_in_dim(dy_padded, row, size),
      (((0,), (0,)), ((), ())),
      preferred_element_type=jnp.float32,
    )
    return dw_EIO.at[group].add(dw_IO)

  shape = sizes_E.shape[0], x_JI.shape[1], dy_JO.shape[1]
  return jax.lax.fori_loop(
    0, num_blocks, add_block, jnp.zeros(shape, jnp.float32)
  )


def _block_size(num_rows: int, num_groups: int) -> int:
  """Returns a power of two, small beside the average group."""
  wanted = num_rows // (_BLOCKS_PER_GROUP * num_groups)
  return min(_MAX_BLOCK, 1 << max(wanted.bit_length() - 1, 0))


def _times_in_batches(x_JI, w_EIO, sizes_E, *, w_axis):
  place_NS, group_N, row_J = _batches(x_JI.shape[0], sizes_E)
  # Blocks past the last that is used repeat rows, which nobody reads.
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
  x_NSI = jnp.take(x_JI, place_NS, axis=0, mode='clip')
  dw_NIO = jax.lax.dot_general(
    jnp.where(is_inside_NS[..., None], x_NSI, 0),
    jnp.take(dy_JO, place_NS, axis=0, mode='clip'),
    (((1,), (1,)), ((0,), (0,))),
    preferred_element_type=jnp.float32,
  )
  return jax.ops.segment_sum(
    dw_NIO, group_N, sizes_E.shape[0], indices_are_sorted=True
  )


def _batches(num_rows, sizes_E):
  """Cuts groups into blocks, of which there are as many as there may be.

  Returns:
    For each block [N] the places of its rows [N, S] and its group, E or more
    where it is not used; for each row its place among the blocks' rows.
  """
  num_groups = sizes_E.shape[0]
  # A power of two, at least half the average group: up to 3E matrices are
  # copied, and at most as many rows multiplied for nothing as there are.
  half_group = num_rows // (2 * num_groups)
  size = max(_MIN_BATCH_ROWS, 1 << (half_group - 1).bit_length())
  num_blocks = num_rows // size + num_groups
  _, block_at, end_E = _blocks(sizes_E, size)
  group_N, start_N = jax.vmap(block_at)(jnp.arange(num_blocks))
  places_J = jnp.arange(num_rows)
  group_J = jnp.searchsorted(end_E, places_J, side='right')
  blocks_E = (sizes_E + size - 1) // size
  first_E = (jnp.cumsum(blocks_E) - blocks_E) * size - (end_E - sizes_E)
  row_J = jnp.take(first_E, group_J, mode='clip') + places_J
  return start_N[:, None] + jnp.arange(size)[None, :], group_N, row_J


def _blocks(sizes_E, size):
  """Cuts each group into blocks of `size` rows, the last one not full.

  Returns:
    How many blocks there are, a function from the number of a block to its
    (group, first row), and the row past the last of each group.
  """
  end_E = jnp.cumsum(sizes_E)
  blocks_E = (sizes_E + size - 1) // size
  last_block_E = jnp.cumsum(blocks_E)

  def block_at(j):
    group = jnp.searchsorted(last_block_E, j, side='right')
    nth = j - (last_block_E[group] - blocks_E[group])
    return group, end_E[group] - sizes_E[group] + nth * size

  return last_block_E[-1], block_at, end_E
