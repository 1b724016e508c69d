"""The tensors of one quantised matrix, and the matrix that they make.

Headers alone are checked when a checkpoint is opened: presence, dtype and shape
of each tensor. Values are checked when the matrix is read.
"""

from collections.abc import Callable, Mapping
import dataclasses
import functools
import threading
from typing import Any, NoReturn

import numpy as np

from checks import expect
from frozen.huggingface import safetensors_files
from frozen.huggingface.quantised import matrix as matrix_lib

DTYPE = 'QUANTISED'  # dtype of a matrix, in place of a name of safetensors
FLOATS = tuple(safetensors_files.DTYPES)
_READ = threading.local()  # the matrix that a thread has read last


@dataclasses.dataclass(frozen=True, eq=False)
class Parts:
  """The tensors of a matrix, by the last word of their names."""

  where: str
  module: str
  tensors: Mapping[str, safetensors_files.Tensor]

  def refuse(self, name: str, got: str, expected: str) -> NoReturn:
    """Raises ValueError for one of the tensors."""
    path = self.tensors[name].path if name in self.tensors else self.where
    raise ValueError(
      f'{path}: got {self.module}.{name} {got}, expected {expected}; the'
      ' quantization_config is wrong, or the file is damaged'
    )

  def need(self, name: str, dtypes: tuple[str, ...], ndim: int) -> Any:
    """Returns a tensor of one of some dtypes.

    Raises:
      ValueError: there is none, or it is of another dtype.
    """
    tensor = self.tensors.get(name)
    if tensor is None:
      raise ValueError(
        f'{self.where}: got no {self.module}.{name}, expected it beside'
        f' {self.module}.{min(self.tensors)}; the quantization_config is wrong,'
        ' or a file is missing'
      )
    if tensor.dtype not in dtypes or len(tensor.shape) != ndim:
      self.refuse(
        name,
        f'as {tensor.dtype}{list(tensor.shape)}',
        f'{" or ".join(dtypes)} with {ndim} axes',
      )
    return tensor

  def shaped(
    self, name: str, dtypes: tuple[str, ...], *shapes: tuple[int, ...]
  ) -> Any:
    """Returns a tensor that has one of some shapes; raises as `need`."""
    tensor = self.tensors.get(name)
    tensor = self.need(name, dtypes, len(tensor.shape) if tensor else 0)
    if tensor.shape not in shapes:
      self.refuse(
        name,
        f'of shape {expect.shown(list(tensor.shape))}',
        ' or '.join(str(list(shape)) for shape in shapes),
      )
    return tensor

  def finite(self, name: str) -> np.ndarray:
    """Returns the values of floats; raises ValueError if some are not finite.

    Powers of two of 8 bits (e8m0) may lie in bytes.
    """
    values = self.tensors[name].whole()
    numbers = values.astype(np.float32)
    if not np.all(np.isfinite(numbers)):
      self.refuse(name, 'with numbers that are not finite', 'finite numbers')
    return values


@dataclasses.dataclass(frozen=True, eq=False)
class Tensor:
  """A quantised matrix, which is read as floats; see `loading.Tensor`."""

  parts: Parts
  shape: tuple[int, ...]  # [out, in]
  read: Callable[[], matrix_lib.Matrix]
  dtype: str = DTYPE

  @functools.cached_property
  def place(self) -> tuple[str, int]:
    """The sort key in which tensors are read: their order in the file."""
    return min(part.place for part in self.parts.tensors.values())

  def matrix(self) -> matrix_lib.Matrix:
    """Reads codes and scales; each thread keeps the last matrix.

    Raises:
      ValueError: they are damaged.
    """
    if getattr(_READ, 'owner', None) is not self:
      _READ.owner, _READ.matrix = None, None  # free before the next
      _READ.matrix = self.read()
      _READ.owner = self
    return _READ.matrix

  def rows(self, start: int, stop: int) -> np.ndarray:
    """Reads the rows `start` to `stop` - 1, as float32."""
    return self.matrix().floats(start, stop)

  def whole(self) -> np.ndarray:
    """Reads the whole matrix, as float32."""
    return self.rows(0, self.shape[0])
