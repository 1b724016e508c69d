"""Products with stored kernels on TPU: a Pallas kernel, by Mosaic.

`Port` is a port `Execution.stored`. A step of the grid has a tile of rows and
some outputs, with all of their weights, which the pipeline copies while the
step before computes. Rows of the store become numbers 128 bytes at a time, as
many as a register has lanes. If several tiles of inputs share a register, x is
multiplied once per tile, with zeros in place of the inputs of the others: a
matrix unit takes 128 rows as fast as a few.
"""

import dataclasses
import functools
from typing import Any

import jax
from jax.experimental import pallas as pl
from jax.experimental.pallas import tpu as pltpu
import jax.numpy as jnp

from models.linear.kernels import stored
from models.linear.stored import kernel as kernel_lib, product

_LANES = 128
# bfloat16 registers have 16 rows.
MIN_ROWS, MAX_ROWS = 16, 256
_OUTPUTS = 128
# Of a step, each: its rows of x, and its weights. The pipeline holds two of
# both in the 16 MiB that a kernel may use.
_BLOCK_BYTES = 3 * 2**20


def refusal(w_IO: product.Stored, dtype: Any) -> str:
  """Returns why the kernel does not accept a stored kernel, '' if it does."""
  if found := stored.refusal(w_IO, dtype):
    return found
  assert isinstance(w_IO, kernel_lib.Kernel)
  if jnp.dtype(dtype) == jnp.float16:
    return 'got dtype float16, which TPUs lack; expected bfloat16 or float32'
  width, tile = _in_bytes(w_IO)
  if width % _LANES:
    # XLA stores such rows across, and would turn the matrix in each call.
    return f'got rows of {width} bytes, expected a multiple of {_LANES}'
  if tile < width and tile % _LANES and _LANES % tile:
    return (
      f'got a scale per {w_IO.tile[1]} inputs, expected one per row, or tiles'
      f' that fill {_LANES} lanes'
    )
  largest = 4 * width * (2 if w_IO.form in kernel_lib.PACKED else 1) * MIN_ROWS
  if max(largest, width * _OUTPUTS) > 2 * _BLOCK_BYTES:
    return f'got {w_IO.shape[-2]} inputs, expected fewer: they fill the memory'
  return ''


