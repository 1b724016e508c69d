"""Sources of documents: one function per kind, all with one signature.

    source = open_source(path, split, data_dir, text_key)

A source has random access: `len(source)`, and `source[i]` is a document
{'text': str, 'id': str}. With text_key None it is a whole record {'record':
JSON value, 'id': str}, such as a conversation (`data/examples/shapes.py`).
Several threads may read it. It may have a method `fingerprint()`, which returns
a string that changes when the documents change.
For the sources here it is made of the SHA-256 of their files, so that a file
counts by its contents, not by its name or its time stamp. A source without this
method is read whole at each start, to see whether it has changed. Missing data
is an error that says how to get the data, raised before any network access.
`data/batches.py` turns sources into batches.
"""

import pathlib
from typing import Any, Protocol

from checks import paths
from data.builders import (
  problems as problems_builder,
  python_stdlib as python_stdlib_builder,
  tiny_shakespeare as tiny_shakespeare_builder,
)
from data.problems import generator
from data.reading import files, readers, tfds_builders


class Source(Protocol):
  """Random access to documents {'text': str, 'id': str}, or to records."""

  def __len__(self) -> int: ...

  def __getitem__(self, index: int) -> dict[str, Any]: ...


def python_stdlib(
  path: str = '',
  split: str = 'train',
  data_dir: str = '~/.cache/two_lives',
  text_key: str | None = 'text',
) -> Source:
  """Opens the source files of the running interpreter's standard library.

  Raises:
    ValueError: there is a `path`.
  """
  if path:
    raise ValueError(
      f'python_stdlib: got path {path!r}, expected none; it reads the library'
      ' of the running interpreter: use text_files for other files'
    )
  builder = python_stdlib_builder.PythonStdlib(data_dir=_expand(data_dir))
  return readers.Tfds(tfds_builders.prepare(builder), split, text_key, data_dir)


def tiny_shakespeare(
  path: str = '',
  split: str = 'train',
  data_dir: str = '~/.cache/two_lives',
  text_key: str | None = 'text',
) -> Source:
  """Opens tiny Shakespeare from `path` or `data_dir`, or downloads it."""
  directory = pathlib.Path(_expand(data_dir))
  builder = tiny_shakespeare_builder.TinyShakespeare(
    data_dir=directory,
    text_path=tiny_shakespeare_builder.find_or_download(path, directory),
  )
  return readers.Tfds(tfds_builders.prepare(builder), split, text_key, data_dir)


def problems(
  path: str = '',
  split: str = 'train',
  data_dir: str = '~/.cache/two_lives',
  text_key: str | None = 'text',
) -> Source:
  """Opens arithmetic and reasoning problems; nothing is downloaded.

  Args:
    path: their settings as the query of a URL, as
      'kind=pairs&count=5000&levels=1,2&seed=7'; see data/problems/generator.py.
      `kind` decides which data.examples can read them.
    split: train, validation, test, or an expression of TFDS.
    data_dir: directory of the prepared problems.
    text_key: the feature with the text, of the kind text; None: whole records.
  """
  builder = problems_builder.Problems(
    settings=generator.Settings.parse(path), data_dir=_expand(data_dir)
  )
  return readers.Tfds(tfds_builders.prepare(builder), split, text_key, data_dir)


def tfds_directory(
  path: str, split: str, data_dir: str = '', text_key: str | None = 'text'
) -> Source:
  """Opens a prepared TFDS dataset; `path` is the directory of its version."""
  return readers.Tfds(path, split, text_key, data_dir)


def jsonl(
  path: str,
  split: str = 'all',
  data_dir: str = '',
  text_key: str | None = 'text',
) -> Source:
  """Opens JSON Lines: a file, a directory of .jsonl files, or a glob."""
  found = files.resolve(path, split, '.jsonl')
  return readers.Jsonl(found, text_key, data_dir)


def parquet(
  path: str,
  split: str = 'all',
  data_dir: str = '',
  text_key: str | None = 'text',
) -> Source:
  """Opens Parquet: a file, a directory of .parquet files, or a glob."""
  found = files.resolve(path, split, '.parquet')
  return readers.Parquet(found, text_key, data_dir)


def text_files(
  path: str,
  split: str = 'all',
  data_dir: str = '',
  text_key: str | None = 'text',
) -> Source:
  """Opens plain text: a file, all files of a directory, or a glob."""
  if text_key is None:
    raise ValueError(
      f'text_files: got {path!r} for records, expected jsonl, parquet or'
      ' tfds_directory: a file of plain text has no keys'
    )
  return readers.TextFiles(files.resolve(path, split, ''), data_dir)


def _expand(path: str) -> str:
  return paths.expanded('data.data_dir', path)
