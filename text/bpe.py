"""Byte-level byte-pair encoding: trained, saved and loaded with `tokenizers`.

Text is split by GPT-2's regular expression, each piece becomes its UTF-8 bytes,
and learnt merges join bytes into tokens: every string has a token sequence and
comes back exactly. There is no normalizer, for the same reason.

References: Sennrich et al. 2016 (arXiv:1508.07909); Radford et al. 2019
(GPT-2), which works on bytes and whose split is used here.
"""

from collections.abc import Iterable, Mapping, Sequence
import functools
import json
import os
import pathlib
import types

import numpy as np
import tokenizers
from tokenizers import decoders, models, pre_tokenizers, trainers

from text import spans as spans_lib, utf8

SPECIAL_TOKENS = {'bos': '<|bos|>', 'eos': '<|eos|>', 'pad': '<|pad|>'}
MIN_VOCAB_SIZE = 256 + len(SPECIAL_TOKENS)

_MODEL_FILE = 'tokenizer.json'
_CONFIG_FILE = 'tokenizer_config.json'
# Text that a normalizer, an added prefix space or a missing byte would change.
_PROBE = 'caf\u00e9 cafe\u0301  \t\r\n\x00x \ufb01 \U0001f600\ufffd<|eos|> '


class BpeTokenizer:
  """A byte-level BPE vocabulary with bos, eos and pad."""

  kind = 'bpe'

  def __init__(
    self, model: tokenizers.Tokenizer, special_tokens: Mapping[str, str]
  ):
    """Wraps a `tokenizers` model.

    Args:
      model: byte-level BPE; changed to treat special strings as text.
      special_tokens: the strings in the vocabulary for bos, eos and pad.

    Raises:
      ValueError: a special token is missing, or the model is not byte-level or
        does not give text back exactly.
    """
    # Not stored in tokenizer.json: without it '<|eos|>' in a document would
    # become the id that ends documents.
    model.encode_special_tokens = True
    self._model = model
    self._special_tokens = dict(special_tokens)
    self.names: Mapping[str, str] = {
      f'{name}_token': token for name, token in special_tokens.items()
    }
    self.bos_id = self._special_id('bos')
    self.eos_id = self._special_id('eos')
    self.pad_id = self._special_id('pad')
    self.special_tokens: Mapping[str, int] = {
      token: self._special_id(name) for name, token in special_tokens.items()
    }
    self._bytes = _bytes_per_token(model)
    self.vocab_size = len(self._bytes)
    for probe in (_PROBE, f' {_PROBE}'):
      decoded = self.decode(self.encode(probe))
      if decoded != probe:
        raise ValueError(
          f'this tokenizer turns {probe!a} into {decoded!a}; expected a '
          'byte-level BPE without normalizer or prefix space'
        )

  def encode(self, text: str) -> list[int]:
    """Returns the ids of `text`, without special ids.

    Raises:
      ValueError: `text` holds a lone surrogate.
    """
    try:
      return self._model.encode(text, add_special_tokens=False).ids
    except (TypeError, UnicodeEncodeError):
      utf8.encode(text)  # says where the surrogate is
      raise

  def encode_batch(self, texts: Sequence[str]) -> list[np.ndarray]:
    """Returns the ids of each text, int32; on all cores.

    Raises:
      ValueError: a text holds a lone surrogate.
    """
    try:
      encodings = self._model.encode_batch_fast(
        list(texts), add_special_tokens=False
      )
    except (TypeError, UnicodeEncodeError):
      for text in texts:
        utf8.encode(text)  # says where the surrogate is
      raise
    return [np.array(encoding.ids, np.int32) for encoding in encodings]

  def encode_marked(
    self, text: str, spans: Sequence[spans_lib.Span]
  ) -> spans_lib.Encoded:
    """Returns the ids of `text`, in which the spans are `special_tokens`.

    Raises:
      ValueError: `text` holds a lone surrogate.
    """
    utf8.encode(text)
    return spans_lib.encode(
      text,
      spans,
      special_tokens=self.special_tokens,
      encode_text=self._encode_with_offsets,
    )

  def decode(self, ids: Iterable[int]) -> str:
    """Returns the text of `ids`, with U+FFFD for what is not UTF-8."""
    return utf8.decode(b''.join(self.token_bytes(i) for i in ids))

  def token_bytes(self, token_id: int) -> bytes:
    """Returns the bytes of `token_id`, b'' for a special id.

    Raises:
      ValueError: `token_id` is not in the vocabulary.
    """
    if not 0 <= token_id < self.vocab_size:
      raise ValueError(
        f'got token id {token_id}, expected 0 <= id < {self.vocab_size}; is '
        'this the tokenizer that the model was trained with?'
      )
    return self._bytes[token_id]

  def first_bytes(self, token_id: int) -> bytes:
    """Returns `token_bytes(token_id)`."""
    return self.token_bytes(token_id)

  def num_bytes_V(self) -> np.ndarray:
    """Returns int32 [V], bytes per id, 0 for special ids."""
    return np.array([len(b) for b in self._bytes], np.int32)

  def save(self, directory: str | os.PathLike) -> None:
    """Writes `tokenizer.json` and our config into `directory`."""
    directory = pathlib.Path(directory)
    directory.mkdir(parents=True, exist_ok=True)
    self._model.save(os.fspath(directory / _MODEL_FILE))
    config = {'kind': self.kind, 'special_tokens': self._special_tokens}
    (directory / _CONFIG_FILE).write_text(json.dumps(config))

  def _encode_with_offsets(self, text: str) -> spans_lib.Encoded:
    encoding = self._model.encode(text, add_special_tokens=False)
    return spans_lib.Encoded(encoding.ids, encoding.offsets)

  def _special_id(self, name: str) -> int:
    """Returns the id of the special token called `name`."""
    token = self._special_tokens.get(name)
    token_id = None if token is None else self._model.token_to_id(token)
    if token_id is None:
      raise ValueError(
        f'the {name} token {token!r} is not in the vocabulary; name one that '
        f'is under special_tokens in {_CONFIG_FILE}'
      )
    return token_id


