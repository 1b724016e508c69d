"""The header of a GGUF file: metadata and the list of tensors.

This module reads the header itself. The `gguf` package makes several objects of
each element of an array, which takes minutes for a vocabulary of 262,144
tokens. Every size is compared with the length of the file before anything is
allocated for it, so a damaged file costs no more memory than its own bytes.

Reference: github.com/ggml-org/ggml/blob/master/docs/gguf.md
"""

from collections.abc import Mapping
import dataclasses
import itertools
import math
import mmap
import os
import pathlib
import struct
from typing import Any, NamedTuple

import numpy as np

from checks import expect

_MAGIC = b'GGUF'
_VERSIONS = (2, 3)
_ALIGNMENT = 32  # bytes; alignment of tensors without general.alignment
_MOST_ALIGNMENT = 2**20
_MOST_AXES = 4
_MOST_NAME = 2**16  # bytes of the name of a field or of a tensor
_MOST_DEPTH = 4  # nesting of arrays in arrays
_NUMBERS = ('B', 'b', 'H', 'h', 'I', 'i', 'f', '?', '', '', 'Q', 'q', 'd')
_STRING, _ARRAY = 8, 9
_LEAST_FIELD = 8 + 4 + 1  # bytes: length of the name, type, value
_LEAST_TENSOR = 8 + 4 + 4 + 8  # bytes: lengths, kind, offset

# Code in a file, and numbers and bytes of a block, by kind.
KINDS: Mapping[str, tuple[int, int, int]] = {
  'F32': (0, 1, 4),
  'F16': (1, 1, 2),
  'Q4_0': (2, 32, 18),
  'Q4_1': (3, 32, 20),
  'Q5_0': (6, 32, 22),
  'Q5_1': (7, 32, 24),
  'Q8_0': (8, 32, 34),
  'Q2_K': (10, 256, 84),
  'Q3_K': (11, 256, 110),
  'Q4_K': (12, 256, 144),
  'Q5_K': (13, 256, 176),
  'Q6_K': (14, 256, 210),
  'IQ2_XXS': (16, 256, 66),
  'IQ2_XS': (17, 256, 74),
  'IQ3_XXS': (18, 256, 98),
  'IQ1_S': (19, 256, 50),
  'IQ4_NL': (20, 32, 18),
  'IQ3_S': (21, 256, 110),
  'IQ2_S': (22, 256, 82),
  'IQ4_XS': (23, 256, 136),
  'IQ1_M': (29, 256, 56),
  'BF16': (30, 1, 2),
  'TQ1_0': (34, 256, 54),
  'TQ2_0': (35, 256, 66),
  'MXFP4': (39, 32, 17),
  'NVFP4': (40, 64, 36),
}
_KIND_OF_CODE = {code: kind for kind, (code, _, _) in KINDS.items()}


@dataclasses.dataclass(frozen=True)
class Entry:
  """A tensor of the list; its bytes are at `start` in the file."""

  name: str
  kind: str  # one of KINDS
  shape: tuple[int, ...]  # [out, in]: the reverse of the order in the file
  start: int
  num_bytes: int

  @property
  def row_bytes(self) -> int:
    """Returns the bytes of one row."""
    return self.num_bytes // math.prod(self.shape[:-1])


class Listed(NamedTuple):
  """A tensor as the header lists it; the values may be wrong."""

  name: str
  shape: tuple[int, ...]
  code: int  # code of its kind
  offset: int  # bytes from the first byte after the header


@dataclasses.dataclass(frozen=True)
class Header:
  """The metadata of a file, and its list of tensors, which is unchecked."""

  path: pathlib.Path
  fields: Mapping[str, Any]  # numbers, strings, lists of strings, numpy arrays
  listed: Mapping[str, Listed]
  end: int  # the first byte after the header
  size: int  # bytes of the file


def read(path: str | os.PathLike) -> Header:
  """Reads the header of a GGUF file.

  Raises:
    FileNotFoundError: there is no such file.
    ValueError: it is no GGUF file, is damaged, or has an unknown kind of
      tensor.
  """
  path = pathlib.Path(path)
  if not path.is_file():
    raise FileNotFoundError(f'{path}: got no such file, expected a GGUF file')
  if path.stat().st_size < 24:
    raise ValueError(
      f'{path}: got {path.stat().st_size} bytes, expected a GGUF file; it is'
      ' truncated or of another format: copy it again'
    )
  with (
    path.open('rb') as file,
    mmap.mmap(file.fileno(), 0, access=mmap.ACCESS_READ) as data,
  ):
    try:
      return _Reader(path, data).header()
    except ValueError as error:
      raise ValueError(f'{path}: {error}') from None


