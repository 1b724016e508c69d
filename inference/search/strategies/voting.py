"""Self-consistency: sample several answers and keep what most of them say.

Votes are counted as samples end. The vote stops as soon as nothing can change
its winner (`confidence = 1`), or as soon as the probability that the rest would
change it is small.

Reference: Wang et al. 2022 (arXiv:2203.11171). The stop with a probability:
Aggarwal et al. 2023 (arXiv:2305.11860), which compares the two answers with
most votes by a Beta distribution.
"""

from collections.abc import Hashable
import dataclasses
import math

from checks import expect
from inference.search import samples as samples_lib, strategy as strategy_lib


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

  def search(self, desk: strategy_lib.Desk) -> strategy_lib.Course:
    """See `Strategy.search`."""
    votes = _Votes(self)
    num_asked = min(self.n, self.at_once or self.n)
    desk.ask(num_asked, scorer=self.scorer)
    is_decided = False
    while (sample := (yield)) is not None:
      votes.add(sample)
      left = self.n - votes.num_samples
      if left and self._is_decided(votes, left):
        is_decided = True
        break
      if num_asked < self.n and not desk.is_spent:
        desk.ask(scorer=self.scorer)
        num_asked += 1
    details = {'votes': votes.ranked()}
    return strategy_lib.Choice(votes.kept(), is_decided, details)

  def _is_decided(self, votes: '_Votes', left: int) -> bool:
    leader, second = (*sorted(votes.counts.values())[:-3:-1], 0.0, 0.0)[:2]
    if leader > second + left:  # each vote weighs at most 1
      return True
    if self.confidence == 1 or not leader:
      return False
    return probability(int(leader), int(second)) >= self.confidence


class _Votes:
  """The votes so far."""

  def __init__(self, rule: SelfConsistency):
    self._rule, self.num_samples = rule, 0
    self.counts: dict[Hashable, float] = {}
    # The samples that voted for each answer; and all, to have one of no votes.
    self._voters: dict[Hashable, list[samples_lib.Sample]] = {}
    self._all: list[samples_lib.Sample] = []

  def add(self, sample: samples_lib.Sample) -> None:
    """Counts the vote of a sample.

    Raises:
      ValueError: its score is outside 0 to 1.
    """
    self.num_samples += 1
    self._all.append(sample)
    # One that the budget cut in the middle of its text says nothing yet.
    if sample.last.finish_reason == 'cancelled':
      return
    choice = self._rule.ballot(sample)
    if choice is not None:
      before = self.counts.get(choice, 0.0)
      self.counts[choice] = before + self._weight(sample)
      self._voters.setdefault(choice, []).append(sample)

  def ranked(self) -> dict[Hashable, float]:
    """Returns the votes of each answer, the winner first."""

    def rank(choice):
      first = min(sample.number for sample in self._voters[choice])
      return -self.counts[choice], first

    return {x: self.counts[x] for x in sorted(self.counts, key=rank)}

  def kept(self) -> samples_lib.Sample | None:
    """Returns the sample that speaks for the winner."""
    ranked = self.ranked()
    if not ranked:
      whole = [each for each in self._all if each.is_whole]
      return min(whole or self._all, key=lambda x: x.number, default=None)
    voters = self._voters[next(iter(ranked))]
    return max(voters, key=lambda x: (x.score or 0.0, -x.number))

  def _weight(self, sample: samples_lib.Sample) -> float:
    if self._rule.scorer is None:
      return 1.0
    if sample.score is None:
      return 0.0  # its score was not computed before the end
    if not 0 <= sample.score <= 1:
      raise ValueError(
        f'scorer: got {sample.score} as the weight of a vote, expected 0 to 1;'
        ' weigh by a verifier, or by a probability'
      )
    return sample.score


def probability(leader: int, second: int) -> float:
  """Returns the probability that the leading answer is the more probable one.

  With a uniform prior on the share p of the leader's votes among those of both,
  p has the distribution Beta(leader + 1, second + 1). P(p > 1/2) is the
  probability of at most `leader` heads in leader + second + 1 fair coins.
  """
  num = leader + second + 1
  below = sum(math.comb(num, heads) for heads in range(leader + 1))
  return below / 2**num
