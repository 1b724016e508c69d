"""Budget forcing: reason for longer, or stop and answer (s1).

The model reasons. When it closes its reasoning before it was asked to, the end
is taken back, "Wait" stands in its place, and the model goes on. When the
reasoning has its most tokens, the closing marker is put in, and the model
answers. Each part is a request that continues the text before it; the prefix
cache has all whole pages of that text, so a part computes again the tokens of
one page at most.

Reference: Muennighoff et al. 2025, s1 (arXiv:2501.19393), section 3.1.
"""

import dataclasses

from checks import expect
from inference.search import samples as samples_lib, strategy as strategy_lib
from text import tokenizer as tokenizer_lib


@dataclasses.dataclass(frozen=True, kw_only=True)
class BudgetForcing:
  """Samples one answer whose reasoning is of a chosen length.

  The prompt of the question ends inside of the reasoning, or where the model
  opens it.

  Raises:
    ValueError: a number is out of range, or a text is empty.
  """

  tokenizer: tokenizer_lib.Tokenizer
  most_reasoning: int  # sampled tokens; never exceeded, the markers beside it
  num_waits: int = 0  # ends of the reasoning that are taken back
  opening: str = '<think>'
  closing: str = '</think>'
  is_open: bool = True  # the prompt ends inside of the reasoning
  word: str = 'Wait'
  most_answer: int | None = None  # tokens; None: the question's max_tokens

  def __post_init__(self):
    expect.at_least('most_reasoning', self.most_reasoning, 1)
    expect.at_least('num_waits', self.num_waits, 0)
    if not (self.opening and self.closing and self.word):
      raise ValueError(
        f'budget forcing: got the markers {self.opening!r}, {self.closing!r}'
        f' and the word {self.word!r}, expected three texts'
      )

  def search(self, desk: strategy_lib.Desk) -> strategy_lib.Course:
    """See `Strategy.search`."""
    settings = desk.question.request.settings
    begin = () if self.is_open else self._ids(self.opening)
    ends = {}
    if (closing := self._special()) is None:
      ends['stop'] = (*settings.stop, self.closing)
    else:
      ends['stop_ids'] = (*settings.stop_ids, closing)
    left, waits = self.most_reasoning, self.num_waits
    desk.ask(forced=begin, max_tokens=left, **ends)
    thought = yield
    while thought is not None:
      left -= thought.last.num_completion_tokens
      if not self._has_closed(thought) or not waits or left < 1:
        break
      waits -= 1
      word = self._ids(self.word)
      desk.ask(
        after=thought, keep=self._end(thought), forced=word, max_tokens=left,
        **ends,
      )  # fmt: skip
      longer = yield
      if longer is None:
        break
      thought = longer
    if thought is None or self._is_over(thought):
      return strategy_lib.Choice(thought)
    desk.ask(
      after=thought,
      keep=self._end(thought),
      forced=self._ids(self.closing),
      max_tokens=self.most_answer or settings.max_tokens,
    )
    answer = yield
    # If the budget leaves no answer, the reasoning is returned alone.
    return strategy_lib.Choice(answer or thought)

  def _special(self) -> int | None:
    return self.tokenizer.special_tokens.get(self.closing)

  def _ids(self, text: str) -> tuple[int, ...]:
    special = self.tokenizer.special_tokens.get(text)
    return tuple(self.tokenizer.encode(text)) if special is None else (special,)

  def _has_closed(self, sample: samples_lib.Sample) -> bool:
    special = self._special()
    expected = self.closing if special is None else special
    return sample.last.stop_reason == expected

  def _is_over(self, sample: samples_lib.Sample) -> bool:
    """Returns whether the model has ended its answer inside of reasoning."""
    return sample.is_whole and not self._has_closed(sample)

  def _end(self, sample: samples_lib.Sample) -> int:
    """Returns the number of ids before the closing marker."""
    if not self._has_closed(sample):
      return len(sample.ids)
    dropped = sample.last.num_completion_tokens - sample.last.num_text_ids
    return len(sample.ids) - dropped
