"""A search: one strategy answers one question within one budget.

`inference.search.drive` carries its requests to an engine.

Sample i has the seed of sample i of one request for several. So samples do not
depend on how the budget let them start, together or one by one.
"""

import collections
from collections.abc import Mapping
import dataclasses
from typing import Any, NamedTuple, cast

import numpy as np

from inference.requests import prices as prices_lib, requests as requests_lib
from inference.sampling import settings as settings_lib
from inference.search import (
  budget as budget_lib,
  joining,
  receipt as receipt_lib,
  samples as samples_lib,
  strategy as strategy_lib,
)
from text import tokenizer as tokenizer_lib

# Why a search ended: the strategy had all that it asked for; it knew the
# answer before; the budget, its seconds or the context were spent.
DONE, DECIDED, SPENT = 'done', 'decided', 'budget'
# Sequences of one request, so that one search never fills a queue at once.
MOST_AT_ONCE = 64


@dataclasses.dataclass(frozen=True, kw_only=True)
class Outcome:
  """The answer to a question, and what it has cost."""

  chosen: samples_lib.Sample | None  # None: the budget is below one token
  samples: tuple[samples_lib.Sample, ...]  # that the strategy has seen
  receipt: receipt_lib.Receipt
  ended_by: str  # DONE | DECIDED | SPENT
  details: Mapping[str, Any]

  @property
  def text(self) -> str:
    """The answer without its reasoning, '' if there is none."""
    return self.chosen.answer if self.chosen else ''


@dataclasses.dataclass(kw_only=True)
class _Open:
  """Sequences of one request that have not all ended."""

  ask: strategy_lib.Ask
  first: int  # number of the first one
  num_left: int
  reserved: budget_lib.Cost  # of each that has not ended
  prices: prices_lib.Prices
  ended: list[requests_lib.Update] = dataclasses.field(default_factory=list)

  def spent(self) -> budget_lib.Cost:
    """Returns what sequences that have ended cost, as a ledger counts it.

    They share a prompt. It is paid as the first of them found it; until all
    have ended, at the most that it can cost.
    """
    done = [
      each.completion
      for each in sorted(self.ended, key=lambda update: update.index)
      if each.completion
    ]
    if not done:
      return budget_lib.Cost()
    longest = max(done, key=lambda each: each.usage.prompt_tokens).usage
    num_new = sum(each.num_completion_tokens for each in done)
    if self.num_left:
      money = self.prices.most_money(
        prompt=longest.prompt_tokens, completion=num_new
      )
    else:
      money = self.prices.money(
        prompt=longest.prompt_tokens,
        cached=longest.cached_tokens,
        completion=num_new,
      )
    return budget_lib.Cost(
      tokens=num_new,
      flops=sum(each.usage.flops for each in done),
      money=money,
    )


