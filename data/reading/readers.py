"""Readers: random access to documents in TFDS, JSON Lines, Parquet and text.

With the text_key None, a reader returns whole records: {'record': JSON value,
'id': where it is}.

The functions of `data/sources.py` return these classes. A reader holds file
names and offsets only. Its pickle is therefore small, several threads may read
it, and it keeps no file open. Errors name the file and the line or row.

A reader's `fingerprint` is a hash of the contents of its files. The files are
read for it once, and again when they may have changed; `storage/remembered.py`
notices a change. A reader refuses files that changed after it was opened.
"""

from collections.abc import Sequence
import functools
import hashlib
import json
import os
import pathlib
from typing import Any

import numpy as np
import pyarrow as pa
from pyarrow import parquet as pq
import tensorflow_datasets as tfds

from checks import paths
from storage import remembered


class _Opened:
  """Files as they were when a reader was opened."""

  def __init__(self, files: Sequence[pathlib.Path], data_dir: str):
    self.files = list(files)
    self._data_dir = data_dir
    self.identities = {file: remembered.identity(file) for file in self.files}

  def contents(self) -> str:
    """Returns the SHA-256 of each file.

    Raises:
      ValueError: a file has changed.
    """
    memory = None
    if self._data_dir:
      names = '\0'.join(str(file.resolve()) for file in self.files)
      name = hashlib.sha256(os.fsencode(names)).hexdigest()[:32]
      data_dir = paths.expanded('data.data_dir', self._data_dir)
      directory = pathlib.Path(data_dir) / 'digests'
      memory = directory / f'{name}.json'
    found = remembered.sha256_of(self.files, memory)
    for file, before in self.identities.items():
      if remembered.identity(file) != before:
        raise ValueError(
          f'{file}: got a file that changed while it was read, expected the'
          ' same until the end; start again when it is complete'
        )
    return ' '.join(found)


class Tfds:
  """A prepared TFDS dataset in ArrayRecord format, read without TensorFlow."""

  def __init__(
    self,
    directory: str | os.PathLike,
    split: str,
    text_key: str | None,
    data_dir: str = '',
  ):
    """Opens a split of a prepared dataset.

    Args:
      directory: the directory of its version, with dataset_info.json.
      split: a TFDS split expression.
      text_key: the feature that holds a document's text; None: whole records.
      data_dir: where digests of files are kept; '' keeps none.

    Raises:
      FileNotFoundError: nothing is prepared in `directory`.
      ValueError: there is no such split or feature, or the files are not
        ArrayRecord.
    """
    directory = pathlib.Path(paths.expanded('path', directory))
    if not (directory / 'dataset_info.json').is_file():
      raise FileNotFoundError(
        f'no dataset_info.json in {str(directory)!r}; expected the version '
        'directory of a prepared TFDS dataset, such as NAME/1.0.0'
      )
    builder = tfds.builder_from_directory(directory)
    features = builder.info.features
    if not isinstance(features, tfds.features.FeaturesDict):
      raise ValueError(
        f'examples in {str(directory)!r} are a {type(features).__name__}, '
        'expected a FeaturesDict'
      )
    if text_key is not None and text_key not in features:
      raise ValueError(
        f'no feature {text_key!r} in {str(directory)!r}, expected one of '
        f'{", ".join(sorted(features))}; set text_key'
      )
    try:
      # Its decorator hides the signature from pyright.
      self._examples = builder.as_data_source(split)  # pyright: ignore[reportCallIssue]
    except NotImplementedError:
      raise ValueError(
        f'{str(directory)!r} is stored as {builder.info.file_format}, expected '
        "array_record; prepare it with file_format='array_record'"
      ) from None
    except (ValueError, AssertionError) as error:  # from TFDS's split parser
      raise ValueError(
        f'no split {split!r} in {str(directory)!r} '
        f'({" ".join(str(error).split())}); available: '
        f'{", ".join(sorted(builder.info.splits))}'
      ) from None
    self._text_key = text_key
    self._features = features
    self._split = split
    self._name = f'{directory.parent.name}/{directory.name} {split}'
    self._opened = _Opened(
      sorted(path for path in directory.iterdir() if path.is_file()), data_dir
    )
    _check_not_empty(self, f'split {split!r} of {str(directory)!r}')

  def __len__(self) -> int:
    return len(self._examples)

  def fingerprint(self) -> str:
    """Returns a string that changes when the documents change."""
    names = [file.name for file in self._opened.files]
    contents = self._opened.contents()
    return f'tfds {self._split} {self._text_key} {names} {contents}'

  def __getitem__(self, index: int) -> dict[str, Any]:
    example = self._examples[index]
    if self._text_key is None:
      place = f'{self._name}, example {index}'
      record = _plain(self._features, example, place)
      return {'record': record, 'id': place}
    text = example[self._text_key]
    if not isinstance(text, bytes):
      raise ValueError(
        f'feature {self._text_key!r} of example {index} is a '
        f'{type(text).__name__}, expected text; set text_key'
      )
    key = example.get('id', index)
    return {
      'text': _decode(text, f'example {index}'),
      'id': key.decode('utf-8') if isinstance(key, bytes) else str(key),
    }


