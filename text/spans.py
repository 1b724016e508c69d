"""Encoding a text of which some ranges are not text but special tokens.

A rendered chat prompt is such a text: '<|eot|>' that the template wrote is a
token, '<|eot|>' that a user wrote is six characters. Only who rendered it knows
which is which, so the ranges come along with the text.
"""

from collections.abc import Callable, Mapping, Sequence
from typing import NamedTuple

Span = tuple[int, int]  # first character, one past the last


class Encoded(NamedTuple):
  """Token ids, and the characters of the text that each one stands for."""

  ids: list[int]
  offsets: list[Span]


def encode(
  text: str,
  spans: Sequence[Span],
  *,
  special_tokens: Mapping[str, int],
  encode_text: Callable[[str], Encoded],
) -> Encoded:
  """Encodes what is between the spans as text, and each span as its one id.

  Right for tokenizers that encode a part the same wherever it stands, as
  byte-level ones do.

  Args:
    text: all of it.
    spans: ascending, disjoint ranges that hold special tokens.
    special_tokens: their ids.
    encode_text: encodes text without special tokens.
  """
  ids: list[int] = []
  offsets: list[Span] = []
  position = 0
  for start, end in (*spans, (len(text), len(text))):
    part = encode_text(text[position:start])
    ids += part.ids
    offsets += [(a + position, b + position) for a, b in part.offsets]
    if start < end:
      ids.append(special_tokens[text[start:end]])
      offsets.append((start, end))
    position = end
  return Encoded(ids, offsets)


def overlaps(offsets: Sequence[Span], spans: Sequence[Span]) -> list[bool]:
  """Returns for each offset whether it shares a character with a span.

  Both ascending. A token that only partly lies in a span counts as in it.
  """
  result = []
  current = 0
  for start, end in offsets:
    while current < len(spans) and spans[current][1] <= start:
      current += 1
    result.append(current < len(spans) and spans[current][0] < end)
  return result
