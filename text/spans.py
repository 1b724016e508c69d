"""Encoding a text of which some ranges are not text but special tokens.

A rendered chat prompt is such a text: '<|eot|>' that the template wrote is a
token, '<|eot|>' that a user wrote is six characters. Only who rendered it knows
which is which, so the ranges come along with the text.
"""

from collections.abc import Sequence
from typing import NamedTuple

Span = tuple[int, int]  # first character, one past the last


class Encoded(NamedTuple):
  """Token ids, and the characters of the text that each one stands for."""

  ids: list[int]
  offsets: list[Span]


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
