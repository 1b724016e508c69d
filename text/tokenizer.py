"""Tokenizers, from text to token ids and back: the contract and the byte kind.

Both lives use a tokenizer: `data/` encodes documents, `inference/` encodes
prompts and decodes samples. It is saved beside the weights that were trained
with it. `load` reads its kind from `tokenizer_config.json`.

`encode` takes text only. It adds no special ids, and it encodes a string that
looks like a special token ('<|eos|>') as ordinary text. Callers add `bos_id`
and `eos_id` themselves, so no document and no user can forge a document
boundary. `encode_marked` encodes a rendered chat template, in which marked
ranges are special tokens.
"""

from collections.abc import Iterable, Mapping, Sequence
import json
import os
import pathlib
from typing import Protocol

import numpy as np

from text import hf_tokenizer, spans as spans_lib, utf8

_CONFIG_FILE = 'tokenizer_config.json'
_KINDS = ('byte', 'bpe', 'huggingface')


class Tokenizer(Protocol):
  """The members of every tokenizer."""

  kind: str
  vocab_size: int
  bos_id: int
  eos_id: int
  pad_id: int
  # Names of special tokens in chat templates, such as 'bos_token' -> '<s>'.
  names: Mapping[str, str]
  # Ids of the strings that are special tokens where a chat template has them.
  special_tokens: Mapping[str, int]
  # Ids below `vocab_size` that no token has, ascending; most have none.
  missing_ids: Sequence[int]

  def encode(self, text: str) -> list[int]:
    """Returns the ids of `text`.

    `decode` returns exactly `text`, unless the kind is 'huggingface' and
    `is_exact` is False.
    """
    ...

  def encode_batch(self, texts: Sequence[str]) -> list[np.ndarray]:
    """Returns the ids of each text, as `encode` does, in integer arrays."""
    ...

  def encode_marked(
    self, text: str, spans: Sequence[spans_lib.Span]
  ) -> spans_lib.Encoded:
    """Returns the ids of `text`, whose `spans` are special tokens."""
    ...

  def decode(self, ids: Iterable[int]) -> str:
    """Returns the text of `ids`; special ids are left out."""
    ...

  def token_bytes(self, token_id: int) -> bytes:
    """Returns the bytes of one id, b'' for a special id."""
    ...

  def first_bytes(self, token_id: int) -> bytes:
    """Returns the bytes of an id at the start of a text.

    Without a space that `encode` has added; otherwise as `token_bytes`.
    """
    ...

  def num_bytes_V(self) -> np.ndarray:
    """Returns int32 [V], the number of bytes of each id, for bits per byte."""
    ...

  def save(self, directory: str | os.PathLike) -> None:
    """Writes the files that `load` reads into `directory`."""
    ...


