"""A SentencePiece model file (`tokenizer.model`), read to its pieces and rules.

The file is one protobuf message. Only the few fields that decide ids and text
are read here, so neither `protobuf` nor `sentencepiece` is needed to serve a
model. A field that would change text in a way that is not supported is refused.

Reference: github.com/google/sentencepiece/blob/master/src/
sentencepiece_model.proto; protobuf.dev/programming-guides/encoding.
"""

from collections.abc import Iterator
import math
import struct
from typing import NamedTuple

# Kinds of pieces. GGUF files have the same numbers.
NORMAL, UNKNOWN, CONTROL, USER_DEFINED, UNUSED, BYTE = 1, 2, 3, 4, 5, 6
UNIGRAM, BPE = 1, 2  # model_type
_MODEL_TYPES = {1: 'UNIGRAM', 2: 'BPE', 3: 'WORD', 4: 'CHAR'}
MOST_BYTES = 64 * 2**20  # the file of Gemma 3, with 262,144 pieces, has 4.7 MB
_Value = int | float | bytes  # value of a field
_VARINT, _FIXED64, _BYTES, _FIXED32 = 0, 1, 2, 5  # wire types


class Model(NamedTuple):
  """The fields of a model file that decide ids and text."""

  model_type: int  # UNIGRAM or BPE
  tokens: list[str]  # the pieces, by id
  kinds: list[int]
  scores: list[float]  # log-probabilities, or ranks in the order of merges
  has_bytes: bool  # whether an unknown character becomes its bytes
  charsmap: bytes  # replaces characters before anything else; may be empty
  is_prefixed: bool  # whether a space is put before each text
  is_stripped: bool  # whether spaces are removed at both ends and in runs
  names: dict[str, str]  # 'bos_token' -> '<s>', of tokens that exist


def parse(data: bytes) -> Model:
  """Returns the model in the bytes of a file.

  Raises:
    ValueError: the file is damaged, or has a setting that is not supported.
  """
  if len(data) > MOST_BYTES:
    raise ValueError(
      f'got {len(data)} bytes, expected at most {MOST_BYTES}; no tokenizer has'
      ' such a file'
    )
  pieces: list[tuple[str, float, int]] = []
  trainer, normalizer, denormalizer = {}, {}, {}
  for number, value in _fields(data):
    if number == 1:
      pieces.append(_piece(value, len(pieces)))
    elif number == 2:
      trainer |= dict(_fields(value))
    elif number == 3:
      normalizer |= dict(_fields(value))
    elif number == 5:
      denormalizer |= dict(_fields(value))
  if not pieces:
    raise ValueError(_damaged('it has no pieces'))
  # Fields that are left out have the defaults of the proto file.
  flags = {
    'treat_whitespace_as_suffix': _integer(trainer, 24, 0),
    'escape_whitespaces': _integer(normalizer, 5, 1),
    'denormalizer_spec.precompiled_charsmap': len(_string(denormalizer, 2)),
  }
  for name, wanted in zip(flags, (0, 1, 0), strict=True):
    if flags[name] != wanted:
      raise ValueError(
        f'got {name} = {flags[name]}, expected {wanted}; convert it to a'
        ' tokenizer.json, where transformers and sentencepiece are installed'
      )
  tokens, scores, kinds = map(list, zip(*pieces, strict=True))
  return Model(
    model_type=_model_type(trainer),
    tokens=tokens,
    kinds=kinds,
    scores=scores,
    has_bytes=bool(_integer(trainer, 35, 0)),
    charsmap=_string(normalizer, 2),
    is_prefixed=bool(_integer(normalizer, 3, 1)),
    is_stripped=bool(_integer(normalizer, 4, 1)),
    names=_names(trainer, tokens, kinds),
  )


def _model_type(trainer: dict) -> int:
  model_type = _integer(trainer, 3, UNIGRAM)
  if model_type not in (UNIGRAM, BPE):
    raise ValueError(
      f'got model_type {_MODEL_TYPES.get(model_type, model_type)}, expected'
      ' UNIGRAM or BPE; no other kind is read'
    )
  return model_type


