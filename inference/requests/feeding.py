"""Feeds an engine with more requests than its queue holds, for many callers."""

import collections
from collections.abc import Generator
from typing import Protocol

from inference.requests import requests as requests_lib


class Engine(Protocol):
  """The part of an engine that a feeder uses."""

  @property
  def has_work(self) -> bool:
    """Whether a step would do anything."""
    ...

  def has_places(self, asked: collections.Counter[str]) -> bool:
    """Returns whether the queue has room for the sequences, by principal."""
    ...

  def submit(self, request: requests_lib.Request) -> int:
    """Submits a request; returns its id."""
    ...

  def step(self) -> list[requests_lib.Update]:
    """Runs a step; returns updates of all requests."""
    ...

  def cancel(self, request_id: int) -> list[requests_lib.Update]:
    """Ends a request; returns its last updates."""
    ...


class Feeder:
  """Answers requests of several callers with one engine.

  The caller that asks for its next update runs a step. Updates for the others
  wait in their inboxes.
  """

  def __init__(self, engine: Engine):
    """Starts without callers."""
    self._engine = engine
    # Updates that wait for their caller, by request id.
    self.inboxes: dict[int, collections.deque[requests_lib.Update]] = {}

  def answer(
    self, requests: list[requests_lib.Request]
  ) -> Generator[tuple[int, requests_lib.Update]]:
    """Yields updates, each with the index of its request; see `Engine.answer`.

    Args:
      requests: requests that the engine has checked.
    """
    pending = collections.deque(enumerate(requests))
    which: dict[int, int] = {}  # index in `requests`, by request id
    num_left: dict[int, int] = {}  # unfinished sequences, by request id
    inboxes = self.inboxes
    try:
      while pending or num_left:
        while pending and self._has_room_for(pending[0][1]):
          index, request = pending.popleft()
          request_id = self._engine.submit(request)
          which[request_id], num_left[request_id] = index, request.settings.n
          inboxes[request_id] = collections.deque()
        full = next((key for key in num_left if inboxes[key]), None)
        if full is None:
          for update in self._engine.step():
            if update.request_id in inboxes:
              inboxes[update.request_id].append(update)
          continue
        update = inboxes[full].popleft()
        if update.completion:
          num_left[full] -= 1
          if not num_left[full]:
            del num_left[full], inboxes[full]
        yield which[full], update
    finally:
      for request_id in num_left:
        self._engine.cancel(request_id)
        del inboxes[request_id]

  def _has_room_for(self, request: requests_lib.Request) -> bool:
    # Without work, `submit` refuses a request that is larger than the queue.
    asked = requests_lib.num_sequences([request])
    return not self._engine.has_work or self._engine.has_places(asked)