class Jsonl:
  """JSON Lines files: one object per line, with the text under one key."""

  def __init__(
    self,
    files: Sequence[pathlib.Path],
    text_key: str | None,
    data_dir: str = '',
  ):
    """Indexes the lines of `files`; blank lines are skipped."""
    self._opened = _Opened(files, data_dir)
    self._files = self._opened.files
    self._text_key = text_key
    lines = [
      (file_index, line_number, offset)
      for file_index, file in enumerate(self._files)
      for line_number, offset in _line_offsets(file)
    ]
    # One int64 array [documents, 3], so that a document costs 24 bytes.
    self._lines = np.array(lines, np.int64).reshape(-1, 3)
    _check_not_empty(self, ', '.join(map(str, self._files)))
    self[0]  # a wrong text_key is an error here, not during training

  def __len__(self) -> int:
    return len(self._lines)

  def fingerprint(self) -> str:
    """Returns a string that changes when the documents change."""
    return f'jsonl {self._text_key} {self._opened.contents()}'

  def __getitem__(self, index: int) -> dict[str, Any]:
    file_index, line_number, offset = self._lines[index].tolist()
    file = self._files[file_index]
    place = f'{file}:{line_number}'
    with file.open('rb') as stream:
      stream.seek(offset)
      line = _decode(stream.readline(), place)
    try:
      record = json.loads(line)
    except ValueError as error:
      raise ValueError(
        f'{place} is not JSON ({error}); expected one object per line'
      ) from None
    if not isinstance(record, dict):
      raise ValueError(
        f'{place} is a {type(record).__name__}, expected an object'
      )
    if self._text_key is None:
      return {'record': record, 'id': place}
    if self._text_key not in record:
      raise ValueError(
        f'no {self._text_key!r} in {place}, expected one of '
        f'{", ".join(record)}; set text_key'
      )
    text = _check_text(record[self._text_key], self._text_key, place)
    return {'text': text, 'id': place}


class Parquet:
  """Parquet files: one document per row, with the text in one column.

  A row group is decoded as a whole, and the last four are kept. Random access
  to files of many row groups decodes one group per document: prepare such data
  as ArrayRecord instead.
  """

  def __init__(
    self,
    files: Sequence[pathlib.Path],
    text_key: str | None,
    data_dir: str = '',
  ):
    """Reads the footers of `files`."""
    self._opened = _Opened(files, data_dir)
    self._text_key = text_key
    self._groups: list[tuple[pathlib.Path, int]] = []
    num_rows = []
    for file in files:
      metadata = _parquet_metadata(file, text_key)
      for group in range(metadata.num_row_groups):
        self._groups.append((file, group))
        num_rows.append(metadata.row_group(group).num_rows)
    # Row group g has the documents starts[g] to starts[g + 1] - 1.
    self._starts = np.cumsum([0, *num_rows])
    _check_not_empty(self, ', '.join(map(str, files)))

  def __len__(self) -> int:
    return int(self._starts[-1])

  def fingerprint(self) -> str:
    """Returns a string that changes when the documents change."""
    return f'parquet {self._text_key} {self._opened.contents()}'

  def __getitem__(self, index: int) -> dict[str, Any]:
    if not 0 <= index < len(self):
      raise IndexError(f'got document {index}, expected 0..{len(self) - 1}')
    group_index = int(np.searchsorted(self._starts, index, side='right')) - 1
    file, group = self._groups[group_index]
    table = _read_row_group(
      file, group, self._text_key, self._opened.identities[file]
    )
    row = index - int(self._starts[group_index])
    place = f'{file}, row {row} of row group {group}'
    if self._text_key is None:
      (record,) = table.slice(row, 1).to_pylist()
      return {'record': _without_nulls(record), 'id': place}
    text = _check_text(table.column(0)[row].as_py(), self._text_key, place)
    return {'text': text, 'id': place}


