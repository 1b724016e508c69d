"""The choice of drafts: how many drafted tokens a step verifies, if any.

A draft of g tokens, each right with probability a if all before it were, gives
(1 - a^(g+1)) / (1 - a) tokens on average (Leviathan et al., arXiv:2211.17192,
equation 1). A step gives the sum over all sequences of the batch, and takes as
long as its program does, which is measured. The choice is the step with the
most tokens per second; decode steps are among the candidates, so speculation is
off where it would lose. That is the rule of DSpark (vLLM blog, 2026-08-14): the
batch decides and not each sequence, since all share one program. Its price per
number of tokens is here a price per compiled shape, in which padding costs as
much as a token: so a chosen shape takes all tokens that fit.

The choice changes the time of tokens, and never a token.
"""

from collections.abc import Hashable, Mapping, Sequence
import dataclasses
from typing import NamedTuple, Protocol

# A program counts as measured after this many calls: the first calls are
# slower.
_SAMPLES = 3
# Weight of a call that took longer than the estimate. A shorter call replaces
# the estimate: a longer time may only mean that the host read the result late.
_SLOWER_WEIGHT = 0.1
# Weight of the earlier drafts of a sequence after each new draft.
_KEPT = 0.9
# Acceptance that is assumed at first, and the number of tokens that the
# assumption weighs.
_PRIOR, _PRIOR_TOKENS = 0.7, 2.0
# Upper bound of the acceptance: the formula has no value at 1.
_MOST_ACCEPTANCE = 0.98
# After this many choices against drafts, a draft is verified anyway: step times
# and texts change.
_RETRY = 128


class Seconds(Protocol):
  """The time of programs."""

  def seconds(self, rows: int, width: int) -> float:
    """Returns the seconds of a step; 0: not known yet.

    Args:
      rows: sequences that the program of the step holds.
      width: tokens of each sequence; 1: a decode step.
    """
    ...


class Measured:
  """The measured time of programs; a wider program takes at least as long."""

  def __init__(self):
    self._found: dict[tuple[int, int], tuple[int, float]] = {}

  def observe(self, rows: int, width: int, seconds: float) -> None:
    """Notes the duration of a step."""
    num, before = self._found.get((rows, width), (0, seconds))
    if seconds > before and num >= _SAMPLES:
      seconds = before + _SLOWER_WEIGHT * (seconds - before)
    elif num < _SAMPLES:
      seconds = min(seconds, before)
    self._found[rows, width] = num + 1, seconds

  def seconds(self, rows: int, width: int) -> float:
    """Returns the seconds of a step, see `Seconds`."""
    return max(
      (
        seconds
        for (num_rows, least), (num, seconds) in self._found.items()
        if num_rows == rows and least <= width and num >= _SAMPLES
      ),
      default=0.0,
    )


@dataclasses.dataclass
class _Record:
  """Results of earlier drafts; older drafts weigh less in both numbers."""

  accepted: float = 0.0
  examined: float = 0.0  # accepted tokens, and the first wrong one per draft

  def add(self, accepted: int, examined: int) -> None:
    self.accepted = self.accepted * _KEPT + accepted
    self.examined = self.examined * _KEPT + examined


class Chosen(NamedTuple):
  """The drafts that a step verifies."""

  lengths: dict[Hashable, int]  # tokens of each draft; {}: decode steps
  gain: float  # tokens per second, as a multiple of the rate of decode steps


class Choice:
  """Chooses the drafts of each step of an engine."""

  def __init__(self, costs: Seconds):
    """Starts without results of drafts."""
    self.costs, self._num_declined = costs, 0
    self._all, self._records = _Record(), dict[Hashable, _Record]()

  @property
  def acceptance(self) -> float:
    """Returns the acceptance of recent drafts of all sequences."""
    return _rate(self._all, _PRIOR)

  def expected(self, id: Hashable, length: int) -> float:
    """Returns the tokens that a draft of a sequence gives, on average."""
    own = self._records.get(id, _Record())
    rate = min(_rate(own, self.acceptance), _MOST_ACCEPTANCE)
    return (1 - rate ** (length + 1)) / (1 - rate)

  def choose(
    self,
    drafts: Mapping[Hashable, int],
    shapes: Sequence[tuple[int, int]],
    rows: int,
  ) -> Chosen:
    """Returns how many tokens of each draft to verify.

    Args:
      drafts: tokens of the draft of each decoding sequence, 0 or more.
      shapes: (X spans, R tokens) of the programs that may verify them.
      rows: sequences of the decode steps that would be sent instead.
    """
    plain = self.costs.seconds(rows, 1)
    best = Chosen({}, 1.0)
    for spans, width in sorted(shapes, key=lambda shape: shape[1]):
      lengths = {id: min(num, width - 1) for id, num in drafts.items()}
      if not any(lengths.values()):
        continue
      gain = sum(self.expected(*each) for each in lengths.items()) / len(drafts)
      if plain:
        gain *= plain / max(self.costs.seconds(spans, width), plain)
      if gain > best.gain:
        best = Chosen(lengths, gain)
    if not best.lengths and any(drafts.values()) and shapes:
      self._num_declined += 1
      if self._num_declined > _RETRY:
        width = min(width for _, width in shapes)
        best = Chosen(
          {id: min(num, width - 1) for id, num in drafts.items()}, 1.0
        )
    return best

  def observe(self, id: Hashable, *, accepted: int, length: int) -> None:
    """Notes how many tokens of a draft were accepted."""
    if not length:
      return
    self._num_declined = 0
    examined = min(accepted + 1, length)
    self._all.add(accepted, examined)
    self._records.setdefault(id, _Record()).add(accepted, examined)

  def forget(self, id: Hashable) -> None:
    """Drops the record of a sequence that has ended."""
    self._records.pop(id, None)


def _rate(record: _Record, prior: float) -> float:
  accepted = record.accepted + _PRIOR_TOKENS * prior
  return accepted / (record.examined + _PRIOR_TOKENS)
