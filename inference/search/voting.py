"""Self-consistency: sample several answers and keep what most of them say.

Votes are counted as samples end. The vote stops as soon as nothing can change
its winner (`confidence = 1`), or as soon as the probability that the rest would
change it is small.

Reference: Wang et al. 2022 (arXiv:2203.11171). The stop with a probability:
Aggarwal et al. 2023 (arXiv:2305.11860), which compares the two answers with
most votes by a Beta distribution.
"""

from collections.abc import Hashable, Mapping
import dataclasses
import math

from checks import expect
from inference.search import samples as samples_lib, search as search_lib


@dataclasses.dataclass(frozen=True, kw_only=True)
class SelfConsistency:
  """Samples up to n answers; the answer with most votes wins.

  Of equals, the one that was voted for by the sample with the smallest number.
  The kept sample is the first that voted for the winner, or the one with the
  largest score.

  Raises:
    ValueError: a field is out of range.
  """

  n: int
  # Weighs each vote by its score, which lies between 0 and 1; None: all are
  # equal.
  scorer: samples_lib.Scorer | None = None
  # Probability that the winner is that of all n votes; 1: it is certain.
  # Below 1 it is the posterior probability that the leader is more probable
  # than the second, under a uniform prior.
  confidence: float = 1.0
  ballot: samples_lib.Ballot = samples_lib.ballot
  at_once: int = 0  # samples that run at the same time; 0: all

  def __post_init__(self):
    expect.at_least('n', self.n, 1)
    expect.at_least('at_once', self.at_once, 0)
    if not 0.5 < self.confidence <= 1:
      raise ValueError(
        f'confidence: got {self.confidence}, expected more than 0.5, at most 1'
      )
    if self.scorer and self.confidence < 1:
      raise ValueError(
        f'confidence: got {self.confidence} with weighted votes, expected 1:'
        ' its probability is of counts; leave out the scorer'
      )

  def search(self, desk: search_lib.Desk) -> search_lib.Course:
    """See `Strategy.search`."""
    found: list[samples_lib.Sample] = []
    first = min(self.n, self.at_once or self.n)
    desk.ask(first, scorer=self.scorer)
    num_asked = first
    is_decided = False
    while (sample := (yield)) is not None:
      found.append(sample)
      left = self.n - len(found)
      if left and self._is_decided(self.tally(found), left):
        is_decided = True
        break
      if num_asked < self.n:
        desk.ask(scorer=self.scorer)
        num_asked += 1
    votes = self.tally(found)
    return search_lib.Choice(
      self._kept(found, votes), is_decided, {'votes': votes}
    )

  def tally(self, found: list[samples_lib.Sample]) -> dict[Hashable, float]:
    """Returns the votes of each answer, the winner first.

    Raises:
      ValueError: a score is outside 0 to 1.
    """
    votes: dict[Hashable, float] = {}
    for sample in sorted(found, key=lambda each: each.number):
      choice = None if _is_cut(sample) else self.ballot(sample)
      if choice is not None:
        votes[choice] = votes.get(choice, 0.0) + self._weight(sample)
    # The sort keeps the order of equals: that of their first votes.
    return dict(sorted(votes.items(), key=lambda item: -item[1]))

  def _weight(self, sample: samples_lib.Sample) -> float:
    if self.scorer is None:
      return 1.0
    if sample.score is None or not 0 <= sample.score <= 1:
      raise ValueError(
        f'scorer: got {sample.score} as the weight of a vote, expected 0 to 1;'
        ' weigh by a verifier, or by a probability'
      )
    return sample.score

  def _is_decided(self, votes: Mapping[Hashable, float], left: int) -> bool:
    if not votes:
      return False
    leader, second = (*votes.values(), 0.0)[:2]
    if leader > second + left:  # each vote weighs at most 1
      return True
    if self.confidence == 1:
      return False
    return probability(int(leader), int(second)) >= self.confidence

  def _kept(
    self, found: list[samples_lib.Sample], votes: Mapping[Hashable, float]
  ) -> samples_lib.Sample | None:
    found = sorted(found, key=lambda each: each.number)
    if not votes:
      whole = [each for each in found if each.is_whole]
      return next(iter(whole or found), None)
    winner = next(iter(votes))
    agreeing = [x for x in found if not _is_cut(x) and self.ballot(x) == winner]
    return max(agreeing, key=lambda x: (x.score or 0.0, -x.number))


def _is_cut(sample: samples_lib.Sample) -> bool:
  """Returns whether the budget ended a sample in the middle of its text."""
  return sample.last.finish_reason == 'cancelled'


def probability(leader: int, second: int) -> float:
  """Returns the probability that the leading answer is the more probable one.

  With a uniform prior on the share p of the leader's votes among those of both,
  p has the distribution Beta(leader + 1, second + 1). P(p > 1/2) is the
  probability of at most `second` heads in leader + second + 1 fair coins.
  """
  num = leader + second + 1
  below = sum(math.comb(num, heads) for heads in range(second + 1))
  return below / 2**num
