"""Rows of groups in tiles of equal size, for kernels that multiply by tiles.

Rows are sorted by group, as those of a mixture of experts. Each tile has rows
of one group; its last rows may be padding. A product with one matrix is a
product with one group, whose rows need not be gathered.
"""

from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np


class Tiles(NamedTuple):
  """P tiles of R rows each.

  Attributes:
    group_P: int32, the group of each tile.
    count_P: int32, rows of each tile, 0 of a tile that is not needed.
    source_PR: int32, the row of x in each place; any row in padding. None: rows
      are in their order.
    place_J: int32, the place of each row of x among all P times R, or None.
    is_grouped_J: whether a row is in a group, or None: all are.
  """

  group_P: jax.Array
  count_P: jax.Array
  source_PR: jax.Array | None = None
  place_J: jax.Array | None = None
  is_grouped_J: jax.Array | None = None

  def cut(self, x_JI: jax.Array, tile_rows: int) -> jax.Array:
    """Returns the rows of x in tiles, [P, R, I]. Padding has any numbers."""
    if self.source_PR is not None:
      return jnp.take(x_JI, self.source_PR, axis=0)
    num_rows, columns = x_JI.shape
    padded = jnp.pad(x_JI, ((0, -num_rows % tile_rows), (0, 0)))
    return padded.reshape(-1, tile_rows, columns)

  def joined(self, y_PRO: jax.Array, num_rows: int) -> jax.Array:
    """Returns the rows in the order of x, [J, O]; 0 where one has no group."""
    y_JO = y_PRO.reshape(-1, y_PRO.shape[-1])
    if self.place_J is None:
      return y_JO[:num_rows]
    assert self.is_grouped_J is not None
    y_JO = jnp.take(y_JO, self.place_J, axis=0)
    return jnp.where(self.is_grouped_J[:, None], y_JO, 0)


def of_matrix(num_rows: int, tile_rows: int) -> Tiles:
  """Returns the tiles of rows that one matrix multiplies."""
  start_P = np.arange(0, num_rows, tile_rows, dtype=np.int32)
  count_P = np.minimum(num_rows - start_P, tile_rows)
  return Tiles(jnp.zeros(start_P.shape, jnp.int32), jnp.asarray(count_P))


def of_groups(sizes_E: jax.Array, num_rows: int, tile_rows: int) -> Tiles:
  """Returns the tiles of rows that are sorted by group.

  Args:
    sizes_E: int32, rows of each group; their sum is at most num_rows.
    num_rows: J, rows of x.
    tile_rows: R, rows of a tile.
  """
  num_groups = sizes_E.shape[0]
  # A group ends with at most one tile that is not full.
  num_tiles = num_rows // tile_rows + min(num_rows, num_groups)
  tiles_E = -(-sizes_E // tile_rows)
  end_E, last_E = jnp.cumsum(sizes_E), jnp.cumsum(tiles_E)
  start_E, first_E = end_E - sizes_E, last_E - tiles_E
  group_P = _group(last_E, jnp.arange(num_tiles))
  offset_P = (jnp.arange(num_tiles) - first_E[group_P]) * tile_rows
  count_P = jnp.clip(sizes_E[group_P] - offset_P, 0, tile_rows)
  source_P = start_E[group_P] + offset_P
  source_PR = source_P[:, None] + jnp.arange(tile_rows)[None]
  row_J = jnp.arange(num_rows)
  group_J = _group(end_E, row_J)
  return Tiles(
    group_P,
    count_P.astype(jnp.int32),
    jnp.clip(source_PR, 0, num_rows - 1).astype(jnp.int32),
    first_E[group_J] * tile_rows + row_J - start_E[group_J],
    row_J < end_E[-1],
  )


def _group(end_E: jax.Array, number_N: jax.Array) -> jax.Array:
  group_N = jnp.searchsorted(end_E, number_N, side='right')
  return jnp.minimum(group_N, end_E.shape[0] - 1).astype(jnp.int32)
