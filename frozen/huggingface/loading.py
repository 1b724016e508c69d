"""Loading: Hugging Face tensors become parameter leaves, one by one.

Memory holds the result and a few pieces of tensors. A matrix is transposed
while it is read, some rows at a time.
"""

from collections.abc import Mapping
import concurrent.futures
import math
from typing import Any, Protocol

import ml_dtypes
import numpy as np

from checks import expect
from frozen.huggingface import tensor_map

# Bytes of a piece of a tensor: read and transposed, it fits a core's cache.
PIECE_BYTES = 2**20
_THREADS = 2
_ALIGNMENT = 64  # bytes
_LISTED = 12
# Dtypes of floats, and of matrices that read as floats.
_READABLE = ('F32', 'F16', 'BF16', 'GGML', 'QUANTISED')


class Tensor(Protocol):
  """A tensor in a file; see `safetensors_files` and `gguf.tensors`."""

  @property
  def dtype(self) -> str:
    """The name in safetensors, or GGML_ and a kind, or QUANTISED."""
    ...

  @property
  def shape(self) -> tuple[int, ...]:
    """The shape; [out, in] for a matrix."""
    ...

  @property
  def place(self) -> tuple[str, int]:
    """The sort key in which tensors are read: their order in the file."""
    ...

  def rows(self, start: int, stop: int) -> np.ndarray:
    """Reads the rows `start` to `stop` - 1."""
    ...

  def whole(self) -> np.ndarray:
    """Reads the whole tensor."""
    ...


def load(
  tensors: Mapping[str, Tensor],
  pieces: list[tensor_map.Piece],
  leaves: Mapping[str, Any],
  *,
  tied: Mapping[str, str],
  where: str,
) -> dict[str, np.ndarray]:
  """Returns the parameter leaves by path, as numpy arrays.

  Args:
    tied: optional tensors, each with the name of the tensor that it must equal.
    where: the directory, for errors.

  Raises:
    ValueError: a tensor is missing, unknown, of a wrong shape, of a dtype that
      is not a float, or not equal to the tensor that it is tied to.
  """
  check(tensors, pieces, leaves, tied=tied, where=where)
  result = {
    path: _empty(leaf.shape, leaf.dtype) for path, leaf in leaves.items()
  }
  ordered = sorted(pieces, key=lambda piece: tensors[piece.theirs].place)
  with concurrent.futures.ThreadPoolExecutor(_THREADS) as pool:
    for _ in pool.map(
      lambda piece: _read(tensors[piece.theirs], piece, result), ordered
    ):
      pass
  by_name = {piece.theirs: piece for piece in pieces}
  for name, other in tied.items():
    if name in tensors:
      leaf = result[by_name[other].ours[0]]
      _check_equal(tensors[name], leaf, f'{where}: got {name} unlike {other}')
  return result


def _empty(shape: tuple[int, ...], dtype: Any) -> np.ndarray:
  """Returns an uninitialised array that JAX on a CPU can use without a copy.

  For this, its address is a multiple of 64. The kernel allocates its pages when
  they are first written.
  """
  num_bytes = math.prod(shape) * np.dtype(dtype).itemsize
  raw = np.empty(num_bytes + _ALIGNMENT, np.uint8)
  start = -raw.ctypes.data % _ALIGNMENT
  return raw[start : start + num_bytes].view(dtype).reshape(shape)


def check(
  tensors: Mapping[str, Tensor],
  pieces: list[tensor_map.Piece],
  leaves: Mapping[str, Any],
  *,
  tied: Mapping[str, str],
  where: str,
) -> None:
  """Raises ValueError if the tensors do not fit the model."""
  expected = {piece.theirs for piece in pieces}
  filled = {path for piece in pieces for path in piece.ours}
  assert filled == set(leaves), filled ^ set(leaves)
  missing = sorted(expected - tensors.keys())
  if missing:
    raise ValueError(
      f'{where}: got no {_list(missing)}, expected them for the model of its'
      ' config.json; the config is wrong, or files are missing'
    )
  unknown = sorted(
    name
    for name in tensors.keys() - expected - tied.keys()
    if not tensor_map.DERIVED.fullmatch(name)
  )
  if unknown:
    raise ValueError(
      f'{where}: got {_list(unknown)}, expected only tensors of the model of'
      ' its config.json; the config is wrong, or the model is of a kind that is'
      ' not supported'
    )
  wrong = []
  for piece in pieces:
    shapes = [_slot(leaves, path, piece.expert) for path in piece.ours]
    shape = tuple(piece.layout.shape(*shapes))
    got = tensors[piece.theirs]
    if got.shape != shape:
      theirs = expect.shown(list(got.shape))
      wrong.append(f'{piece.theirs} {theirs}, not {list(shape)}')
    elif not got.dtype.startswith(_READABLE):
      wrong.append(f'{piece.theirs} of dtype {got.dtype}')
  if wrong:
    raise ValueError(
      f'{where}: got {_list(wrong)}, expected F32, F16 or BF16 tensors of the'
      ' shapes of its config.json'
    )


