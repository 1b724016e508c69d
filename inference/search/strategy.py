"""What a strategy is: it asks a desk for samples, and chooses one.

    def search(self, desk):
      desk.ask(8)
      samples = []
      while (sample := (yield)) is not None:
        samples.append(sample)
      return Choice(best(samples))

It is sent each sample as it ends. None says that nothing is open: all samples
have ended, or the rest are beyond the budget (`desk.is_spent`). A strategy that
returns earlier has its open samples cancelled. So it decides and computes
nothing; it knows neither the engine nor time, and runs offline and on a server
alike.
"""

import collections
from collections.abc import Generator, Mapping, Sequence
import dataclasses
from typing import Any, NamedTuple, Protocol

from inference.sampling import settings as settings_lib
from inference.search import samples as samples_lib


class Choice(NamedTuple):
  """What a strategy returns."""

  sample: samples_lib.Sample | None  # None: nothing was sampled
  is_decided: bool = False  # before all samples had ended
  # What the choice was made of, such as votes, for reports.
  details: Mapping[str, Any] = {}


# What a strategy's `search` is.
Course = Generator[None, samples_lib.Sample | None, Choice]


class Strategy(Protocol):
  """A way to spend a budget on a question; a frozen dataclass."""

  def search(self, desk: 'Desk') -> Course:
    """Asks for samples, takes them, and returns its choice."""
    ...


@dataclasses.dataclass(kw_only=True)
class Ask:
  """Samples that a strategy wants, and that are not requested yet."""

  num: int
  after: samples_lib.Sample | None
  keep: int  # ids of `after` that they continue
  forced: tuple[int, ...]
  settings: settings_lib.Settings
  scorer: samples_lib.Scorer | None
  least_tokens: int
  is_anew: bool
  tag: Any

  @property
  def prefix(self) -> tuple[int, ...]:
    """The ids between the prompt and what is sampled."""
    return (*(self.after.ids[: self.keep] if self.after else ()), *self.forced)


class Desk:
  """Where a strategy asks for samples."""

  def __init__(self, question: samples_lib.Question):
    self.question = question
    self.is_spent = False  # a sample was refused, or cut short
    self.asks: collections.deque[Ask] = collections.deque()

  def ask(
    self,
    num: int = 1,
    *,
    after: samples_lib.Sample | None = None,
    keep: int | None = None,
    forced: Sequence[int] = (),
    scorer: samples_lib.Scorer | None = None,
    least_tokens: int = 1,
    is_anew: bool = False,
    tag: Any = None,
    **settings: Any,
  ) -> None:
    """Asks for samples.

    Args:
      num: of samples.
      after: that they continue; None: they follow the prompt.
      keep: the number of its ids that they continue; None: all.
      forced: ids that are put in before they begin.
      scorer: scores each one that was not cut short by the budget.
      least_tokens: when the budget is nearly spent, a sample is cut to what is
        left if it is at least so many tokens.
      is_anew: whether the answer is in the new part alone; what was said
        before counts as reasoning.
      tag: of each sample.
      **settings: fields of `Settings` in place of the question's.
    """
    if num < 1:
      raise ValueError(f'ask: got {num} samples, expected at least 1')
    if after and keep is None:
      keep = len(after.ids)
    chosen = dataclasses.replace(self.question.request.settings, **settings)
    if chosen.logprobs is None and scorer and scorer.needs_logprobs:
      chosen = dataclasses.replace(chosen, logprobs=0)
    self.asks.append(
      Ask(
        num=num,
        after=after,
        keep=keep or 0,
        forced=tuple(forced),
        settings=chosen,
        scorer=scorer,
        least_tokens=least_tokens,
        is_anew=is_anew,
        tag=tag,
      )
    )
