"""safetensors files: a header in JSON, then the bytes of every tensor.

    8 bytes   length of the header, little-endian
    header    {name: {dtype, shape, data_offsets: [begin, end]}, ...}
    data      tensors one after the other, row by row

This module reads the files without the library of that name, which maps files
into memory. The pages of a mapped file count as memory of this process and
would double the memory of an import. Nothing in a file is trusted: a length, an
offset or a shape that does not fit the file is an error that names the file.
"""

from collections.abc import Iterator, Mapping
import dataclasses
import json
import math
import pathlib
from typing import Any, BinaryIO

import ml_dtypes
import numpy as np

from checks import expect

SINGLE = 'model.safetensors'
INDEX = 'model.safetensors.index.json'
DTYPES: Mapping[str, Any] = {
  'F32': np.dtype(np.float32),
  'F16': np.dtype(np.float16),
  'BF16': np.dtype(ml_dtypes.bfloat16),
}
# Dtypes of the parts of quantised matrices, see `quantised/`.
CODES: Mapping[str, Any] = {
  'U8': np.dtype(np.uint8),
  'I8': np.dtype(np.int8),
  'I32': np.dtype(np.int32),
  'I64': np.dtype(np.int64),
  'F8_E4M3': np.dtype(ml_dtypes.float8_e4m3fn),
  'F8_E8M0': np.dtype(ml_dtypes.float8_e8m0fnu),
}
_READABLE = {**DTYPES, **CODES}
# Bytes of the other dtypes of the format, which no weights have here.
_SIZES = {
  'BOOL': 1, 'F8_E5M2': 1, 'I16': 2, 'U16': 2, 'U32': 4, 'U64': 8, 'F64': 8,
}  # fmt: skip
_MAX_HEADER = 100 * 2**20  # bytes, the limit of the library
SHARD_BYTES = 5 * 10**9  # most bytes of a written file


@dataclasses.dataclass(frozen=True)
class Tensor:
  """A tensor in a file."""

  path: pathlib.Path
  dtype: str  # name in the format, such as BF16
  shape: tuple[int, ...]
  offset: int  # bytes from the start of the file

  @property
  def place(self) -> tuple[str, int]:
    """The sort key in which tensors are read: their order in the file."""
    return str(self.path), self.offset

  def rows(self, start: int, stop: int) -> np.ndarray:
    """Reads the rows `start` to `stop` - 1; a scalar has one row."""
    dtype = _READABLE[self.dtype]
    row_shape = self.shape[1:]
    row = math.prod(row_shape)
    try:
      with self.path.open('rb') as file:
        x = np.fromfile(
          file,
          dtype,
          count=(stop - start) * row,
          offset=self.offset + start * row * dtype.itemsize,
        )
    except OSError as error:
      raise ValueError(
        f'{self.path}: got {error}, expected to read it; copy it again'
      ) from None
    if x.size != (stop - start) * row:
      raise ValueError(
        f'{self.path}: got a file that ends early; copy it again'
      )
    return x.reshape((stop - start, *row_shape))

  def whole(self) -> np.ndarray:
    """Reads the whole tensor."""
    if not self.shape:
      return self.rows(0, 1).reshape(())
    return self.rows(0, self.shape[0])


