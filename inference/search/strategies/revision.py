"""Sequential revision: the model reads its answer and answers again.

Each answer sees those before it. The kept answer is the one with the largest
score, without a scorer the last one.

Reference: Snell et al. 2024 (arXiv:2408.03314), section 6.
"""

import dataclasses

from checks import expect
from inference.search import samples as samples_lib, strategy as strategy_lib
from inference.search.strategies import sampling
from text import tokenizer as tokenizer_lib

WORDS = '\n\nThis may be wrong. I check it and answer again.\n\n'


@dataclasses.dataclass(frozen=True, kw_only=True)
class SequentialRevision:
  """Answers `n` times, one after the other.

  Raises:
    ValueError: n is below 1, or there are no words.
  """

  n: int
  tokenizer: tokenizer_lib.Tokenizer
  scorer: samples_lib.Scorer | None = None
  words: str = WORDS  # between two answers
  enough: float | None = None  # a score with which no revision follows

  def __post_init__(self):
    expect.at_least('n', self.n, 1)
    if not self.words:
      raise ValueError(
        'words: got none, expected a text that asks for a new answer'
      )
    if self.enough is not None and self.scorer is None:
      raise ValueError(
        f'enough: got {self.enough} without a scorer, expected both or neither'
      )

  def search(self, desk: strategy_lib.Desk) -> strategy_lib.Course:
    """See `Strategy.search`."""
    words = tuple(self.tokenizer.encode(self.words))
    found: list[samples_lib.Sample] = []
    desk.ask(scorer=self.scorer)
    is_enough = False
    while (sample := (yield)) is not None:
      found.append(sample)
      is_enough = (
        self.enough is not None
        and sample.score is not None
        and sample.score >= self.enough
      )
      if is_enough or len(found) == self.n or desk.is_spent:
        break
      dropped = sample.last.num_completion_tokens - sample.last.num_text_ids
      desk.ask(
        after=sample,
        keep=len(sample.ids) - dropped,  # without EOS
        forced=words,
        scorer=self.scorer,
        is_anew=True,
      )
    details = {'scores': sampling.scores(found)}
    is_decided = is_enough and len(found) < self.n
    if self.scorer:
      return strategy_lib.Choice(sampling.best(found), is_decided, details)
    whole = [each for each in found if each.is_whole]
    last = (whole or found)[-1:]
    return strategy_lib.Choice(last[0] if last else None, is_decided, details)
