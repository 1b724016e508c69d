"""Texts for calibration: rows of tokens that show a model's activations.

Rows of the first nine tenths of a text are drawn with a seed. Rows to measure
with come from the last tenth, for every seed, so that two quantised models are
measured on the same rows.
"""

import dataclasses
import hashlib
import os
import pathlib
from typing import Any

import numpy as np

from checks import expect
from text import tokenizer as tokenizer_lib

SAMPLE = 'pydoc_data.topics'  # prose in English that is part of Python
_MOST_BYTES = 16 * 2**20  # most bytes of a text; more would draw no better rows
_HELD_OUT = 0.1


@dataclasses.dataclass(frozen=True, kw_only=True)
class Config:
  """The text of a calibration, and the number of its rows."""

  path: str = ''  # UTF-8; '': SAMPLE
  seed: int = 0
  rows: int = 32
  length: int = 256  # tokens per row
  held_out: int = 8  # rows to measure with

  def check(self) -> None:
    """Raises ValueError for a number that is out of range."""
    expect.at_least('--rows', self.rows, 1)
    expect.at_least('--length', self.length, 2)
    expect.at_least('--held_out', self.held_out, 2)  # for a standard error


@dataclasses.dataclass(frozen=True, kw_only=True)
class Rows:
  """Rows of a text."""

  drawn_RT: np.ndarray
  held_out_RT: np.ndarray
  record: dict[str, Any]  # `record` of the manifest


def rows(
  config: Config,
  tokenizer: tokenizer_lib.Tokenizer,
  *,
  has_bos: bool,
  max_length: int,
) -> Rows:
  """Returns the rows of a text.

  Args:
    config: the text.
    tokenizer: tokenizer of the model.
    has_bos: whether BOS begins a row.
    max_length: context of the model.

  Raises:
    OSError: there is no such file.
    ValueError: it is not UTF-8, or too short.
  """
  config.check()
  length = min(config.length, max_length)
  text = _read(config.path)
  ids = np.asarray(tokenizer.encode(text.decode('utf-8')), np.int32)
  width = length - has_bos
  num_rows = len(ids) // width
  num_last = max(int(num_rows * _HELD_OUT), config.held_out)
  if num_rows - num_last < config.rows:
    raise ValueError(
      f'--text: got {len(ids)} tokens, {num_rows} rows of {width}, expected'
      f' at least {config.rows + num_last} rows, {config.rows} to calibrate'
      f' with and {num_last} at the end to measure with; give a longer text,'
      ' or lower --rows or --length'
    )
  all_RT = ids[: num_rows * width].reshape(num_rows, width)
  if has_bos:
    bos = np.full((num_rows, 1), tokenizer.bos_id, np.int32)
    all_RT = np.concatenate([bos, all_RT], axis=1)
  drawn = np.random.default_rng(config.seed).choice(
    num_rows - num_last, config.rows, replace=False
  )
  last = np.linspace(num_rows - num_last, num_rows - 1, config.held_out)
  return Rows(
    drawn_RT=all_RT[drawn],
    held_out_RT=all_RT[last.astype(int)],
    record={
      'text': os.path.basename(config.path) or SAMPLE,
      'sha256': hashlib.sha256(text).hexdigest(),
      'seed': config.seed,
      'rows': config.rows,
      'held_out': config.held_out,
      'length': length,
      'tokens': config.rows * length,
    },
  )


def text_digest(path: str) -> str:
  """Returns the SHA-256 of a text, as records have it; '' is SAMPLE.

  Raises:
    OSError: there is no such file.
    ValueError: it is not UTF-8.
  """
  return hashlib.sha256(_read(path)).hexdigest()


def _read(path: str) -> bytes:
  """Returns the text in UTF-8, at most `_MOST_BYTES` of it."""
  if not path:
    from pydoc_data import topics as module  # here: half a megabyte

    topics = module.topics
    return '\n'.join(topics[name] for name in sorted(topics)).encode()
  if not pathlib.Path(path).is_file():
    raise FileNotFoundError(
      f'--text: got {path}, which is no file, expected a text in UTF-8'
    )
  with pathlib.Path(path).open('rb') as file:
    text = file.read(_MOST_BYTES)
  try:
    # Up to the last whole character, if the text was cut.
    return text.decode('utf-8').encode()
  except UnicodeDecodeError as error:
    if len(text) == _MOST_BYTES and error.start > len(text) - 4:
      return text[: error.start]
    raise ValueError(
      f'--text: got {path}, which has no UTF-8 at byte {error.start}, expected'
      ' a text in UTF-8; convert it'
    ) from None
