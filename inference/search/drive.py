"""Carries searches to an engine, step by step.

    (outcome,) = drive.run(
      engine, BestOfN(n=8, scorer=...), [question],
      budget=budget.parsed('tokens:2000'), costs=budget.of_engine(engine))

All questions are searched at once, so that their samples fill the batches of
the engine. The budget is that of each question. Nobody else may have open
requests of the engine meanwhile.

Seconds are kept by the clock: no step begins at which the longest one so far
would end behind the deadline. A step that takes longer than all before it may
end later by the difference: what runs on a device is not interrupted.
"""

import collections
from collections.abc import Callable, Sequence
import dataclasses
import time
from typing import Protocol

from inference.requests import requests as requests_lib
from inference.search import (
  budget as budget_lib,
  samples as samples_lib,
  search as search_lib,
  strategy as strategy_lib,
)
from text import tokenizer as tokenizer_lib


class Port(Protocol):
  """The part of an engine that a search uses; `Engine` has it."""

  @property
  def tokenizer(self) -> tokenizer_lib.Tokenizer:
    """That of the model."""
    ...

  @property
  def has_work(self) -> bool:
    """Whether a step would do anything."""
    ...

  def checked(self, request: requests_lib.Request) -> requests_lib.Request:
    """Returns a request with its `room`; refuses what cannot be answered."""
    ...

  def has_places(self, asked: collections.Counter[str]) -> bool:
    """Returns whether the queue holds so many sequences of each principal."""
    ...

  def submit(self, request: requests_lib.Request) -> int:
    """Submits a request; returns its id."""
    ...

  def step(self) -> list[requests_lib.Update]:
    """Runs a step; returns its updates."""
    ...

  def cancel(self, request_id: int) -> list[requests_lib.Update]:
    """Ends a request; returns its last updates."""
    ...


def room(port: Port, request: requests_lib.Request) -> int:
  """Returns the tokens that may follow a prompt, whatever `max_tokens` says.

  Raises:
    ValueError: the request could never be answered.
  """
  port.checked(request)
  free = dataclasses.replace(
    request.settings, max_tokens=None, min_tokens=0, constraint=None
  )
  found = port.checked(dataclasses.replace(request, settings=free, room=None))
  assert found.room is not None
  return found.room


def run(
  port: Port,
  strategy: strategy_lib.Strategy,
  questions: Sequence[samples_lib.Question],
  *,
  costs: budget_lib.Costs,
  budget: budget_lib.Budget = budget_lib.Budget(),
  read: samples_lib.Read = samples_lib.plain,
  clock: Callable[[], float] = time.perf_counter,
) -> list[search_lib.Outcome]:
  """Returns the outcome of each question.

  Args:
    port: the engine.
    strategy: that answers all questions.
    questions: that are searched at the same time.
    costs: of samples of the model.
    budget: of each question.
    read: parts of a sampled text.
    clock: the time in seconds.

  Raises:
    ValueError: a question could never be answered, or the engine has work of
      others.
    NotFinite, Stuck: a sequence ended with an error.
  """
  if port.has_work:
    raise ValueError(
      'search: got an engine with unfinished requests, expected an idle one:'
      ' their updates would be lost; finish or cancel them'
    )
  rooms = [room(port, each.request) for each in questions]
  now = clock()
  runs = [
    _Run(
      search_lib.Search(
        strategy,
        question,
        budget=budget,
        costs=costs,
        tokenizer=port.tokenizer,
        room=most,
        read=read,
        now=now,
      )
    )
    for question, most in zip(questions, rooms, strict=True)
  ]
  try:
    _drive(port, runs, clock)
  finally:
    for each in runs:
      each.cancel(port, list(each.keys))
    while port.has_work:
      port.step()  # reads the step in flight
  found = [each.outcome for each in runs if each.outcome]
  if len(found) < len(runs):
    raise RuntimeError(
      f'search: got {len(found)} outcomes of {len(runs)} questions, expected'
      ' one each; report this as a bug'
    )
  return found


def _drive(port: Port, runs: list['_Run'], clock) -> None:
  longest = 0.0
  waiting = collections.deque(runs)  # each has a request that may start
  while True:
    now = clock()
    for each in runs:
      deadline = each.search.deadline
      if each.outcome is None and deadline and now + longest >= deadline:
        each.cancel(port, each.search.expire())
        each.finish(clock())
    while waiting and waiting[0].start(port):
      waiting.popleft().finish(clock())
    open_ = {id_: each for each in runs for id_ in each.keys.values()}
    if not open_:
      return
    start = clock()
    updates = port.step()
    longest = max(longest, clock() - start)
    for update in updates:
      each = open_.get(update.request_id)
      # One of a request that was cancelled by an update before it.
      if each and update.request_id in each.ids:
        each.take(update)
        if update.completion:
          each.cancel(port, each.search.to_cancel())
          each.finish(clock())
          waiting.append(each)


class _Run:
  """A search, and its open requests."""

  def __init__(self, search: search_lib.Search):
    self.search = search
    self.keys: dict[int, int] = {}  # id of a request, by key
    self.ids: dict[int, int] = {}  # key, by id
    self.outcome: search_lib.Outcome | None = None
    self._num_left: dict[int, int] = {}  # sequences of a request, by key
    self._held: tuple[int, requests_lib.Request] | None = None

  def start(self, port: Port) -> bool:
    """Submits what may start; returns False if the queue is full."""
    while True:
      found, self._held = self._held or self.search.next_request(), None
      if found is None:
        return True
      key, request = found
      asked = requests_lib.num_sequences([request])
      if port.has_work and not port.has_places(asked):
        self._held = found
        return False
      if self.search.place(key) is not None:
        raise ValueError(
          'search: got a request to another model, expected those to the model'
          ' of the engine alone; take scorers.Rewarded'
        )
      request_id = port.submit(request)
      self.keys[key], self.ids[request_id] = request_id, key
      self._num_left[key] = request.settings.n

  def take(self, update: requests_lib.Update) -> None:
    """Takes an update of one of its requests."""
    key = self.ids[update.request_id]
    if update.completion:
      self._num_left[key] -= 1
      if not self._num_left[key]:
        del self._num_left[key], self.ids[self.keys.pop(key)]
    self.search.take(key, update)

  def cancel(self, port: Port, keys: Sequence[int]) -> None:
    """Cancels requests; their last updates reach the search."""
    if self._held and self._held[0] in keys:
      self.search.withdraw(self._held[0])
      self._held = None
    for key in keys:
      if key in self.keys:
        for update in port.cancel(self.keys[key]):
          self.take(update)

  def finish(self, now: float) -> None:
    """Keeps the outcome of a search that is done."""
    if self.outcome is None and self.search.is_done:
      self.outcome = self.search.outcome(now)