class ByteTokenizer:
  """One id per byte: 0..255 are the bytes, 256..258 are bos, eos and pad."""

  kind = 'byte'
  vocab_size = 259
  bos_id = 256
  eos_id = 257
  pad_id = 258
  # Its special tokens have no strings, so no template can write them.
  names: Mapping[str, str] = {'bos_token': '', 'eos_token': ''}
  special_tokens: Mapping[str, int] = {}
  missing_ids: Sequence[int] = ()

  def encode(self, text: str) -> list[int]:
    """Returns the UTF-8 bytes of `text` as ids.

    Raises:
      ValueError: `text` holds a lone surrogate.
    """
    return list(utf8.encode(text))

  def encode_batch(self, texts: Sequence[str]) -> list[np.ndarray]:
    """Returns the bytes of each text, uint8.

    Raises:
      ValueError: a text holds a lone surrogate.
    """
    return [np.frombuffer(utf8.encode(text), np.uint8) for text in texts]

  def encode_marked(
    self, text: str, spans: Sequence[spans_lib.Span]
  ) -> spans_lib.Encoded:
    """Returns the bytes of `text` as ids; `spans` must be empty."""
    if spans:
      raise ValueError(
        f'got special tokens at {list(spans)}, expected none: bytes have no'
        ' strings for bos, eos and pad'
      )
    offsets = [
      (i, i + 1) for i, char in enumerate(text) for _ in utf8.encode(char)
    ]
    return spans_lib.Encoded(self.encode(text), offsets)

  def decode(self, ids: Iterable[int]) -> str:
    """Returns the text of `ids`, with U+FFFD for bytes that are not UTF-8."""
    return utf8.decode(b''.join(self.token_bytes(i) for i in ids))

  def token_bytes(self, token_id: int) -> bytes:
    """Returns the byte of `token_id`, b'' for bos, eos and pad.

    Raises:
      ValueError: `token_id` is not in the vocabulary.
    """
    if not 0 <= token_id < self.vocab_size:
      raise ValueError(
        f'got token id {token_id}, expected 0 <= id < {self.vocab_size}; is '
        'this the tokenizer that the model was trained with?'
      )
    return bytes([token_id]) if token_id < 256 else b''

  def first_bytes(self, token_id: int) -> bytes:
    """Returns `token_bytes(token_id)`."""
    return self.token_bytes(token_id)

  def num_bytes_V(self) -> np.ndarray:
    """Returns int32 [V]: 1 for a byte, 0 for a special id."""
    return (np.arange(self.vocab_size) < 256).astype(np.int32)

  def save(self, directory: str | os.PathLike) -> None:
    """Writes `tokenizer_config.json` into `directory`; makes the directory."""
    directory = pathlib.Path(directory)
    directory.mkdir(parents=True, exist_ok=True)
    (directory / _CONFIG_FILE).write_text(json.dumps({'kind': self.kind}))


def special_token_in(tokenizer: Tokenizer, text: str) -> str:
  """Returns a special token whose string is in `text`; '' if there is none.

  `encode` reads that string as text. An author who copied a rendered chat
  template meant the special token.
  """
  return next((t for t in tokenizer.special_tokens if t and t in text), '')


def spare_ids(
  tokenizer: Tokenizer, vocab_size: int
) -> tuple[tuple[int, int], ...]:
  """Returns the ranges [first, end) of a model's ids that no token has.

  Args:
    tokenizer: tokenizer of the model.
    vocab_size: ids that the model embeds; often rounded up for speed.
  """
  ranges: list[tuple[int, int]] = []
  for i in (*tokenizer.missing_ids, *range(tokenizer.vocab_size, vocab_size)):
    is_next = bool(ranges) and ranges[-1][1] == i
    first = ranges.pop()[0] if is_next else i
    ranges.append((first, i + 1))
  return tuple(ranges)


def load(directory: str | os.PathLike) -> Tokenizer:
  """Returns the tokenizer saved in `directory`.

  Raises:
    FileNotFoundError: `directory` has no tokenizer.
    ValueError: the config is damaged or of an unknown kind.
  """
  path = pathlib.Path(directory) / _CONFIG_FILE
  try:
    config = json.loads(path.read_text())
  except FileNotFoundError:
    raise FileNotFoundError(
      f'no {_CONFIG_FILE} in {os.fspath(directory)!r}; expected a directory '
      'written by Tokenizer.save'
    ) from None
  except ValueError as error:
    raise ValueError(f'{path} is not JSON ({error}); save it again') from None
  kind = config.get('kind') if isinstance(config, dict) else None
  if kind == 'byte':
    return ByteTokenizer()
  if kind in ('bpe', 'huggingface'):
    return hf_tokenizer.load(directory)
  is_foreign = 'kind' not in config if isinstance(config, dict) else False
  fix = '; convert it with text.hf_tokenizer.convert' if is_foreign else ''
  raise ValueError(
    f'{path} has kind {kind!r}, expected one of {", ".join(_KINDS)}{fix}'
  )
