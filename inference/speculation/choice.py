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

While no request waits for a place, an answer that ends sooner makes room for
none. The others are slower for it, and the last one ends later. So the rates of
the sequences then count by their geometric mean (proportional fairness,
Kelly et al., doi:10.1057/palgrave.jors.2600523), and by their sum in a queue.

Beside prompt chunks the work that is due counts: prompts, and after them decode
steps. A draft is worth its time there if its tokens cost less than decode steps
would take for them later, when these serve the sequences of the prompts, too.
While decode steps were never measured, a token of a prompt counts as one of an
answer does. A step of its own for drafts, between two with chunks, would cost
the time that it costs after the prompts, and delay them: drafts take places of
decodes in the step that the chunks need anyway.

The choice changes the time of tokens, and never a token.
"""

from collections.abc import Callable, Hashable, Mapping, Sequence
import dataclasses
import statistics
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
# Smaller gains are not taken. Acceptance and times are estimates, and the best
# of several estimates is more often too good than too bad.
_LEAST_GAIN = 1.03
# After this many choices against drafts, a draft is verified anyway: step times
# and texts change.
_RETRY = 128


class Seconds(Protocol):
  """The time of programs."""

  def seconds(self, rows: Hashable, width: int) -> float:
    """Returns the seconds of a step; 0: not known yet.

    Args:
      rows: sequences that the program of the step holds; with chunks its shape.
      width: tokens of each sequence; 1: a decode step.
    """
    ...


class Measured:
  """The measured time of programs; a wider program takes at least as long."""

  def __init__(self):
    self._found: dict[tuple[Hashable, int], tuple[int, float]] = {}

  def observe(self, rows: Hashable, width: int, seconds: float) -> None:
    """Notes the duration of a step."""
    num, before = self._found.get((rows, width), (0, seconds))
    if seconds > before and num >= _SAMPLES:
      seconds = before + _SLOWER_WEIGHT * (seconds - before)
    elif num < _SAMPLES:
      seconds = min(seconds, before)
    self._found[rows, width] = num + 1, seconds

  def seconds(self, rows: Hashable, width: int) -> float:
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


class _Way(NamedTuple):
  """A program that may verify drafts, and the drafts that it would verify."""

  rows: Hashable
  width: int
  lengths: dict[Hashable, int]  # of every decoding sequence


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
    rate = self._rate_of(id)
    return (1 - rate ** (length + 1)) / (1 - rate)

  def choose(
    self,
    drafts: Mapping[Hashable, int],
    shapes: Sequence[tuple[int, int]],
    rows: Hashable,
    *,
    is_queue: bool,
  ) -> Chosen:
    """Returns how many tokens of each draft to verify.

    Args:
      drafts: tokens of the draft of each decoding sequence, 0 or more.
      shapes: (X spans, R tokens) of the programs that may verify them.
      rows: sequences of the decode steps that would be sent instead.
      is_queue: whether requests wait for the place of a sequence.
    """
    return self._best(
      [
        _Way(spans, width, {id: min(x, width - 1) for id, x in drafts.items()})
        for spans, width in sorted(shapes, key=lambda shape: shape[1])
      ],
      rows,
      mean=statistics.fmean if is_queue else statistics.geometric_mean,
    )

  def choose_beside(
    self,
    drafts: Mapping[Hashable, int],
    shapes: Sequence[tuple[int, int]],
    rows: Hashable,
    *,
    width: int,
    num_prompt: int,
    rows_later: Hashable,
    num_later: int,
  ) -> Chosen:
    """Returns how many tokens of each draft to verify beside prompt chunks.

    Args:
      drafts: tokens of the draft of each decoding sequence, 0 or more.
      shapes: (D decodes, X chunks) of the programs that may verify them, the
        smallest first. Each token of a draft takes the place of a decode.
      rows: the shape of the step that would be sent without drafts.
      width: most tokens of one sequence, its draft and the one before.
      num_prompt: tokens of prompts that the step computes.
      rows_later: sequences of the decode steps that follow the prompts.
      num_later: sequences that decode in them.
    """
    later = self.costs.seconds(rows_later, 1) / max(num_later, len(drafts))
    if not later:
      later = self.costs.seconds(rows, 1) / (len(drafts) + num_prompt)
    return self._best(
      [
        _Way(shape, width, self._allotted(drafts, shape[0], width - 1))
        for shape in shapes
      ],
      rows,
      later,
    )

  def _best(
    self,
    ways: Sequence[_Way],
    rows: Hashable,
    later: float = 0.0,
    mean: Callable[[Sequence[float]], float] = statistics.fmean,
  ) -> Chosen:
    """Returns the drafts of the way with the most tokens per second.

    Args:
      ways: to verify drafts, the cheapest first.
      rows: of the step without drafts.
      later: seconds that a further token would take after this step, if the
        step has to be sent anyway; 0: it has not, or they are unknown.
      mean: of the tokens of the sequences.
    """
    plain = self.costs.seconds(rows, 1)
    ways = [way for way in ways if any(way.lengths.values())]
    best = Chosen({}, 1.0)
    for way in ways:
      made = [self.expected(*each) for each in way.lengths.items()]
      gain = mean(made)
      if plain and later:
        gain = (plain + (sum(made) - len(made)) * later) / plain
      if plain:
        gain *= plain / max(self.costs.seconds(way.rows, way.width), plain)
      if gain > max(best.gain, _LEAST_GAIN):
        best = Chosen(way.lengths, gain)
    if not best.lengths and ways:
      self._num_declined += 1
      if self._num_declined > _RETRY:
        best = Chosen(ways[0].lengths, 1.0)
    return best

  def _allotted(
    self, drafts: Mapping[Hashable, int], num_rows: int, most: int
  ) -> dict[Hashable, int]:
    """Returns the tokens of drafts that are likeliest, as many as have places.

    Args:
      drafts: tokens of the draft of each decoding sequence.
      num_rows: places, one of each sequence included.
      most: tokens of one draft.
    """
    likely = sorted(
      (-(self._rate_of(id) ** place), order, id)
      for order, (id, num) in enumerate(drafts.items())
      for place in range(1, min(num, most) + 1)
    )
    chosen = dict.fromkeys(drafts, 0)
    for _, _, id in likely[: max(num_rows - len(drafts), 0)]:
      chosen[id] += 1
    return chosen

  def _rate_of(self, id: Hashable) -> float:
    """Returns the acceptance that is expected of a sequence."""
    own = self._records.get(id, _Record())
    return min(_rate(own, self.acceptance), _MOST_ACCEPTANCE)

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
