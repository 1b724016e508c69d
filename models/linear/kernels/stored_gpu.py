"""Products with stored kernels on GPU: a Pallas kernel, by Triton.

`Port` is a port `Execution.stored`. A program computes a tile of rows for some
outputs: it reads a piece of their weights, makes numbers of them in registers,
multiplies, and scales the sum. Few rows leave most of a GPU idle, so several
programs share the inputs, and their sums are added up. How many follows from
the shapes of a call: the last bits of a row may differ when other rows join.
"""

import dataclasses
import functools

import jax
from jax.experimental import pallas as pl
from jax.experimental.pallas import triton
import jax.numpy as jnp

from models.linear.kernels import stored
from models.linear.stored import kernel as kernel_lib

# Tensor cores multiply at least 16 rows.
MIN_ROWS, MAX_ROWS = 16, 64
_OUTPUTS, _NUM_WARPS, _NUM_STAGES = 64, 4, 4
_MOST_INPUTS = 128  # of a piece of weights
# Two programs for each multiprocessor of an H100, and the fewest pieces that
# are worth a program.
_WANTED_PROGRAMS, _LEAST_PIECES = 264, 4


refusal = stored.refusal


@dataclasses.dataclass(frozen=True)
class Port(stored.Port):
  """Multiplies by the kernel."""

  interpret: bool = False  # on any device, slowly; for tests

  def refusal(self, w_IO, dtype):
    return stored.refusal(w_IO, dtype)

  def tile_rows(self, num_rows, w_IO, dtype):
    return min(MAX_ROWS, max(MIN_ROWS, pl.next_power_of_2(num_rows)))

  def multiply(self, given, w_IO):
    return _multiply(given, w_IO, self.interpret)


def _multiply(
  given: stored.Operands, w_IO: kernel_lib.Kernel, interpret: bool
) -> jax.Array:
  """Returns y[P, R, O] in float32."""
  halves, num_tiles, tile_rows, width = given.x_HPRK.shape
  outputs = given.values_EOK.shape[1]
  tile = w_IO.tile[1] // halves  # bytes
  if given.scales_EUT.shape[2] == 1:  # one of a whole row
    tile = pl.next_power_of_2(width)
  # The largest power of two in a tile: a piece has one scale per output.
  piece = min(tile & -tile, _MOST_INPUTS // halves)
  num_pieces = pl.cdiv(width, piece)
  grid = num_tiles, pl.cdiv(outputs, _OUTPUTS)
  shares = -(-_WANTED_PROGRAMS // (grid[0] * grid[1]))
  # At most as many bytes of partial sums as of weights.
  most = min(num_pieces // _LEAST_PIECES, width // (4 * num_tiles * tile_rows))
  shares = max(1, min(shares, most))
  book = stored.BOOKS.get(w_IO.form, (0.0,) * 16)
  y_SPRO = pl.pallas_call(
    functools.partial(
      _kernel,
      form=w_IO.form,
      of_scales=w_IO.scales.dtype.name,
      tile_out=w_IO.tile[0],
      tile=tile,
      piece=piece,
    ),
    grid=(*grid, shares),
    out_shape=jax.ShapeDtypeStruct(
      (shares, num_tiles, tile_rows, outputs), jnp.float32
    ),
    # Without these parameters, the version of JAX decides whether Triton or
    # another compiler lowers the kernel.
    compiler_params=triton.CompilerParams(
      num_warps=_NUM_WARPS, num_stages=_NUM_STAGES
    ),
    interpret=interpret,
    name='stored_product',
  )(
    given.x_HPRK,
    stored.readable(given.values_EOK),
    given.scales_EUT,
    given.mins_EUT,
    given.gain_E,
    jnp.asarray(book, jnp.float32),
    given.tiles.group_P,
    given.tiles.count_P,
  )
  return jnp.sum(y_SPRO, axis=0)


def _kernel(
  x_ref, values_ref, scales_ref, mins_ref, gain_ref, book_ref, group_ref,
  count_ref, y_ref,
  *, form: str, of_scales: str, tile_out: int, tile: int, piece: int,
):  # fmt: skip
  """Computes one program: a tile of rows, some outputs, a share of inputs.

  Refs are whole arrays in main memory: x [H, P, R, K], values [E, O, K], scales
  and mins [E, U, T], gain [E], book [16], group and count [P], y [S, P, R, O].
  """
  at, out_tile, share = (pl.program_id(axis) for axis in range(3))
  halves, _, tile_rows, width = x_ref.shape
  outputs = values_ref.shape[1]
  group = group_ref[at]
  row_R = jnp.arange(tile_rows)
  out_O = out_tile * _OUTPUTS + jnp.arange(_OUTPUTS)
  is_out_O = out_O < outputs
  num_pieces = pl.cdiv(width, piece)
  num_shares = pl.num_programs(2)
  size = jax.lax.div(num_pieces + num_shares - 1, num_shares)
  start = jnp.minimum(share * size, num_pieces)
  stop = jnp.minimum(start + size, num_pieces)
  stop = jnp.where(count_ref[at] > 0, stop, start)  # a tile without rows

  def look_up(codes, book):
    del book  # as an array
    return triton.load(book_ref.at[codes])

  def of_tile(ref, number):
    row_O = jax.lax.div(out_O, tile_out)
    return triton.load(ref.at[group, row_O, number], mask=is_out_O, other=0)

  def add_piece(number, sum_RO):
    byte_K = number * piece + jnp.arange(piece)
    is_byte_K = byte_K < width
    values_OK = triton.load(
      values_ref.at[group, out_O[:, None], byte_K[None, :]],
      mask=is_out_O[:, None] & is_byte_K[None, :],
      other=0,
    )
    part_RO = jnp.zeros((tile_rows, _OUTPUTS), jnp.float32)
    sum_R = jnp.zeros((tile_rows,), jnp.float32)
    for half in range(halves):
      x_RK = triton.load(
        x_ref.at[half, at, row_R[:, None], byte_K[None, :]],
        mask=jnp.broadcast_to(is_byte_K[None, :], (tile_rows, piece)),
        other=0,
      )
      w_OK = stored.numbers(values_OK, form, half, look_up).astype(x_RK.dtype)
      part_RO += stored.dot(x_RK, w_OK)
      if mins_ref is not None:
        sum_R += jnp.sum(x_RK.astype(jnp.float32), axis=1)
    of_inputs = jax.lax.div(number * piece, tile)
    scale_O = stored.scales(of_tile(scales_ref, of_inputs), of_scales)
    if gain_ref is not None:
      scale_O *= gain_ref[group]
    part_RO *= scale_O[None, :]
    if mins_ref is not None:
      part_RO += sum_R[:, None] * of_tile(mins_ref, of_inputs)[None, :]
    return sum_RO + part_RO

  sum_RO = jax.lax.fori_loop(
    start, stop, add_piece, jnp.zeros((tile_rows, _OUTPUTS), jnp.float32)
  )
  triton.store(
    y_ref.at[share, at, row_R[:, None], out_O[None, :]],
    sum_RO,
    mask=jnp.broadcast_to(is_out_O[None, :], sum_RO.shape),
  )