def open_directory(directory: pathlib.Path) -> dict[str, Tensor]:
  """Returns the tensors of a directory, in one file or in several shards.

  Raises:
    FileNotFoundError: there are no files, or a shard of the index is missing.
    ValueError: a file is damaged, or has other tensors than in the index.
  """
  index = directory / INDEX
  if not index.is_file():
    if not (directory / SINGLE).is_file():
      raise FileNotFoundError(_nothing(directory))
    return read_header(directory / SINGLE)
  weight_map = _weight_map(index)
  tensors: dict[str, Tensor] = {}
  for name in sorted(set(weight_map.values())):
    path = directory / name
    is_name = pathlib.PurePath(name).name == name
    if not is_name or not name.endswith('.safetensors') or '\0' in name:
      raise ValueError(
        f'{index}: got the file name {expect.shown(name)}, expected the name of'
        ' a safetensors file, without a path'
      )
    if not path.is_file():
      raise FileNotFoundError(
        f'{path}: got no such file, expected the shard that {INDEX} lists; copy'
        ' it, too'
      )
    tensors |= read_header(path)
  listed = {(name, directory / file) for name, file in weight_map.items()}
  found = {(name, tensor.path) for name, tensor in tensors.items()}
  if listed != found:
    names = sorted(name for name, _ in listed ^ found)
    raise ValueError(
      f'{index}: got {_some(names)} in other shards, or not in both,'
      ' expected each tensor in the shard of its entry; index and shards are'
      ' not of the same model'
    )
  return tensors


def _weight_map(index: pathlib.Path) -> dict[str, str]:
  too_large = index.stat().st_size > _MAX_HEADER
  try:
    found = {} if too_large else json.loads(index.read_bytes())['weight_map']
    if found and all(isinstance(x, str) for x in (*found, *found.values())):
      return found
  except (ValueError, KeyError, TypeError, AttributeError, RecursionError):
    pass
  raise ValueError(
    f'{index}: got a file without a weight_map of names, expected an index of'
    ' shards; copy it again'
  )


def _nothing(directory: pathlib.Path) -> str:
  others = [
    path.name
    for pattern in ('*.bin', '*.pt', '*.pth', '*.safetensors', '*.gguf')
    for path in sorted(directory.glob(pattern))
  ]
  found = f'{_some(others)} alone' if others else 'no weights'
  return (
    f'{directory}: got {found}, expected {SINGLE} or {INDEX}; save the model'
    ' with transformers (save_pretrained) to have them'
  )


def _some(names: list[str]) -> str:
  """Returns the first names as text, and the number of the others."""
  more = f' and {len(names) - 8} more' if len(names) > 8 else ''
  return ', '.join(names[:8]) + more


def read_header(path: pathlib.Path) -> dict[str, Tensor]:
  """Returns the tensors of a file; reads the header only.

  Raises:
    ValueError: the header is damaged, or does not fit the file.
  """
  size = path.stat().st_size
  with path.open('rb') as file:
    length = int.from_bytes(file.read(8), 'little')
    if not 2 <= length <= min(_MAX_HEADER, size - 8):
      raise ValueError(
        f'{path}: got a header of {length} bytes in a file of {size}, expected'
        ' less; it is truncated or of another format: copy it again'
      )
    try:
      header = json.loads(file.read(length))
      header.pop('__metadata__', None)
      entries = {name: _entry(**x) for name, x in header.items()}
    except (ValueError, TypeError, AttributeError, RecursionError) as error:
      raise ValueError(
        f'{path}: got a header that cannot be read ({error!r}); copy the file'
        ' again'
      ) from None
  end = 0
  for name, (dtype, shape, begin, stop) in sorted(
    entries.items(), key=lambda item: item[1][2]
  ):
    if begin != end or stop - begin != _num_bytes(path, name, dtype, shape):
      raise ValueError(
        f'{path}: got {name} as {dtype}{list(shape)} in bytes {begin} to'
        f' {stop}, expected its size, where the tensor before it ends ({end});'
        ' the file is damaged'
      )
    end = stop
  if end != size - 8 - length:
    raise ValueError(
      f'{path}: got {size} bytes, expected {8 + length + end} by its header; it'
      ' was truncated or added to: copy it again'
    )
  return {
    name: Tensor(path, dtype, shape, 8 + length + begin)
    for name, (dtype, shape, begin, _) in entries.items()
  }


def _entry(
  dtype: str, shape: list[int], data_offsets: list[int]
) -> tuple[str, tuple[int, ...], int, int]:
  """Returns the dtype, the shape and the two offsets of a tensor."""
  begin, stop = data_offsets
  if not isinstance(dtype, str) or not {type(begin), type(stop)} == {int}:
    raise TypeError(f'{expect.shown(dtype)} in {expect.shown(data_offsets)}')
  return dtype, tuple(shape), begin, stop


