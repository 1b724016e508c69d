"""Strategies that sample whole answers and keep one: once, and best of n."""

import dataclasses

from checks import expect
from inference.search import samples as samples_lib, strategy as strategy_lib


@dataclasses.dataclass(frozen=True, kw_only=True)
class SampleOnce:
  """Samples one answer, as without a search."""

  def search(self, desk: strategy_lib.Desk) -> strategy_lib.Course:
    """See `Strategy.search`."""
    desk.ask()
    sample = yield
    return strategy_lib.Choice(sample)


@dataclasses.dataclass(frozen=True, kw_only=True)
class BestOfN:
  """Samples n answers and keeps the one with the largest score.

  Of equals, the first. An answer that was cut short is kept only if no other
  is whole.

  Raises:
    ValueError: n is below 1.
  """

  n: int
  scorer: samples_lib.Scorer

  def __post_init__(self):
    expect.at_least('n', self.n, 1)

  def search(self, desk: strategy_lib.Desk) -> strategy_lib.Course:
    """See `Strategy.search`."""
    desk.ask(self.n, scorer=self.scorer)
    found = []
    while (sample := (yield)) is not None:
      found.append(sample)
    return strategy_lib.Choice(best(found), details={'scores': scores(found)})


def best(found: list[samples_lib.Sample]) -> samples_lib.Sample | None:
  """Returns the sample with the largest score, whole ones before others."""

  def rank(sample: samples_lib.Sample):
    score = -float('inf') if sample.score is None else sample.score
    return sample.is_whole, score, -sample.number

  return max(found, key=rank, default=None)


def scores(found: list[samples_lib.Sample]) -> dict[int, float | None]:
  """Returns the score of each sample, by its number."""
  return {sample.number: sample.score for sample in found}
