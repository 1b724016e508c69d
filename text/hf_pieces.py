"""Tables of the bytes of each id of a `tokenizer.json`.

The decoder in the file is a sequence of steps over the strings of tokens. In
language models, each step works on one token at a time. Only the first token
may differ: it loses the space that encoding has added in front of the text. So
a decoder becomes two tables: the bytes of an id inside a text, and at its
start. Then streaming needs no earlier tokens, and constrained decoding and bits
per byte have exact bytes. A decoder that needs several tokens is refused.

One difference is deliberate. For a run of byte tokens that is not UTF-8,
`tokenizers` returns one U+FFFD for each byte of the run, even if most of it is
whole characters. Here, only broken bytes become U+FFFD. Otherwise no character
of a run could be streamed before the run ends.
"""

from collections.abc import Callable, Mapping
import functools
import re
import types
from typing import Any, NamedTuple

_BYTE_TOKEN = re.compile('<0x[0-9A-Fa-f]{2}>')

# Replacements of WordPiece's clean-up of English text, in the library's order.
_CLEANED = (
  (' .', '.'), (' ?', '?'), (' !', '!'), (' ,', ','), (" ' ", "'"),
  (" n't", "n't"), (" 'm", "'m"), (' do not', " don't"), (" 's", "'s"),
  (" 've", "'ve"), (" 're", "'re"),
)  # fmt: skip

# A step of a decoder: a function of a token and of whether the token is the
# first. A token is a string until a step turns it into bytes.
_Token = str | bytes
_Step = Callable[[_Token, bool], _Token]


class Pieces(NamedTuple):
  """Bytes by id: inside a text, and at its start if they differ there."""

  inside: list[bytes]
  at_start: dict[int, bytes]


def tabulate(
  decoder: Mapping[str, Any] | None, tokens: Mapping[int, str], num_ids: int
) -> Pieces:
  """Returns the bytes of every id; b'' for one that is not in `tokens`.

  Args:
    decoder: the entry in `tokenizer.json`; None if there is none.
    tokens: the strings of the ids that have text.

  Raises:
    ValueError: the decoder is unknown or looks at several tokens at once.
  """
  steps = _steps(decoder)
  inside = [b''] * num_ids
  at_start = {}
  # Ids may be 250 000, so the steps run twice only if the start can differ.
  has_start = any(step not in _ALIKE for step in steps)
  for token_id, token in tokens.items():
    inside[token_id] = first = _apply(steps, token, False)
    if has_start:
      first = _apply(steps, token, True)
    if first != inside[token_id]:
      at_start[token_id] = first
  return Pieces(inside, at_start)


def _apply(steps: list[_Step], token: str, is_first: bool) -> bytes:
  value: _Token = token
  for step in steps:
    value = step(value, is_first)
  return value if isinstance(value, bytes) else value.encode()


def _steps(decoder: Mapping[str, Any] | None) -> list[_Step]:
  """Returns the steps of a decoder.

  Raises:
    ValueError: a step cannot be applied token by token.
  """
  if decoder is None:  # then the library joins tokens with spaces
    return [lambda token, is_first: token if is_first else _joined(token)]
  parts = [decoder]
  while any(part['type'] == 'Sequence' for part in parts):
    parts = [
      inner
      for part in parts
      for inner in (part['decoders'] if part['type'] == 'Sequence' else [part])
    ]
  steps: list[_Step] = []
  is_fused = False
  for part in parts:
    step = _step(part, is_fused)
    if step is None:
      raise ValueError(
        f'got the decoder step {dict(part)}'
        f'{" after Fuse" if is_fused else ""}, expected ByteLevel, Metaspace,'
        ' WordPiece, or Replace, ByteFallback, Fuse and Strip as sentencepiece'
        ' models have them: this one cannot be applied token by token, which'
        ' streaming needs'
      )
    steps.append(step)
    is_fused |= part['type'] == 'Fuse'
  return steps


