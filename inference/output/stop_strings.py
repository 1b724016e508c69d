"""Finds stop strings in text that arrives in pieces, and lets no part leak.

A stop string is matched on text, not on tokens: it may begin in the middle of
one token and end in the middle of another.
"""

from collections.abc import Sequence


class StopMatcher:
  """Passes text through up to the first stop string.

  Text that may be the beginning of a stop string is held back until it is
  known, at most one character less than the longest stop string. The stop
  string that is completed first wins; of two completed by the same character,
  the longer. So the result does not depend on how the text was cut.
  """

  def __init__(self, stop: Sequence[str]):
    self._stop = tuple(stop)
    self._held = ''
    self.matched: str | None = None  # the stop string found, if any

  def push(self, piece: str, *, may_match: bool = True) -> str:
    """Returns the text that `piece` makes safe to show, possibly none.

    Args:
      piece: the text that follows.
      may_match: whether a stop string counts that `piece` completes. One that
        begins in a piece without and ends in a piece with it does count.
    """
    if self.matched is not None:
      return ''
    text = self._held + piece
    if may_match and (found := self._found(text)):
      _, start, self.matched = min(found)
      self._held = ''
      return text[:start]
    num_safe = len(text) - self._num_pending(text)
    self._held = text[num_safe:]
    return text[:num_safe]

  def finish(self) -> str:
    """Returns what was held back: the text ends here without a match."""
    rest, self._held = self._held, ''
    return rest

  def _found(self, text: str) -> list[tuple[int, int, str]]:
    """Returns (end, start, string) of what ends behind the held text."""
    # What ends in the held text was seen before, and did not count.
    starts = (
      (stop, text.find(stop, max(0, len(self._held) - len(stop) + 1)))
      for stop in self._stop
    )
    return [
      (start + len(stop), start, stop) for stop, start in starts if start >= 0
    ]

  def _num_pending(self, text: str) -> int:
    """Length of the longest end of `text` that begins a stop string."""
    longest = max((len(stop) for stop in self._stop), default=1) - 1
    for length in range(min(longest, len(text)), 0, -1):
      end = text[-length:]
      if any(stop.startswith(end) and stop != end for stop in self._stop):
        return length
    return 0