def _in_bytes(w_IO: kernel_lib.Kernel) -> tuple[int, int]:
  """Returns the bytes of a row of the store, and of a tile of inputs."""
  per_byte = 2 if w_IO.form in kernel_lib.PACKED else 1
  width = w_IO.values.shape[-1]
  return width, min(w_IO.tile[1] // per_byte, width)


@dataclasses.dataclass(frozen=True)
class Port(stored.Port):
  """Multiplies by the kernel."""

  interpret: bool = False  # on any device, slowly; for tests

  def refusal(self, w_IO, dtype):
    return refusal(w_IO, dtype)

  def tile_rows(self, num_rows, w_IO, dtype):
    # As many as fit the memory of a kernel.
    most = _BLOCK_BYTES // (w_IO.shape[-2] * jnp.dtype(dtype).itemsize)
    found = min(MAX_ROWS, max(MIN_ROWS, pl.next_power_of_2(num_rows)))
    while found > max(most, MIN_ROWS):
      found //= 2
    return found

  def multiply(self, given, w_IO):
    return _multiply(given, w_IO, self.interpret)


def _multiply(
  given: stored.Operands, w_IO: kernel_lib.Kernel, interpret: bool
) -> jax.Array:
  """Returns y[P, R, O] in float32."""
  halves, num_tiles, tile_rows, width = given.x_HPRK.shape
  outputs, num_in = given.values_EOK.shape[1], given.scales_EUT.shape[2]

  def of_outputs(of_tiles_EUT: jax.Array) -> jax.Array:
    """Returns [E, T, O]: a row of less than 128 numbers takes as much room."""
    each_EOT = jnp.repeat(of_tiles_EUT, w_IO.tile[0], axis=1)[:, :outputs]
    return jnp.swapaxes(each_EOT, 1, 2)

  scales_ETO = of_outputs(given.scales_EUT)
  is_scaled_after = num_in == 1 and given.mins_EUT is None
  of_tiles = [] if is_scaled_after else [scales_ETO]
  if given.mins_EUT is not None:
    of_tiles.append(of_outputs(given.mins_EUT))
  gain_E = given.gain_E
  if gain_E is None:
    gain_E = jnp.ones((given.values_EOK.shape[0],), jnp.float32)
  y_PRO = pl.pallas_call(
    functools.partial(
      _kernel,
      form=w_IO.form,
      of_scales=w_IO.scales.dtype.name,
      tile=_in_bytes(w_IO)[1],
    ),
    grid_spec=pltpu.PrefetchScalarGridSpec(
      num_scalar_prefetch=3,  # which the steps read before their blocks
      grid=(num_tiles, pl.cdiv(outputs, _OUTPUTS)),
      in_specs=[
        pl.BlockSpec((halves, 1, tile_rows, width), lambda p, *_: (0, p, 0, 0)),
        pl.BlockSpec(
          (1, _OUTPUTS, width), lambda p, o, group_P, *_: (group_P[p], o, 0)
        ),
        *[
          pl.BlockSpec(
            (1, num_in, _OUTPUTS), lambda p, o, group_P, *_: (group_P[p], 0, o)
          )
        ]
        * len(of_tiles),
      ],
      out_specs=pl.BlockSpec(
        (1, tile_rows, _OUTPUTS), lambda p, o, *_: (p, 0, o)
      ),
    ),
    out_shape=jax.ShapeDtypeStruct(
      (num_tiles, tile_rows, outputs), jnp.float32
    ),
    interpret=interpret,
    name='stored_product',
  )(
    given.tiles.group_P, given.tiles.count_P, gain_E,
    given.x_HPRK, given.values_EOK, *of_tiles,
  )  # fmt: skip
  if not is_scaled_after:
    return y_PRO
  scale_EO = stored.scales(scales_ETO[:, 0], w_IO.scales.dtype)
  return y_PRO * (scale_EO * gain_E[:, None])[given.tiles.group_P][:, None]


def _kernel(
  group_ref, count_ref, gain_ref, x_ref, values_ref, *rest,
  form: str, of_scales: str, tile: int,
):  # fmt: skip
  """Computes a tile of rows for some outputs, see `_multiply`.

  Refs: x [H, 1, R, K], values [1, O, K], scales [1, T, O] unless the sums are
  scaled after the kernel, minima [1, T, O] if there are any, y [1, R, O].
  """
  *of_tiles, y_ref = rest
  at = pl.program_id(0)

  @pl.when(count_ref[at] > 0)
  def _():
    halves, _, tile_rows, width = x_ref.shape
    scales_OT = mins_OT = None
    if of_tiles:
      scales_TO = stored.scales(of_tiles[0][0], of_scales)
      scales_OT = (scales_TO * gain_ref[group_ref[at]]).T
    if len(of_tiles) > 1:
      mins_OT = of_tiles[1][0].T
    sum_OR = jnp.zeros((_OUTPUTS, tile_rows), jnp.float32)
    for start in range(0, width, _LANES):
      lanes = slice(start, min(start + _LANES, width))
      # Here: a conversion before the kernel would copy all of the matrix.
      values_OK = stored.readable(values_ref[0, :, lanes])
      for half in range(halves):
        x_RK = x_ref[half, 0, :, lanes]
        w_OK = stored.numbers(values_OK, form, half, _look_up)
        w_OK = w_OK.astype(x_RK.dtype)
        if scales_OT is None:
          sum_OR += stored.dot(w_OK, x_RK)
          continue
        for number, x_part_RK in _parts(x_RK, start, tile):
          column = slice(number, number + 1)
          sum_OR += stored.dot(w_OK, x_part_RK) * scales_OT[:, column]
          if mins_OT is not None:
            total_R = jnp.sum(x_part_RK.astype(jnp.float32), axis=1)
            sum_OR += mins_OT[:, column] * total_R[None, :]
    y_ref[0] = sum_OR.T


def _parts(
  x_RK: jax.Array, start: int, tile: int
) -> list[tuple[int, jax.Array]]:
  """Returns for each tile of these lanes its number and its inputs of x.

  Args:
    x_RK: inputs from lane `start` of a row on.
    start: a multiple of the lanes of a register.
    tile: lanes of a tile.
  """
  first, last = start // tile, (start + x_RK.shape[1] - 1) // tile
  if first == last:
    return [(first, x_RK)]
  lane_RK = jax.lax.broadcasted_iota(jnp.int32, x_RK.shape, 1)
  of_lane_RK = (start + lane_RK) // tile
  return [
    (number, jnp.where(of_lane_RK == number, x_RK, 0))
    for number in range(first, last + 1)
  ]


def _look_up(codes: jax.Array, book: tuple[float, ...]) -> jax.Array:
  """Returns the numbers of codes: a tree of choices by their four bits."""
  found = [jnp.full(codes.shape, number, jnp.float32) for number in book]
  for bit in range(4):
    is_set = (codes >> bit & 1) == 1
    pairs = zip(found[::2], found[1::2], strict=True)
    found = [jnp.where(is_set, high, low) for low, high in pairs]
  return found[0]
