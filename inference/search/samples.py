"""Questions of a search, and the samples that answer them."""

from collections.abc import Callable, Hashable, Mapping, Sequence
import dataclasses
from typing import Any, NamedTuple, Protocol

import numpy as np

from evals import judges
from inference.requests import requests as requests_lib
from inference.search import budget as budget_lib
from text.replies import answers


@dataclasses.dataclass(frozen=True, kw_only=True)
class Question:
  """A prompt with the settings of each sample, and what is known of it."""

  # `n` is 1: the strategy chooses the number of samples. `seed` is that of
  # sample 0; `max_tokens` is of one sample.
  request: requests_lib.Request
  prompt: judges.Prompt = ''  # text or messages, for reward models
  record: Mapping[str, Any] = dataclasses.field(default_factory=dict)
  # Completions made for it before, such as the prefill that a router reads. The
  # budget pays for them, and the receipt has them.
  before: tuple[requests_lib.Completion, ...] = ()


class Reading(NamedTuple):
  """The parts of a sampled text."""

  answer: str  # that the user reads
  reasoning: str = ''
  num_reasoning: int = 0  # first ids, of the reasoning and its markers


# Reads (text, ids, the number of first ids that spell the text) of a sample.
Read = Callable[[str, Sequence[int], int], Reading]


def plain(text: str, ids: Sequence[int], num_text_ids: int) -> Reading:
  """Reads a text without reasoning."""
  return Reading(text)


@dataclasses.dataclass(frozen=True, kw_only=True, eq=False)
class Sample:
  """A text that answers a question, sampled in one part or in several."""

  number: int  # of its last part among the parts of the search, from 0
  tag: Any  # that the strategy gave when it asked for the last part
  parts: tuple[requests_lib.Completion, ...]  # sampled one after the other
  ids: tuple[int, ...]  # after the prompt: sampled, and forced
  forced: frozenset[int]  # places of forced ids among them
  text: str
  reading: Reading
  logprobs: np.ndarray | None  # float64, of the sampled ids
  score: float | None = None  # by the scorer of the ask; None: none, or cut

  @property
  def answer(self) -> str:
    """The text without reasoning."""
    return self.reading.answer

  @property
  def last(self) -> requests_lib.Completion:
    """The completion of the last part."""
    return self.parts[-1]

  @property
  def is_whole(self) -> bool:
    """Whether nothing cut it short: no length, budget or error."""
    return self.last.finish_reason == 'stop'

  @property
  def num_sampled(self) -> int:
    """Number of its ids that were sampled."""
    return len(self.ids) - len(self.forced)

  @property
  def num_reasoning(self) -> int:
    """Number of sampled ids of the reasoning."""
    places = range(self.reading.num_reasoning)
    return sum(place not in self.forced for place in places)

  @property
  def mean_logprob(self) -> float:
    """The mean log-probability of its sampled tokens, in nats.

    Raises:
      ValueError: the request has no log-probabilities.
    """
    if self.logprobs is None:
      raise ValueError(
        'sample: got no log-probabilities, expected those of its tokens; set'
        ' logprobs = 0 in the settings of the question'
      )
    # Without a token there is nothing that the model preferred.
    return float(self.logprobs.mean()) if len(self.logprobs) else -np.inf


class Scorer(Protocol):
  """Says how good a sample is: a `Rule`, or `Requested` of a model.

  It takes no random decisions. The budget of a search pays for it.
  """

  @property
  def needs_logprobs(self) -> bool:
    """Whether it reads the log-probabilities of samples."""
    ...

  def cost(self, num_tokens: int) -> budget_lib.Cost:
    """Returns the most that it costs to read a prompt with its answer."""
    ...


class Rule(Scorer, Protocol):
  """A scorer that is called, such as a verifier."""

  def __call__(self, question: Question, sample: Sample) -> float:
    """Returns a finite number; larger is better."""
    ...

  def num_read(self, num_tokens: int) -> int:
    """Returns how many tokens a model reads for that; 0 for a rule."""
    ...


@dataclasses.dataclass(frozen=True, kw_only=True, eq=False)
class Requested:
  """A scorer whose scores are requests of the search, to a model.

  Nothing is sampled in them: the one token of a completion is given.
  """

  request: Callable[[Question, Sample], requests_lib.Request]
  read: Callable[[requests_lib.Completion], float]  # the score
  costs: budget_lib.Costs  # of the model that computes it
  # Most ids of a request, beside those of the prompt and the sample.
  num_more: int
  place: Any = None  # the model; None: the one that answers
  needs_logprobs: bool = False

  def cost(self, num_tokens: int) -> budget_lib.Cost:
    """Returns the most that it costs to read a prompt with its answer."""
    num = num_tokens + self.num_more
    return budget_lib.Cost(
      flops=self.costs.flops(0, num, 1),
      money=self.costs.prices.most_money(prompt=num, completion=0),
    )

  def paid(self, usage: requests_lib.Usage) -> budget_lib.Cost:
    """Returns what a request has cost."""
    return budget_lib.Cost(
      flops=usage.flops,
      money=self.costs.prices.money(
        prompt=usage.prompt_tokens, cached=usage.cached_tokens, completion=0
      ),
    )

  def checked(
    self, request: requests_lib.Request, num_tokens: int
  ) -> requests_lib.Request:
    """Returns a request that cannot cost more than is reserved.

    Raises:
      ValueError: it has more tokens than were reserved.
    """
    most = num_tokens + self.num_more
    if len(request.prompt_ids) > most:
      raise ValueError(
        f'scorer: got {len(request.prompt_ids)} tokens to read, expected at'
        f' most {most}; take a reward model with the tokenizer of the model'
      )
    # A preemption computes tokens again, for which nothing is reserved.
    return dataclasses.replace(request, most_flops=self.cost(num_tokens).flops)


# What a sample votes for; None: nothing.
Ballot = Callable[[Sample], Hashable | None]


def ballot(sample: Sample) -> Hashable | None:
  """Returns the value of the answer, equal however it is written.

  A number votes for its value: 1,000 and 1000.0 are one. Of another text, case
  and spaces at the ends do not count. An empty answer has no vote. An answer
  that was cut short votes only if it is marked as such: the last number of half
  a solution is none.
  """
  given = answers.given(sample.answer, is_strict=not sample.is_whole)
  if given is None or not given.strip():
    return None
  found = answers.value(given)
  return given.strip().casefold() if found is None else found