class TextFiles:
  """Plain text files, one document each."""

  def __init__(self, files: Sequence[pathlib.Path], data_dir: str = ''):
    self._opened = _Opened(files, data_dir)
    self._files = self._opened.files

  def __len__(self) -> int:
    return len(self._files)

  def fingerprint(self) -> str:
    """Returns a string that changes when the documents change."""
    return f'text {self._opened.contents()}'

  def __getitem__(self, index: int) -> dict[str, str]:
    file = self._files[index]
    # As bytes: text mode would change line ends.
    return {'text': _decode(file.read_bytes(), str(file)), 'id': str(file)}


def _line_offsets(file: pathlib.Path):
  """Yields (line number from 1, byte offset) of each line with content."""
  offset = 0
  with file.open('rb') as stream:
    for line_number, line in enumerate(stream, 1):
      if line.strip():
        yield line_number, offset
      offset += len(line)


def _plain(feature: Any, value: Any, place: str) -> Any:
  """Returns a value of TFDS as JSON; a sequence of objects as a list."""
  if isinstance(feature, tfds.features.FeaturesDict):
    return {key: _plain(feature[key], value[key], place) for key in value}
  if isinstance(value, dict):  # a sequence of objects, stored as columns
    length = _length(value)
    items = [_item(value, i) for i in range(length)]
    return [_plain(feature.feature, item, place) for item in items]
  if isinstance(value, bytes):
    return _decode(value, place)
  if isinstance(value, np.generic):
    return value.item()
  if isinstance(value, np.ndarray | list | tuple):
    return [_plain(None, item, place) for item in value]
  return value


def _length(columns: dict[str, Any]) -> int:
  first = next(iter(columns.values()))
  return _length(first) if isinstance(first, dict) else len(first)


def _item(columns: Any, index: int) -> Any:
  if isinstance(columns, dict):
    return {key: _item(column, index) for key, column in columns.items()}
  return columns[index]


def _without_nulls(value: Any) -> Any:
  """Returns a value without null fields: a column has one for an absent key."""
  if isinstance(value, dict):
    return {
      key: _without_nulls(item)
      for key, item in value.items()
      if item is not None
    }
  if isinstance(value, list):
    return [_without_nulls(item) for item in value]
  return value


def _parquet_metadata(
  file: pathlib.Path, text_key: str | None
) -> pq.FileMetaData:
  """Returns the footer of `file`.

  Raises:
    ValueError: the file is not Parquet or has no text column `text_key`.
  """
  try:
    metadata = pq.read_metadata(file)
  except pa.ArrowInvalid as error:
    raise ValueError(f'{file} is not a Parquet file ({error})') from None
  if text_key is None:
    return metadata
  schema = metadata.schema.to_arrow_schema()
  if text_key not in schema.names:
    raise ValueError(
      f'no column {text_key!r} in {file}, expected one of '
      f'{", ".join(schema.names)}; set text_key'
    )
  kind = schema.field(text_key).type
  if not (pa.types.is_string(kind) or pa.types.is_large_string(kind)):
    raise ValueError(
      f'column {text_key!r} of {file} holds {kind}, expected string; set '
      'text_key'
    )
  return metadata


@functools.lru_cache(maxsize=4)
def _read_row_group(
  file: pathlib.Path, group: int, column: str | None, identity: str
) -> pa.Table:
  del identity  # so that another file of this name is read again
  with pq.ParquetFile(file) as reader:
    return reader.read_row_group(group, columns=column and [column])


def _decode(data: bytes, place: str) -> str:
  try:
    return data.decode('utf-8')
  except UnicodeDecodeError as error:
    raise ValueError(
      f'{place} is not UTF-8 (byte {data[error.start]:#04x} at '
      f'{error.start}); convert it'
    ) from None


def _check_text(value: object, key: str, place: str) -> str:
  if not isinstance(value, str):
    raise ValueError(
      f'{key!r} in {place} is a {type(value).__name__}, expected a string'
    )
  return value


def _check_not_empty(source, place: str) -> None:
  if not len(source):
    raise ValueError(f'no documents in {place}, expected at least one')