def _num_bytes(path: pathlib.Path, name: str, dtype: str, shape: Any) -> int:
  if not all(type(n) is int and n >= 0 for n in shape):
    raise ValueError(f'{path}: got {name} of shape {shape}, expected integers')
  if dtype in _READABLE:
    return _READABLE[dtype].itemsize * math.prod(shape)
  if dtype in _SIZES:
    return _SIZES[dtype] * math.prod(shape)
  raise ValueError(
    f'{path}: got {name} of dtype {dtype!r}, expected one of'
    f' {", ".join((*_READABLE, *_SIZES))}'
  )


def write_directory(
  directory: pathlib.Path,
  shapes: Mapping[str, tuple[int, ...]],
  dtype: Any,
  tensors: Iterator[tuple[str, np.ndarray]],
  *,
  shard_bytes: int = SHARD_BYTES,
) -> None:
  """Writes tensors, one at a time, into one file or several shards.

  Args:
    shapes: shapes of all tensors, in the order of `tensors`.
    dtype: dtype of all tensors, or one for each by name.
    shard_bytes: maximum size of a file; a larger tensor has its own file.
  """
  dtypes = {
    name: np.dtype(dtype[name] if isinstance(dtype, Mapping) else dtype)
    for name in shapes
  }
  codes = {other: name for name, other in _READABLE.items()}
  sizes = {
    name: math.prod(shape) * dtypes[name].itemsize
    for name, shape in shapes.items()
  }
  shards: list[list[str]] = [[]]
  for name, size in sizes.items():
    held = sum(sizes[other] for other in shards[-1])
    if shards[-1] and held + size > shard_bytes:
      shards.append([])
    shards[-1].append(name)
  files = [SINGLE] if len(shards) == 1 else [
    f'model-{i + 1:05}-of-{len(shards):05}.safetensors'
    for i in range(len(shards))
  ]  # fmt: skip
  for file_name, names in zip(files, shards, strict=True):
    with (directory / file_name).open('wb') as file:
      entries = {n: (codes[dtypes[n]], shapes[n], sizes[n]) for n in names}
      _write_header(file, entries)
      for expected in names:
        name, x = next(tensors)
        assert (name, x.shape) == (expected, shapes[expected]), name
        # Little-endian, as are all machines that JAX runs on.
        np.ascontiguousarray(x, dtypes[name]).tofile(file)
  if len(files) > 1:
    index = {
      'metadata': {'total_size': sum(sizes.values())},
      'weight_map': {
        name: file
        for file, names in zip(files, shards, strict=True)
        for name in names
      },
    }
    (directory / INDEX).write_text(json.dumps(index, indent=2) + '\n')


def write_file(
  path: pathlib.Path, tensors: Mapping[str, np.ndarray], dtype: np.dtype
) -> None:
  """Writes small tensors into one file."""
  code = next(name for name, other in DTYPES.items() if other == dtype)
  with path.open('wb') as file:
    _write_header(
      file,
      {n: (code, x.shape, x.size * dtype.itemsize) for n, x in tensors.items()},
    )
    for x in tensors.values():
      np.ascontiguousarray(x, dtype).tofile(file)


def _write_header(file: BinaryIO, entries: Mapping[str, Any]) -> None:
  header: dict[str, Any] = {'__metadata__': {'format': 'pt'}}
  begin = 0
  for name, (code, shape, size) in entries.items():
    header[name] = {
      'dtype': code,
      'shape': list(shape),
      'data_offsets': [begin, begin + size],
    }
    begin += size
  text = json.dumps(header).encode()
  text += b' ' * (-len(text) % 8)  # data starts at a multiple of 8
  file.write(len(text).to_bytes(8, 'little') + text)