def _list(names: list[str]) -> str:
  more = len(names) - _LISTED
  return ', '.join(names[:_LISTED]) + (f' and {more} more' if more > 0 else '')


def _slot(leaves: Mapping[str, Any], path: str, expert: int | None):
  """Returns the shape of a leaf, or of one expert in it."""
  shape = leaves[path].shape
  return shape if expert is None else shape[1:]


def _read(tensor: Tensor, piece: tensor_map.Piece, result) -> None:
  """Fills the leaves that a tensor holds, in place."""
  targets = [
    result[path] if piece.expert is None else result[path][piece.expert]
    for path in piece.ours
  ]
  layout = piece.layout
  if layout.is_stacked:  # an expert at a time: a tensor may have gigabytes
    for e in range(tensor.shape[0]):
      parts = layout.read(tensor.rows(e, e + 1))
      for target, part in zip(targets, parts, strict=True):
        _copy(target[e : e + 1], part)
    return
  if not (layout.is_rows or layout.is_columns) or not tensor.shape:
    for target, part in zip(targets, layout.read(tensor.whole()), strict=True):
      _copy(target, part)
    return
  (target,) = targets
  row_bytes = 2 * math.prod(tensor.shape[1:])
  step = max(PIECE_BYTES // max(row_bytes, 1), 1)
  for start in range(0, tensor.shape[0], step):
    stop = min(start + step, tensor.shape[0])
    rows = tensor.rows(start, stop)
    if layout.is_rows:
      _copy(target[start:stop], rows)
    else:
      _transpose(target, start, rows)


def _transpose(target: np.ndarray, start: int, rows: np.ndarray) -> None:
  """Writes rows into the columns of a leaf, from column `start` on."""
  # numpy's transpose moves one number at a time, each from another cache line.
  # Here, 8 bytes of neighbours move at once and are separated afterwards, which
  # was measured 3 times as fast.
  rows = np.ascontiguousarray(rows, target.dtype)
  lanes = 8 // rows.itemsize
  stop, width = start + rows.shape[0], rows.shape[1]
  if width % lanes:
    _copy(target[:, start:stop], rows.T)
    return
  kind = np.uint16 if rows.itemsize == 2 else np.uint32
  eights = np.ascontiguousarray(rows.view(np.uint64).T)
  parts = eights.view(kind).reshape(width // lanes, rows.shape[0], lanes)
  leaf = target.view(kind).reshape(width // lanes, lanes, -1)
  np.copyto(leaf[:, :, start:stop], parts.transpose(0, 2, 1))


def _copy(target: np.ndarray, part: np.ndarray) -> None:
  """Writes values into a part of a leaf, rounded to its dtype."""
  if target.shape != part.shape:
    raise ValueError(f'got {part.shape}, expected {target.shape}')
  if part.dtype != target.dtype:
    part = part.astype(target.dtype)
  if target.dtype == ml_dtypes.bfloat16:
    # As integers: numpy copies its own types many times faster.
    target, part = target.view(np.uint16), part.view(np.uint16)
  np.copyto(target, part)


def _check_equal(tensor: Tensor, leaf: np.ndarray, got: str) -> None:
  """Raises ValueError if a tensor differs from the leaf that it is tied to."""
  if tensor.shape != leaf.shape or not np.array_equal(
    tensor.whole().astype(leaf.dtype), leaf
  ):
    raise ValueError(
      f'{got}, expected the same values, as config.json has'
      ' tie_word_embeddings; set it to false if the model has both'
    )
