"""Text to token ids and back: the contract, and the byte tokenizer.

Both lives use it: `data/` encodes documents, `inference/` encodes prompts and
decodes samples. A tokenizer is saved beside the weights it was trained with and
loaded with `load`, which reads the kind from `tokenizer_config.json`.

`encode` is for text only: it adds no special ids, and a string that looks like
a special token ('<|eos|>') is ordinary text. Callers add `bos_id` and `eos_id`
themselves, so no document and no user can forge a document boundary.
`encode_marked` is for what a chat template rendered, where some are meant.
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
  """What the rest of the code may ask of a tokenizer."""

  kind: str
  vocab_size: int
  bos_id: int
  eos_id: int
  pad_id: int
  # What a chat template may call its special tokens: 'bos_token' -> '<s>'.
  names: Mapping[str, str]
  # All strings that stand for an id where a chat template writes them.
  special_tokens: Mapping[str, int]

  def encode(self, text: str) -> list[int]:
    """Returns the ids of `text`.

    `decode` gives exactly `text` back, unless the kind is 'huggingface' and its
    `is_exact` is False.
    """
    ...

  def encode_batch(self, texts: Sequence[str]) -> list[np.ndarray]:
    """Returns what `encode` gives for each text, as integer arrays."""
    ...

  def encode_marked(
    self, text: str, spans: Sequence[spans_lib.Span]
  ) -> spans_lib.Encoded:
    """Returns the ids of `text`, in which the spans are `special_tokens`."""
    ...

  def decode(self, ids: Iterable[int]) -> str:
    """Returns the text of `ids`; special ids contribute nothing."""
    ...

  def token_bytes(self, token_id: int) -> bytes:
    """Returns the bytes that one id stands for, b'' for a special id."""
    ...

  def first_bytes(self, token_id: int) -> bytes:
    """Returns the bytes of an id that starts a text.

    Those of `token_bytes`, without a space that `encode` put there.
    """
    ...

  def num_bytes_V(self) -> np.ndarray:
    """Returns int32 [V], bytes per id: what bits per byte divides by."""
    ...

  def save(self, directory: str | os.PathLike) -> None:
    """Writes what `load` needs into `directory`."""
    ...


class ByteTokenizer:
  """One id per byte: 0..255 the bytes, then bos, eos and pad."""

  kind = 'byte'
  vocab_size = 259
  bos_id = 256
  eos_id = 257
  pad_id = 258
  names: Mapping[str, str] = {'bos_token': '', 'eos_token': ''}  # no strings
  special_tokens: Mapping[str, int] = {}

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
    """Returns the bytes of `text` and their characters; there are no spans."""
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
    """Returns the text of `ids`, with U+FFFD for what is not UTF-8."""
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
    """Writes `tokenizer_config.json` into `directory`, made if missing."""
    directory = pathlib.Path(directory)
    directory.mkdir(parents=True, exist_ok=True)
    (directory / _CONFIG_FILE).write_text(json.dumps({'kind': self.kind}))


def load(directory: str | os.PathLike) -> Tokenizer:
  """Returns the tokenizer saved in `directory`.

  Raises:
    FileNotFoundError: `directory` holds no tokenizer.
    ValueError: its config is damaged or of an unknown kind.
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