def train(texts: Iterable[str], vocab_size: int) -> BpeTokenizer:
  """Learns a vocabulary of at most `vocab_size` ids from `texts`.

  Deterministic: the same texts give the same vocabulary. It is smaller than
  asked for only where the texts have too few pairs to merge.

  Raises:
    ValueError: `vocab_size` cannot hold every byte and the special tokens.
  """
  if vocab_size < MIN_VOCAB_SIZE:
    raise ValueError(
      f'got vocab_size {vocab_size}, expected at least {MIN_VOCAB_SIZE}: '
      f'256 bytes and {len(SPECIAL_TOKENS)} special tokens'
    )
  model = tokenizers.Tokenizer(models.BPE())
  # use_regex is GPT-2's split: contractions, letters, digits, punctuation,
  # each with at most one leading space, and runs of white space.
  model.pre_tokenizer = pre_tokenizers.ByteLevel(
    add_prefix_space=False, use_regex=True
  )
  model.decoder = decoders.ByteLevel()
  trainer = trainers.BpeTrainer(
    vocab_size=vocab_size,
    special_tokens=list(SPECIAL_TOKENS.values()),
    initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
    show_progress=False,
  )
  model.train_from_iterator(texts, trainer)
  return BpeTokenizer(model, SPECIAL_TOKENS)


def load(
  directory: str | os.PathLike, config: Mapping[str, object]
) -> BpeTokenizer:
  """Returns the tokenizer of `directory`; `config` is its parsed config.

  Raises:
    FileNotFoundError: there is no `tokenizer.json`.
    ValueError: it is damaged or not what `BpeTokenizer` accepts.
  """
  path = pathlib.Path(directory) / _MODEL_FILE
  if not path.is_file():
    raise FileNotFoundError(
      f'no {_MODEL_FILE} in {os.fspath(directory)!r}; expected the file that '
      'Tokenizer.save wrote beside its config'
    )
  try:
    model = tokenizers.Tokenizer.from_file(os.fspath(path))
  except Exception as error:  # tokenizers raises bare Exception
    raise ValueError(
      f'{path} is not a tokenizer ({error}); save it again'
    ) from None
  special_tokens = config.get('special_tokens')
  if not isinstance(special_tokens, dict):
    special_tokens = {}
  return BpeTokenizer(model, special_tokens)


def _bytes_per_token(model: tokenizers.Tokenizer) -> list[bytes]:
  """Returns what each id stands for, indexed by id."""
  chars = byte_of_char()
  added = model.get_added_tokens_decoder()
  # An id that no token owns stands for nothing, like a special one.
  result = [b''] * (1 + max(model.get_vocab(with_added_tokens=True).values()))
  for token, token_id in model.get_vocab(with_added_tokens=True).items():
    if token_id in added:
      if not added[token_id].special:
        result[token_id] = utf8.encode(token)
      continue
    try:
      result[token_id] = bytes(chars[char] for char in token)
    except KeyError:
      raise ValueError(
        f'token {token!r} (id {token_id}) is not made of byte characters; '
        'expected a byte-level BPE'
      ) from None
  return result


@functools.cache
def byte_of_char() -> Mapping[str, int]:
  """Returns the byte that each of GPT-2's printable characters stands for."""
  printable = {*range(33, 127), *range(161, 173), *range(174, 256)}
  # The n-th byte without a printable character becomes U+0100 + n.
  hidden = [byte for byte in range(256) if byte not in printable]
  return types.MappingProxyType(
    {chr(byte): byte for byte in printable}
    | {chr(256 + n): byte for n, byte in enumerate(hidden)}
  )