def entries(header: Header) -> dict[str, Entry]:
  """Returns the tensors of a file, by name, in the order of their bytes.

  Raises:
    ValueError: a tensor is of an unknown kind, is not in the file, or shares
      bytes with another.
  """
  alignment = _alignment(header)
  start = -(-header.end // alignment) * alignment
  found = [
    _entry(header, each, start, alignment) for each in header.listed.values()
  ]
  found.sort(key=lambda entry: entry.start)
  for one, other in itertools.pairwise(found):
    if one.start + one.num_bytes > other.start:
      raise ValueError(
        f'{header.path}: got {other.name} inside the bytes of {one.name},'
        ' expected tensors that do not overlap; the file is damaged: copy it'
        ' again'
      )
  return {entry.name: entry for entry in found}


def _entry(header: Header, listed: Listed, start: int, alignment: int) -> Entry:
  name, shape, code, offset = listed
  if code not in _KIND_OF_CODE:
    raise ValueError(
      f'{header.path}: got {name} of kind {code}, expected one of'
      f' {", ".join(KINDS)}; convert the model to one of them'
    )
  kind = _KIND_OF_CODE[code]
  _, numbers, num_bytes = KINDS[kind]
  # No kind has less than an eighth of a byte for a number.
  if not 0 < math.prod(shape) <= 8 * header.size or shape[-1] % numbers:
    raise ValueError(
      f'{header.path}: got {name} of shape {expect.shown(list(shape))} in'
      f' {kind}, expected rows of a multiple of {numbers}, and no more numbers'
      f' than a file of {header.size} bytes can hold; copy it again: it is'
      ' truncated or damaged'
    )
  if offset % alignment:
    raise ValueError(
      f'{header.path}: got {name} at offset {offset}, expected a multiple of'
      f' {alignment}, the alignment; the file is damaged: copy it again'
    )
  size = math.prod(shape) // numbers * num_bytes
  if start + offset + size > header.size:
    raise ValueError(
      f'{header.path}: got {name} in bytes {start + offset} to'
      f' {start + offset + size}, expected at most {header.size}, the length of'
      ' the file; it is truncated: copy it again'
    )
  return Entry(name, kind, shape, start + offset, size)


class _Reader:
  """A position in the bytes of a header."""

  def __init__(self, path: pathlib.Path, data: mmap.mmap):
    self._path, self._data = path, data
    self._size = len(data)
    self._at = 0

  def header(self) -> Header:
    if self._data[:4] != _MAGIC:
      raise ValueError(
        f'got {bytes(self._data[:4])!r} at the start, expected {_MAGIC!r}; the'
        ' file is of another format'
      )
    self._at = 4
    version = self._number('I')
    if version not in _VERSIONS:
      is_big = int.from_bytes(version.to_bytes(4, 'little'), 'big') in _VERSIONS
      raise ValueError(
        f'got version {version} of GGUF, expected one of {_VERSIONS}; '
        + (
          'the file is big-endian: convert it with gguf-convert-endian'
          if is_big
          else 'convert the model again'
        )
      )
    num_tensors = self._count('tensors', 'Q', _LEAST_TENSOR)
    num_fields = self._count('fields', 'Q', _LEAST_FIELD)
    fields: dict[str, Any] = {}
    for _ in range(num_fields):
      name = self._name()
      if name in fields:
        raise ValueError(f'got the field {name!r} twice, expected it once')
      fields[name] = self._value(name, self._number('I'))
    listed: dict[str, Listed] = {}
    for _ in range(num_tensors):
      entry = self._listed()
      if entry.name in listed:
        raise ValueError(f'got the tensor {entry.name!r} twice, expected one')
      listed[entry.name] = entry
    return Header(self._path, fields, listed, self._at, self._size)

  def _listed(self) -> Listed:
    name = self._name()
    num_axes = self._number('I')
    if not 1 <= num_axes <= _MOST_AXES:
      raise ValueError(
        f'got {name} with {num_axes} axes, expected 1 to {_MOST_AXES}'
      )
    sizes = [self._number('Q') for _ in range(num_axes)]
    return Listed(
      name, tuple(sizes[::-1]), self._number('I'), self._number('Q')
    )

  def _take(self, size: int) -> int:
    """Returns the position of the next `size` bytes, and skips them."""
    at = self._at
    if size > self._size - at:
      raise ValueError(
        f'got {size} bytes wanted at {at} of {self._size}, expected no more'
        ' than the file has; it is truncated: copy it again'
      )
    self._at = at + size
    return at

  def _number(self, code: str) -> Any:
    code = f'<{code}'
    at = self._take(struct.calcsize(code))
    return struct.unpack_from(code, self._data, at)[0]

  def _count(self, what: str, code: str, least: int) -> int:
    """Reads a count of items, each of which has at least `least` bytes."""
    count = self._number(code)
    if count * least > self._size - self._at:
      raise ValueError(
        f'got {count} {what} in a file of {self._size} bytes, expected fewer;'
        ' it is truncated or damaged: copy it again'
      )
    return count

  def _name(self) -> str:
    length = self._number('Q')
    if not 0 < length <= _MOST_NAME:
      raise ValueError(
        f'got a name of {length} bytes at {self._at}, expected 1 to'
        f' {_MOST_NAME}; the file is damaged: copy it again'
      )
    return self._text('a name', length)

  def _text(self, name: str, length: int) -> str:
    at = self._take(length)
    try:
      return self._data[at : at + length].decode()
    except UnicodeDecodeError:
      raise ValueError(
        f'got {name} with bytes that are not UTF-8 at {at}, expected text; the'
        ' file is damaged: copy it again'
      ) from None

  def _value(self, name: str, kind: int, depth: int = 0) -> Any:
    if kind == _STRING:
      return self._text(name, self._number('Q'))
    if kind == _ARRAY and depth < _MOST_DEPTH:
      return self._array(name, depth)
    if kind >= len(_NUMBERS) or kind == _ARRAY:
      raise ValueError(
        f'got {name} of type {kind}, expected 0 to {len(_NUMBERS) - 1}; the'
        ' file is damaged, or of a later version'
      )
    return self._number(_NUMBERS[kind])

  def _array(self, name: str, depth: int) -> Any:
    kind = self._number('I')
    if kind == _STRING:
      count = self._count(f'strings in {name}', 'Q', 8)
      return self._strings(name, count)
    if kind < len(_NUMBERS) and _NUMBERS[kind]:
      dtype = np.dtype(f'<{_NUMBERS[kind]}')
      count = self._count(f'numbers in {name}', 'Q', dtype.itemsize)
      at = self._take(count * dtype.itemsize)
      # A copy: the file is closed when the header has been read.
      return np.frombuffer(self._data, dtype, count, at).copy()
    count = self._count(f'arrays in {name}', 'Q', 12)
    return [self._value(name, kind, depth + 1) for _ in range(count)]

  def _strings(self, name: str, count: int) -> list[str]:
    # Decodes without a call per string: a vocabulary has hundreds of thousands.
    data, size, at = self._data, self._size, self._at
    length_at = struct.Struct('<Q').unpack_from
    result = []
    try:
      for _ in range(count):
        start = at + 8
        at = start + length_at(data, at)[0]
        if at > size:
          raise struct.error
        result.append(data[start:at].decode())
    except struct.error:
      raise ValueError(
        f'got {name} with a string past byte {size}, expected no more than the'
        ' file has; it is truncated: copy it again'
      ) from None
    except UnicodeDecodeError:
      raise ValueError(
        f'got {name}[{len(result)}] with bytes that are not UTF-8, expected'
        ' text; the file is damaged: copy it again'
      ) from None
    self._at = at
    return result


def _alignment(header: Header) -> int:
  alignment = header.fields.get('general.alignment', _ALIGNMENT)
  is_fine = (
    type(alignment) is int
    and 0 < alignment <= _MOST_ALIGNMENT
    and not alignment & (alignment - 1)
  )
  if not is_fine:
    raise ValueError(
      f'{header.path}: got general.alignment = {expect.shown(alignment)},'
      f' expected a power of two up to {_MOST_ALIGNMENT}'
    )
  return alignment
