"""Spans: ranges of a text that are special tokens.

In a rendered chat prompt, '<|eot|>' from the template is a special token, and
'<|eot|>' from a user is seven characters of text. Only the renderer knows the
difference, so it returns the spans with the text.
"""

from collections.abc import Sequence
from typing import NamedTuple

Span = tuple[int, int]  # first character, one past the last


class Encoded(NamedTuple):
  """Token ids, and the range of characters that each id stands for."""

  ids: list[int]
  offsets: list[Span]


def overlaps(offsets: Sequence[Span], spans: Sequence[Span]) -> list[bool]:
  """Returns for each offset whether it shares a character with a span.

  Args:
    offsets: ranges of characters, ascending.
    spans: ranges of characters, ascending and disjoint.
  """
  result = []
  current = 0
  for start, end in offsets:
    while current < len(spans) and spans[current][1] <= start:
      current += 1
    result.append(current < len(spans) and spans[current][0] < end)
  return result
