"""The port of drafters: they guess the next tokens of a sequence."""

from collections.abc import Hashable, Sequence
from typing import Protocol


class Drafter(Protocol):
  """Guesses the next tokens of texts, on the host; the model verifies them.

  A guess changes no token: a wrong guess only costs time. So a drafter may use
  any source, and may return no guess.
  """

  def draft(
    self, id: Hashable, tokens: Sequence[int], most: int
  ) -> tuple[int, ...]:
    """Returns up to `most` tokens that may follow; () if there is no guess.

    Args:
      id: id of the sequence. Its tokens only grow from call to call.
      tokens: all known tokens of the sequence, the prompt included.
      most: at least 1.
    """
    ...

  def forget(self, id: Hashable) -> None:
    """Drops everything kept for a sequence, which has ended."""
    ...
