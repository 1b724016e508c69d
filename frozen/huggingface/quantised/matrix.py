"""A matrix [out, in] in codes, as it was read from a quantised checkpoint.

    w[o, i] = (number(codes[o, i]) - zero) * scale / divisor

Each tile of (tile_out, tile_in) codes has its own zero and scale; the last
tiles may be partial. With `groups`, as in GPTQ's act-order, the second index of
a tile is groups[i] in place of i // tile_in.
"""

from collections.abc import Callable
import dataclasses
from typing import Any

import numpy as np

from frozen.huggingface.quantised import bits

# e2m1 of the OCP microscaling formats, section 5.3.3; the highest bit is the
# sign.
_FP4 = np.array([0, 0.5, 1, 1.5, 2, 3, 4, 6], np.float32)
_FP4 = np.concatenate([_FP4, -_FP4])
_PACKED = ('int4', 'uint4', 'fp4')


@dataclasses.dataclass(frozen=True, eq=False)
class Matrix:
  """Codes and scales; see the top of this file."""

  form: str  # int8, int4, uint4, fp8 or fp4, as of models.linear.stored.kernel
  codes: np.ndarray  # [out, in], one per element
  scales: np.ndarray  # [tiles_out, tiles_in]
  tile: tuple[int, int]
  zeros: np.ndarray | None = None  # integers, as scales
  groups: np.ndarray | None = None  # [in]
  divisor: np.ndarray | None = None  # float32, one number

  def floats(self, start: int, stop: int) -> np.ndarray:
    """Returns the rows `start` to `stop` - 1 in float32."""
    codes = self.codes[start:stop]
    numbers = _FP4[codes] if self.form == 'fp4' else codes.astype(np.float32)
    if self.zeros is not None:
      numbers -= self._of_each(self.zeros.astype(np.float32), start, stop)
    scales = self.scales.astype(np.float32)
    if self.divisor is not None:
      scales = scales / self.divisor
    return numbers * self._of_each(scales, start, stop)

  def _of_each(self, of_tiles: np.ndarray, start: int, stop: int):
    """Returns the number of the tile of each code of some rows."""
    of_rows = of_tiles[np.arange(start, stop) // self.tile[0]]
    if self.groups is not None:
      return of_rows[:, self.groups]
    if of_rows.shape[1] == 1:
      return of_rows
    return np.repeat(of_rows, self.tile[1], axis=1)[:, : self.codes.shape[1]]

  def why_not_stored(self) -> str:
    """Returns why no stored kernel can hold the matrix; '' if one can."""
    inputs = self.codes.shape[1]
    if self.form in _PACKED and inputs % 2:
      return f'{inputs} inputs are no whole bytes of {self.form}'
    if self.groups is not None:
      sizes = np.bincount(self.groups, minlength=self.scales.shape[1])
      expected = np.minimum(
        self.tile[1], inputs - self.tile[1] * np.arange(len(sizes))
      )
      if not np.array_equal(sizes, expected):
        return 'its groups have other sizes than group_size'
    return ''

  def stored(
    self, select: Callable[[np.ndarray], tuple[np.ndarray, ...]] | None = None
  ) -> list[dict[str, Any]]:
    """Returns the fields of stored kernels that hold the matrix, or parts.

    Args:
      select: returns the rows of each part, of an array with a row per output;
        None for a single part, the whole.
    """
    codes, order = self.codes, None
    if self.groups is not None:
      order = np.argsort(self.groups, kind='stable').astype(np.int32)
      codes = codes[:, order]
    arrays = {
      'values': bits.pairs(codes) if self.form in _PACKED else codes,
      'scales': self.scales,
    }
    if self.zeros is not None:
      scales = self.scales.astype(np.float32)
      arrays['mins'] = -self.zeros.astype(np.float32) * scales
    shared: dict[str, Any] = {'form': self.form, 'tile': self.tile}
    if order is not None:
      shared['order'] = order
    if self.divisor is not None:
      shared['gain'] = np.float32(1) / self.divisor
    if select is None:
      return [{**arrays, **shared}]
    if self.tile[0] > 1:  # a tile may have rows of several parts
      rows = np.arange(len(codes)) // self.tile[0]
      arrays |= {
        name: array[rows] for name, array in arrays.items() if name != 'values'
      }
      shared['tile'] = (1, self.tile[1])
    chosen = {name: select(array) for name, array in arrays.items()}
    return [
      {
        **{name: np.ascontiguousarray(x[i]) for name, x in chosen.items()},
        **shared,
      }
      for i in range(len(chosen['values']))
    ]
