"""Stop strings in text that arrives in pieces; no part of one is ever shown.

A stop string is matched on text, not on tokens: it may begin in the middle of
one token and end in the middle of another.
"""

from collections.abc import Sequence


class StopMatcher:
  """Passes text on up to the first stop string.

  Text that may begin a stop string is held back until the next text decides: at
  most one character less than the longest stop string. The stop string that is
  completed first wins. If one character completes two, the longer one wins. So
  the result does not depend on how the text was cut into pieces.
  """

  def __init__(self, stop: Sequence[str]):
    self._stop = tuple(stop)
    self._held = ''
    self.matched: str | None = None  # the stop string found, if any

  def push(self, piece: str, *, may_match: bool = True) -> str:
    """Returns the text that is safe to show after `piece`; it may be empty.

    Args:
      piece: the text that follows.
      may_match: whether a stop string that `piece` completes counts. A stop
        string counts if its last piece may match, wherever it begins.
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
    """Returns the held text: the text ends here without a match."""
    rest, self._held = self._held, ''
    return rest

  def _found(self, text: str) -> list[tuple[int, int, str]]:
    """Returns (end, start, string) of stop strings that end in new text."""
    # A stop string that ends in the held text did not count at that time.
    starts = (
      (stop, text.find(stop, max(0, len(self._held) - len(stop) + 1)))
      for stop in self._stop
    )
    return [
      (start + len(stop), start, stop) for stop, start in starts if start >= 0
    ]

  def _num_pending(self, text: str) -> int:
    """Returns the length of the longest end of `text` that begins a stop."""
    longest = max((len(stop) for stop in self._stop), default=1) - 1
    for length in range(min(longest, len(text)), 0, -1):
      end = text[-length:]
      if any(stop.startswith(end) and stop != end for stop in self._stop):
        return length
    return 0