def _step(part: Mapping[str, Any], is_fused: bool) -> _Step | None:
  """Returns one step; None if it is unknown or needs other tokens."""
  kind = part['type']
  if kind == 'Fuse':
    return _fuse
  if kind == 'Replace' and 'String' in part['pattern']:
    pattern, content = part['pattern']['String'], part['content']
    # After Fuse a longer pattern could match across tokens.
    return None if is_fused and len(pattern) > 1 else _replace(pattern, content)
  if kind == 'Strip' and len(part['content']) == 1:
    if not is_fused:
      return _strip(part['content'], part['start'], part['stop'], False)
    # After Fuse, Strip works on the whole text. Streaming knows its first
    # character, but not its last.
    is_simple = part['start'] <= 1 and part['stop'] == 0
    return (
      _strip(part['content'], part['start'], 0, True) if is_simple else None
    )
  if is_fused:
    return None
  if kind == 'ByteLevel':
    return _byte_level
  if kind == 'ByteFallback':
    return _byte_fallback
  if kind == 'Metaspace':
    scheme = part.get('prepend_scheme')
    if scheme is None:  # files of before 2024
      scheme = 'always' if part.get('add_prefix_space', True) else 'never'
    return _metaspace(part['replacement'], scheme != 'never')
  if kind == 'WordPiece':
    return _word_piece(part['prefix'], part['cleanup'])
  return None


def _joined(token: _Token) -> _Token:
  return b' ' + token if isinstance(token, bytes) else f' {token}'


def _byte_level(token: _Token, is_first: bool) -> _Token:
  """Maps GPT-2's printable characters back to bytes.

  An added token is plain text. If all its characters happen to be among the
  printable ones, it is mapped as well, as in the library.
  """
  if isinstance(token, bytes):
    return token
  try:
    return bytes(map(_byte_of_char().__getitem__, token))
  except KeyError:
    return token.encode()


@functools.cache
def _byte_of_char() -> Mapping[str, int]:
  """Returns the byte of each of GPT-2's printable characters."""
  printable = {*range(33, 127), *range(161, 173), *range(174, 256)}
  # The n-th byte without a printable character becomes U+0100 + n.
  hidden = [byte for byte in range(256) if byte not in printable]
  return types.MappingProxyType(
    {chr(byte): byte for byte in printable}
    | {chr(256 + n): byte for n, byte in enumerate(hidden)}
  )


def _fuse(token: _Token, is_first: bool) -> _Token:
  return token


def _byte_fallback(token: _Token, is_first: bool) -> _Token:
  if isinstance(token, str) and _BYTE_TOKEN.fullmatch(token):
    return bytes([int(token[3:5], 16)])
  return token


def _replace(pattern: str, content: str) -> _Step:
  def step(token: _Token, is_first: bool) -> _Token:
    return (
      token if isinstance(token, bytes) else token.replace(pattern, content)
    )

  return step


def _metaspace(replacement: str, is_prefixed: bool) -> _Step:
  def step(token: _Token, is_first: bool) -> _Token:
    if isinstance(token, bytes):
      return token
    # In the first token, every sign is removed, as in the library.
    space = '' if is_first and is_prefixed else ' '
    return token.replace(replacement, space)

  return step


def _strip(content: str, start: int, stop: int, only_first: bool) -> _Step:
  def step(token: _Token, is_first: bool) -> _Token:
    if only_first and not is_first:
      return token
    cut = content.encode() if isinstance(token, bytes) else content
    for _ in range(start):
      token = token.removeprefix(cut)  # type: ignore[arg-type]
    for _ in range(stop):
      token = token.removesuffix(cut)  # type: ignore[arg-type]
    return token

  return step


def _word_piece(prefix: str, is_cleaned: bool) -> _Step:
  def step(token: _Token, is_first: bool) -> _Token:
    if isinstance(token, bytes):
      return token
    if not is_first:
      is_tail = token.startswith(prefix)
      token = token.removeprefix(prefix) if is_tail else f' {token}'
    if is_cleaned:
      for dirty, clean in _CLEANED:
        token = token.replace(dirty, clean)
    return token

  return step


# Steps that treat the first token like all others.
_ALIKE = (_fuse, _byte_level, _byte_fallback)