class Search:
  """A strategy at work; belongs to one thread at a time.

  while request := search.next_request(): key, request = ...
  search.take(key, update)
  search.to_cancel()
  """

  def __init__(
    self,
    strategy: strategy_lib.Strategy,
    question: samples_lib.Question,
    *,
    budget: budget_lib.Budget,
    costs: budget_lib.Costs,
    tokenizer: tokenizer_lib.Tokenizer,
    room: int,
    read: samples_lib.Read = samples_lib.plain,
    now: float = 0.0,
  ):
    """Begins; the strategy asks for its first samples.

    Args:
      strategy: that answers.
      question: to answer.
      budget: that is never exceeded.
      costs: of samples of the model.
      tokenizer: of the model.
      room: tokens that the engine lets follow the prompt.
      read: parts of a sampled text.
      now: the time in seconds, on the clock of `outcome` and `expire`.

    Raises:
      ValueError: the question asks for several samples, or for
        log-probabilities of its prompt.
    """
    settings = question.request.settings
    for name, value, only in (
      ('n', settings.n, 1),
      ('prompt_logprobs', settings.prompt_logprobs, None),
    ):
      if value != only:
        raise ValueError(
          f'{name}: got {value} in the question of a search, expected {only}:'
          ' the strategy chooses the samples'
        )
    self.budget, self._costs, self._began = budget, costs, now
    self._tokenizer, self._room, self._read = tokenizer, room, read
    self.deadline = now + budget.seconds if budget.seconds else None
    seed = settings.seed
    self._seed = settings_lib.new_seed() if seed is None else seed
    self._question, self._desk = question, strategy_lib.Desk(question)
    self._open: dict[int, _Open] = {}  # by key
    self._num_keys = self._num_parts = 0
    self._ended: list[requests_lib.Completion] = []
    # Samples whose scores are not requested yet, and open requests of scores.
    self._unscored: collections.deque[_Unscored] = collections.deque()
    self._scoring: dict[int, _Unscored] = {}  # by key
    self._score_parts: list[requests_lib.Completion] = []
    self._total, self._scores = self._paid_before(), budget_lib.Cost()
    self._scored_tokens = 0
    self._seen: list[samples_lib.Sample] = []
    self._choice: strategy_lib.Choice | None = None
    self._is_expired = False
    self._course = strategy.search(self._desk)
    self._advance(None, is_first=True)

  @property
  def is_done(self) -> bool:
    """Whether the strategy has chosen and no sample is open."""
    return self._choice is not None and not (self._open or self._scoring)

  @property
  def spent(self) -> budget_lib.Cost:
    """What ended samples and scores have cost so far."""
    spent = self._total + self._scores
    for each in self._open.values():
      spent = spent + each.spent()
    return spent

  @property
  def _is_waiting(self) -> bool:
    """Whether a sample is open, or its score."""
    return bool(self._open or self._unscored or self._scoring)

  def to_cancel(self) -> list[int]:
    """Returns the keys of requests that the strategy needs no more."""
    if self._choice is None:
      return []
    return [*self._open, *self._scoring]

  def place(self, key: int) -> Any:
    """Returns the model of an open request; None: the one that answers."""
    scoring = self._scoring.get(key)
    return scoring.scorer.place if scoring else None

  def expire(self) -> list[int]:
    """Ends all at the deadline: returns the keys of requests to cancel.

    The strategy gets what was sampled so far.
    """
    self._is_expired = self._desk.is_spent = True
    while self._unscored and self._choice is None:
      self._deliver(self._unscored.popleft().sample)
    self._settle_down()
    return [*self._open, *self._scoring]

  def next_request(self) -> tuple[int, requests_lib.Request] | None:
    """Returns the next request and its key; None: nothing may start now.

    Its most expensive end is reserved.
    """
    self._settle_down()
    if self._choice is None and self._unscored:
      return self._next_score()
    if self._choice is not None or not self._desk.asks:
      return None
    ask = self._desk.asks[0]
    num, most, each = self._affordable(ask)
    if not num:
      if self._is_waiting:
        return None  # they may leave something
      self._desk.is_spent = True
      self._desk.asks.clear()
      return self.next_request()
    if num == ask.num:
      self._desk.asks.popleft()
    else:
      self._desk.asks[0] = dataclasses.replace(ask, num=ask.num - num)
    key, self._num_keys = self._num_keys, self._num_keys + 1
    self._open[key] = _Open(
      ask=ask,
      first=self._num_parts,
      num_left=num,
      reserved=each,
      prices=self._costs.prices,
    )
    request = self._request(ask, num, most)
    self._num_parts += num
    return key, request

  def withdraw(self, key: int) -> None:
    """Takes back a request that the engine never got."""
    if scoring := self._scoring.pop(key, None):
      if self._choice is None:
        self._deliver(scoring.sample)
      return
    del self._open[key]
    self._settle_down()

  def take(self, key: int, update: requests_lib.Update) -> None:
    """Takes an update of a request; of interest is the end of a sequence.

    Raises:
      NotFinite, Stuck: a sequence ended with an error.
    """
    completion = update.completion
    if completion is None:
      return
    if key in self._scoring:
      sample = self._take_score(key, completion)
      if self._choice is None:
        self._deliver(sample)
      return
    group = self._open[key]
    group.num_left -= 1
    group.ended.append(update)
    if not group.num_left:
      del self._open[key]
      self._total = self._total + group.spent()
    self._ended.append(completion)
    completion.check()
    if self._choice is not None:
      return
    sample = self._judged(
      group.ask,
      joining.joined(
        group.ask,
        completion,
        number=group.first + update.index,
        tokenizer=self._tokenizer,
        read=self._read,
      ),
    )
    if sample is not None:
      self._deliver(sample)

  def outcome(self, now: float) -> Outcome:
    """Returns the outcome of a search that is done."""
    assert self._choice is not None
    assert self.is_done
    choice = self._choice
    prompt = self._question.request.prompt_ids
    ended_by = DECIDED if choice.is_decided else DONE
    return Outcome(
      chosen=choice.sample,
      samples=tuple(self._seen),
      receipt=receipt_lib.made(
        choice.sample,
        self._ended,
        unsampled=[*self._question.before, *self._score_parts],
        num_prompt=len(prompt),
        total=self._total + self._scores,
        scores=self._scores,
        scored_tokens=self._scored_tokens,
        costs=self._costs,
        seconds=now - self._began,
      ),
      ended_by=SPENT if self._desk.is_spent else ended_by,
      details=choice.details,
    )

  def _paid_before(self) -> budget_lib.Cost:
    """Returns what completions before the search have cost; none sampled."""
    paid = budget_lib.Cost()
    for each in self._question.before:
      used = each.usage
      money = self._costs.prices.money(
        prompt=used.prompt_tokens, cached=used.cached_tokens, completion=0
      )
      paid = paid + budget_lib.Cost(flops=used.flops, money=money)
    return paid

  def _advance(
    self, sample: samples_lib.Sample | None, *, is_first: bool = False
  ) -> None:
    try:
      if is_first:
        next(self._course)
      else:
        self._course.send(sample)
    except StopIteration as end:
      self._choice = end.value
      self._desk.asks.clear()
      self._unscored.clear()

  def _settle_down(self) -> None:
    """Tells the strategy that nothing is open, until it asks or returns."""
    while self._choice is None:
      if self._is_expired:
        self._desk.asks.clear()
      if self._is_waiting or self._desk.asks:
        return
      self._advance(None)
      if self._choice or self._desk.asks:
        continue
      raise RuntimeError(
        'search: got a strategy that waits without having asked, expected an'
        ' ask or its choice; report this as a bug'
      )

  def _affordable(
    self, ask: strategy_lib.Ask
  ) -> tuple[int, int, budget_lib.Cost]:
    """Returns (samples that may start, tokens of each, cost of each)."""
    num_prompt = len(self._question.request.prompt_ids) + len(ask.prefix)
    room = self._room - len(ask.prefix)
    most = min(ask.settings.max_tokens or room, room)
    held = self._held()

    def allows(num: int, tokens: int) -> bool:
      each = self._most(ask, num_prompt, tokens)
      return self.budget.allows(held + each * num)

    if most < 1:  # the context is full
      return 0, 0, budget_lib.Cost()
    num = _largest(min(ask.num, MOST_AT_ONCE), lambda n: allows(n, most))
    if not num and not self._is_waiting:
      shorter = _largest(most - 1, lambda tokens: allows(1, tokens))
      if shorter >= max(1, ask.least_tokens):
        self._desk.is_spent = True
        num, most = 1, shorter
    return num, most, self._most(ask, num_prompt, most)

  def _most(
    self, ask: strategy_lib.Ask, num_prompt: int, tokens: int
  ) -> budget_lib.Cost:
    cost = self._costs.most(num_prompt, tokens)
    return cost + ask.scorer.cost(num_prompt + tokens) if ask.scorer else cost

  def _held(self) -> budget_lib.Cost:
    """Returns what is spent and reserved."""
    held = self.spent
    for each in self._open.values():
      held = held + each.reserved * each.num_left
    for waiting in (*self._unscored, *self._scoring.values()):
      held = held + waiting.cost
    return held

  def _request(
    self, ask: strategy_lib.Ask, num: int, most: int
  ) -> requests_lib.Request:
    asked = self._question.request
    prompt_ids = (*asked.prompt_ids, *ask.prefix)
    least = min(ask.settings.min_tokens, most)
    return dataclasses.replace(
      asked,
      prompt_ids=prompt_ids,
      settings=dataclasses.replace(
        ask.settings, n=num, max_tokens=most, min_tokens=least, seed=self._seed
      ),
      first_sample=self._num_parts,
      # A preemption computes tokens again, for which nothing is reserved.
      most_flops=self._costs.sample_flops(len(prompt_ids), most),
      room=None,
    )

  def _judged(
    self, ask: strategy_lib.Ask, sample: samples_lib.Sample
  ) -> samples_lib.Sample | None:
    """Returns a sample with its score; None: a model must compute that."""
    scorer = ask.scorer
    if scorer is None or sample.last.finish_reason == 'cancelled':
      return sample
    num_tokens = len(self._question.request.prompt_ids) + len(sample.ids)
    if isinstance(scorer, samples_lib.Requested):
      self._unscored.append(_Unscored(scorer, sample, num_tokens))
      return None
    rule = cast(samples_lib.Rule, scorer)
    self._scores = self._scores + rule.cost(num_tokens)
    self._scored_tokens += rule.num_read(num_tokens)
    return _with_score(sample, rule(self._question, sample))

  def _next_score(self) -> tuple[int, requests_lib.Request]:
    """Returns the request of a score, which is reserved already."""
    waiting = self._unscored.popleft()
    request = waiting.scorer.checked(
      waiting.scorer.request(self._question, waiting.sample), waiting.num_tokens
    )
    key, self._num_keys = self._num_keys, self._num_keys + 1
    self._scoring[key] = waiting
    return key, request

  def _take_score(
    self, key: int, completion: requests_lib.Completion
  ) -> samples_lib.Sample:
    """Takes the end of the request of a score; returns the sample with it."""
    waiting = self._scoring.pop(key)
    used = completion.usage
    self._score_parts.append(completion)
    self._scored_tokens += used.prompt_tokens
    self._scores = self._scores + waiting.scorer.paid(used)
    if completion.finish_reason == 'cancelled' or not completion.token_ids:
      return waiting.sample  # it has no score
    completion.check()
    return _with_score(waiting.sample, waiting.scorer.read(completion))

  def _deliver(self, sample: samples_lib.Sample) -> None:
    self._seen.append(sample)
    self._advance(sample)
    self._settle_down()


class _Unscored(NamedTuple):
  """A sample whose score a model computes."""

  scorer: samples_lib.Requested
  sample: samples_lib.Sample
  num_tokens: int  # of the prompt and the sample

  @property
  def cost(self) -> budget_lib.Cost:
    """What is reserved for the score."""
    return self.scorer.cost(self.num_tokens)


def _with_score(sample: samples_lib.Sample, score: float) -> samples_lib.Sample:
  score = float(score)
  if not np.isfinite(score):
    raise ValueError(
      f'scorer: got the score {score} of an answer, expected a finite number'
    )
  return dataclasses.replace(sample, score=score)


def _largest(most: int, allows) -> int:
  """Returns the largest number up to `most` that is allowed, 0 for none.

  What is allowed is all numbers up to one.
  """
  low, high = 0, most
  while low < high:
    middle = (low + high + 1) // 2
    low, high = (middle, high) if allows(middle) else (low, middle - 1)
  return low