def _names(trainer: dict, tokens: list, kinds: list) -> dict[str, str]:
  """Returns the special tokens; one that has no piece does not exist.

  The library looks for the strings, and ignores the ids in the file.
  """
  found = {}
  for name, number, default, kind in (
    ('unk_token', 45, b'<unk>', UNKNOWN),
    ('bos_token', 46, b'<s>', CONTROL),
    ('eos_token', 47, b'</s>', CONTROL),
    ('pad_token', 48, b'<pad>', CONTROL),
  ):
    piece = _text(_string(trainer, number) or default, name)
    if name == 'unk_token':  # its kind decides
      piece = tokens[kinds.index(UNKNOWN)] if UNKNOWN in kinds else ''
    if piece in tokens and kinds[tokens.index(piece)] == kind:
      found[name] = piece
  return found


def _piece(data: _Value, index: int) -> tuple[str, float, int]:
  """Returns string, score and kind of a piece."""
  fields = dict(_fields(data))
  text = _text(_string(fields, 1), f'piece {index}')
  score, kind = fields.get(2, 0.0), _integer(fields, 3, NORMAL)
  if not text:
    raise ValueError(
      f'got piece {index} without text, expected a string; the file is damaged:'
      ' copy it again'
    )
  if not isinstance(score, float) or not math.isfinite(score):
    raise ValueError(
      f'got piece {index} with the score {score!r}, expected a finite float;'
      ' the file is damaged: copy it again'
    )
  if not NORMAL <= kind <= BYTE:
    raise ValueError(
      f'got piece {index} of kind {kind}, expected {NORMAL} to {BYTE}; the file'
      ' is damaged: copy it again'
    )
  return text, score, kind


def _text(data: bytes, name: str) -> str:
  try:
    return data.decode()
  except UnicodeDecodeError:
    raise ValueError(
      f'got {name} with bytes that are not UTF-8, expected text; the file is'
      ' damaged: copy it again'
    ) from None


def _integer(fields: dict, number: int, default: int) -> int:
  value = fields.get(number, default)
  if type(value) is not int:
    raise ValueError(_damaged(f'field {number} is no integer'))
  return value


def _string(fields: dict, number: int) -> bytes:
  value = fields.get(number, b'')
  if not isinstance(value, bytes):
    raise ValueError(_damaged(f'field {number} has no bytes'))
  return value


def _fields(data: _Value) -> Iterator[tuple[int, _Value]]:
  """Yields number and value of each field of a protobuf message.

  Fixed numbers of 32 bits are floats: the message has no others.
  """
  if not isinstance(data, bytes):
    raise ValueError(_damaged('a message is a number'))
  at, end = 0, len(data)
  while at < end:
    key, at = _varint(data, at)
    number, wire = key >> 3, key & 7
    if wire == _VARINT:
      value, at = _varint(data, at)
    else:
      if wire == _BYTES:
        size, at = _varint(data, at)
      elif wire in (_FIXED32, _FIXED64):
        size = 4 if wire == _FIXED32 else 8
      else:
        raise ValueError(_damaged(f'a field has the wire type {wire}'))
      if not number or size > end - at:
        raise ValueError(_damaged('a field is longer than its message'))
      value = data[at : at + size]
      at += size
      if wire == _FIXED32:
        (value,) = struct.unpack('<f', value)
    yield number, value


def _varint(data: bytes, at: int) -> tuple[int, int]:
  """Returns a number of 7 bits per byte, and the position after it."""
  value = 0
  for shift in range(0, 70, 7):
    if at >= len(data):
      raise ValueError(_damaged('it ends inside a field'))
    byte = data[at]
    at += 1
    value |= (byte & 127) << shift
    if byte < 128:
      return value, at
  raise ValueError(_damaged('a number has more than 10 bytes'))


def _damaged(reason: str) -> str:
  return (
    f'got a file that is no SentencePiece model ({reason}), expected a protobuf'
    ' message; copy it again, or convert one of tiktoken to a tokenizer.json'
  )
