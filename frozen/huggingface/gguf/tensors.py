"""Tensors of a GGUF file: rows of floats, or of blocks that share a scale.

The `gguf` package (requirements-hub.txt) knows the bits of every kind of block;
rows are dequantised by it while they are read.
"""

from collections.abc import Mapping
import dataclasses
import functools
import pathlib
from typing import Any

import ml_dtypes
import numpy as np

from frozen.huggingface.gguf import header as header_lib

# Kinds without blocks.
PLAIN: Mapping[str, Any] = {
  'F32': np.float32,
  'F16': np.float16,
  'BF16': ml_dtypes.bfloat16,
}


@dataclasses.dataclass(frozen=True)
class Tensor:
  """A tensor in an open file."""

  path: pathlib.Path
  kind: str  # one of header.KINDS
  shape: tuple[int, ...]  # [out, in]
  data: np.ndarray  # uint8, mapped: rows of bytes

  @property
  def dtype(self) -> str:
    """The name in safetensors, or GGML_ and the kind."""
    return self.kind if self.kind in PLAIN else f'GGML_{self.kind}'

  @property
  def place(self) -> tuple[str, int]:
    """The sort key in which tensors are read: their order in the file."""
    return str(self.path), int(self.data.ctypes.data)

  def rows(self, start: int, stop: int) -> np.ndarray:
    """Reads the rows `start` to `stop` - 1, as float32."""
    rows = np.ascontiguousarray(self.data[start:stop])
    shape = (stop - start, *self.shape[1:])
    if self.kind in PLAIN:
      return rows.view(PLAIN[self.kind]).reshape(shape).astype(np.float32)
    gguf = library()
    kind = gguf.GGMLQuantizationType[self.kind]
    x = gguf.quants.dequantize(rows, kind)
    return np.asarray(x, np.float32).reshape(shape)

  def whole(self) -> np.ndarray:
    """Reads the whole tensor, as float32."""
    return self.rows(0, self.shape[0])


def open_tensors(
  path: pathlib.Path, entries: Mapping[str, header_lib.Entry]
) -> dict[str, Tensor]:
  """Returns the tensors of a file, by name; nothing is read yet."""
  data = np.memmap(path, np.uint8, 'r')
  return {name: _tensor(path, data, entry) for name, entry in entries.items()}


def _tensor(
  path: pathlib.Path, data: np.ndarray, entry: header_lib.Entry
) -> Tensor:
  mapped = data[entry.start : entry.start + entry.num_bytes]
  # A vector is one row of blocks, and its numbers are rows of one float each.
  is_vector = len(entry.shape) == 1 and entry.kind in PLAIN
  rows = entry.shape if is_vector else entry.shape[:-1]
  return Tensor(path, entry.kind, entry.shape, mapped.reshape((*rows, -1)))


@functools.cache
def library() -> Any:
  """Returns the module `gguf`.

  Raises:
    ValueError: it is not installed.
  """
  try:
    import gguf
  except ImportError:
    raise ValueError(
      'gguf is not installed, expected it to read the blocks of a GGUF file;'
      ' pip install -r requirements-hub.txt'
    ) from None
  return gguf
