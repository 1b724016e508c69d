"""Prompt look-up: tokens that followed the same tokens before are the draft.

An answer that edits, quotes or summarises a text repeats parts of it. The last
tokens of a sequence are looked up in the sequence itself; the tokens behind the
match are the draft. It needs no model and no training (prompt look-up decoding:
Saxena, github.com/apoorvumang/prompt-lookup-decoding, 2023).
"""

from collections.abc import Hashable, Sequence
import dataclasses

# A match of fewer tokens says little about the next token; a match of more is
# not more certain.
_LEAST, _MOST = 3, 16
# Earlier places that are compared, latest first.
_PLACES = 8
# Tokens that one call adds to an index: a long prompt takes several calls.
_TOKENS_PER_CALL = 4096


@dataclasses.dataclass
class _Index:
  """The places of a sequence where each run of `least` tokens ends."""

  num_tokens: int = 0  # that are in it
  latest: dict[tuple[int, ...], int] = dataclasses.field(default_factory=dict)
  # The place before each place where the same run ends; -1: none.
  before: list[int] = dataclasses.field(default_factory=list)


class Ngrams:
  """Drafts the continuation of the longest match of the last tokens."""

  def __init__(self, *, least: int = _LEAST, most: int = _MOST):
    """Starts without sequences.

    Args:
      least: tokens of the shortest match.
      most: tokens of the longest match that is looked for.

    Raises:
      ValueError: not 1 <= least <= most.
    """
    if not 1 <= least <= most:
      raise ValueError(
        f'n-grams: got {least} to {most} tokens, expected 1 <= least <= most'
      )
    self._least, self._most = least, most
    self._indices: dict[Hashable, _Index] = {}

  def draft(
    self, id: Hashable, tokens: Sequence[int], most: int
  ) -> tuple[int, ...]:
    """Returns the tokens behind the longest match; of equal ones, the latest.

    It takes `_PLACES * most` comparisons, for a text of any length.
    """
    index = self._indices.setdefault(id, _Index())
    self._extend(index, tokens)
    end = len(tokens)
    if index.num_tokens < end:
      return ()  # a long prompt that is not read to its end yet
    place = index.before[-1] if index.before else -1
    best, longest = -1, 0
    for _ in range(_PLACES):
      if place < 0:
        break
      length = self._matched(tokens, place)
      if length > longest:
        best, longest = place, length
      if length >= self._most:
        break
      place = index.before[place]
    if best < 0:
      return ()
    # Where the match meets the end of the text, the text repeats itself: the
    # draft then continues with its own first tokens.
    period = end - 1 - best
    found: list[int] = []
    for offset in range(most):
      place = best + 1 + offset
      found.append(tokens[place] if place < end else found[offset - period])
    return tuple(found)

  def forget(self, id: Hashable) -> None:
    """Drops the index of a sequence."""
    self._indices.pop(id, None)

  def _extend(self, index: _Index, tokens: Sequence[int]) -> None:
    stop = min(len(tokens), index.num_tokens + _TOKENS_PER_CALL)
    for place in range(index.num_tokens, stop):
      start = place + 1 - self._least
      if start < 0:
        index.before.append(-1)
        continue
      run = tuple(tokens[start : place + 1])
      index.before.append(index.latest.get(run, -1))
      index.latest[run] = place
    index.num_tokens = stop

  def _matched(self, tokens: Sequence[int], place: int) -> int:
    """Returns how many tokens up to `place` equal the tokens at the end."""
    end, length = len(tokens) - 1, self._least
    while (
      length < self._most
      and length <= place
      and tokens[place - length] == tokens[end - length]
    ):
      length += 1
    return length
