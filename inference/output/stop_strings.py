"""Stop strings in text that arrives in pieces; no part of one is ever shown.

A stop string is matched on text, not on tokens: it may begin in the middle of
one token and end in the middle of another. All strings are matched together by
an automaton (Aho and Corasick, Communications of the ACM 18(6), 1975), so that
a character costs as much with one string as with many. The limits of a list,
`MAX_STOPS` and others, are in `inference.sampling.settings`.
"""

from collections.abc import Sequence
import functools
from typing import NamedTuple


class _Tables(NamedTuple):
  """The automaton; a state is a beginning of a stop string, 0 the empty one."""

  edges: dict[tuple[int, str], int]  # the state that is one character longer
  # The longest end of a state that is another state; 0 for the state 0.
  shorter: list[int]
  # The longest stop string that the text ends with, or None.
  longest: list[str | None]
  # Length of the longest end of the text that a stop string continues.
  num_pending: list[int]


class StopStrings:
  """The stop strings of a request, for the matchers of all its sequences."""

  def __init__(self, stop: Sequence[str]):
    self._stop = tuple(stop)

  @functools.cached_property
  def tables(self) -> _Tables:
    """The automaton, made at its first use: requests that wait need none."""
    edges: dict[tuple[int, str], int] = {}
    longest: list[str | None] = [None]
    depths = [0]
    for stop in self._stop:
      state = 0
      for char in stop:
        if (state, char) not in edges:
          edges[state, char] = len(depths)
          depths.append(depths[state] + 1)
          longest.append(None)
        state = edges[state, char]
      longest[state] = stop
    has_longer = {state for state, _ in edges}
    tables = _Tables(edges, [0] * len(depths), longest, [0] * len(depths))
    # Shorter states first: a state's own tables follow from theirs.
    for (before, char), state in sorted(
      edges.items(), key=lambda edge: depths[edge[1]]
    ):
      if before:
        tables.shorter[state] = after(tables, tables.shorter[before], char)
      shorter = tables.shorter[state]
      longest[state] = longest[state] or longest[shorter]
      is_pending = state in has_longer
      tables.num_pending[state] = (
        depths[state] if is_pending else tables.num_pending[shorter]
      )
    return tables


def after(tables: _Tables, state: int, char: str) -> int:
  """Returns the state after a character: at most two look-ups on average."""
  edges = tables.edges
  while (longer := edges.get((state, char))) is None and state:
    state = tables.shorter[state]
  return longer or 0


class StopMatcher:
  """Passes text on up to the first stop string.

  Text that may begin a stop string is held back until the next text decides: at
  most one character less than the longest stop string. The stop string that is
  completed first wins. If one character completes two, the longer one wins. So
  the result does not depend on how the text was cut into pieces.
  """

  def __init__(self, stop: Sequence[str] | StopStrings):
    self._stop = stop if isinstance(stop, StopStrings) else StopStrings(stop)
    self._state = 0
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
    tables = self._stop.tables
    if not tables.edges:
      return piece  # no stop strings
    text, num_before = self._held + piece, len(self._held)
    for index, char in enumerate(piece, num_before + 1):
      self._state = after(tables, self._state, char)
      found = tables.longest[self._state]
      if found is not None and may_match:
        self.matched, self._held = found, ''
        return text[: index - len(found)]
    num_safe = len(text) - tables.num_pending[self._state]
    self._held = text[num_safe:]
    return text[:num_safe]

  def finish(self) -> str:
    """Returns the held text: the text ends here without a match."""
    rest, self._held = self._held, ''
    return rest
