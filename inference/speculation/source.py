"""The port of sources of drafts, and the source that asks a drafter.

A drafter of the host has its guess at once. A draft model computes it on the
device, so how long drafts shall be is decided before their tokens exist: a step
is begun with room for them, and `filled` has the tokens.
"""

from collections.abc import Collection, Hashable, Mapping
from typing import Any, Protocol

from inference.scheduling import page_tables, spans
from inference.speculation import drafter as drafter_lib

Lengths = Mapping[Hashable, int]  # tokens of the draft of each sequence


class Source(Protocol):
  """Makes the drafts of an engine; belongs to its thread."""

  # Whether it always has drafts. Then decode steps have to be measured before
  # it may draft: nothing else would ever send one.
  is_endless: bool

  def lengths(
    self, sequences: Collection[page_tables.Sequence], most: int
  ) -> dict[Hashable, int]:
    """Returns how many tokens a draft of each sequence may have.

    Args:
      sequences: that decode; tokens in flight do not count.
      most: tokens of the longest draft, at least 1.
    """
    ...

  def advance(self, sequences: Collection[page_tables.Sequence]) -> bool:
    """Does some of the work that is due before drafts; tokens are in flight.

    Returns:
      Whether a sequence has no work left but for the tokens in flight.
    """
    ...

  def ready(
    self, sequences: Collection[page_tables.Sequence], most: int
  ) -> dict[Hashable, int]:
    """Returns the lengths for a step that is planned now.

    No token is in flight. The length is 0 for a sequence that still has work
    due before it.
    """
    ...

  def placed(self, lengths: Lengths) -> dict[Hashable, tuple[int, ...]]:
    """Returns drafts of these lengths, or places for them."""
    ...

  def filled(self, step: spans.Step, state: Any) -> spans.Step:
    """Returns a step that has the tokens of its drafts.

    Args:
      step: that verifies what `placed` returned.
      state: of the engine; read only.
    """
    ...

  def forget(self, id: Hashable) -> None:
    """Drops everything kept for a sequence, which has ended."""
    ...


def most_of(sequence: page_tables.Sequence, most: int) -> int:
  """Returns the tokens of the longest draft of a sequence; 0 or less: none."""
  # A token follows the last one of a draft.
  return min(most, sequence.num_unsampled - 1)


class OfHost:
  """A source that asks a drafter of the host, see `Source`."""

  is_endless = False

  def __init__(self, drafter: drafter_lib.Drafter):
    self._drafter = drafter
    self._found: dict[Hashable, tuple[int, ...]] = {}

  def lengths(self, sequences, most):
    self._found = {
      each.id: self._drafter.draft(each.id, each.tokens, longest)
      if (longest := most_of(each, most)) > 0
      else ()
      for each in sequences
    }
    return {id: len(draft) for id, draft in self._found.items()}

  ready = lengths

  def advance(self, sequences):
    del sequences
    return True

  def placed(self, lengths):
    return {id: self._found[id][:length] for id, length in lengths.items()}

  def filled(self, step, state):
    del state
    return step

  def forget(self, id):
    self._drafter.forget(id)
