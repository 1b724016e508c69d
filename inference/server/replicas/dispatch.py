"""Submissions on their way to replicas, and between them.

`placement` chooses the replica of a submission. If a replica dies, submissions
of which the client has seen nothing go to another one, at most `_MOST_TRIES`
times, since one of them may be the reason; while no replica is ready they wait.
The others end with an error, and are billed for the tokens that were received.
A whole answer is handed out only once it is complete, so only a stream can have
been seen. Each submission ends once, whatever happens, and so is billed once.
"""

import asyncio
from collections.abc import Callable, Sequence
import itertools
from typing import Any

from inference.engine import engine as engine_lib
from inference.server import engine_loop, engine_thread
from inference.server.replicas import (
  place as place_lib,
  placement,
  remote_engine,
  submission as submission_lib,
  values,
)
from models import flops as flops_lib

# Replicas that may die with one submission. It may be the reason; but where
# many are killed, an answer meets several deaths by chance.
_MOST_TRIES = 4
_FULL_SECONDS = 0.1  # until a submission that found no place is tried again


class Dispatch:
  """The open submissions of a version; belongs to one event loop."""

  def __init__(
    self,
    ready: Callable[[], list[place_lib.Place]],
    metrics: place_lib.Metrics,
    *,
    max_sequences: int,
  ):
    """Starts without submissions.

    Args:
      ready: returns the replicas that answer.
      metrics: counts submissions.
      max_sequences: that a replica runs at once.
    """
    self._ready, self._metrics = ready, metrics
    self._margin = placement.margin_of(max_sequences)
    self._attempts = itertools.count()
    self._pending: list[submission_lib.Submission] = []
    self.number = -1  # of the version
    self.is_failed = False
    self.flops: flops_lib.SpanFlops | None = None  # of the model

  def place(self, found: submission_lib.Submission) -> None:
    """Sends a submission to a replica, or keeps it until one is ready."""
    if found.is_ended:
      return
    ready = self._ready()
    able = [each for each in ready if each not in found.refused_by]
    if not able:
      found.place = None
      self._pending.append(found)
      if ready:  # all of them are full
        asyncio.get_running_loop().call_later(
          _FULL_SECONDS, self._place_again, found
        )
      return
    candidates = [
      placement.Candidate(
        index=each.replica.index,
        num_open=each.num_open,
        num_known=each.known.num_known(found.blocks),
        num_served=each.num_served,
      )
      for each in able
    ]
    chosen = placement.choose(candidates, margin=self._margin)
    (place,) = (x for x in able if x.replica.index == chosen.index)
    found.place, found.number = place, next(self._attempts)
    place.open[found.number] = found
    place.num_open += found.num_sequences
    place.num_served += found.num_sequences
    place.known.add(found.blocks)
    prefix = 'known' if chosen.num_known else 'new'
    self._metrics.placed.labels(str(chosen.index), prefix).inc()
    place.send(
      'submit',
      self.number,
      found.number,
      [remote_engine.sent(each) for each in found.requests],
      found.is_stream,
    )

  def _place_again(self, found: submission_lib.Submission) -> None:
    if found in self._pending:
      self._pending.remove(found)
      found.refused_by.clear()
      self.place(found)

  def accepted(self, place: place_lib.Place, number: int) -> None:
    """Notes that a replica has taken a submission."""
    if found := place.open.get(number):
      found.is_accepted = True
      if not found.accepted.done():
        found.accepted.set_result(None)

  def take(
    self, place: place_lib.Place, number: int, update: Sequence[Any]
  ) -> None:
    """Takes an update of an attempt on a replica."""
    if (found := place.open.get(number)) is None:
      return
    if found.take(values.item(tuple(update))):  # pyright: ignore
      self._remove(place, found)

  def _remove(
    self, place: place_lib.Place, found: submission_lib.Submission
  ) -> None:
    del place.open[found.number]
    place.num_open -= found.num_sequences
    found.place = None

  def refused(
    self,
    place: place_lib.Place,
    number: int,
    error: Exception,
    *,
    is_failed: bool,
  ) -> None:
    """Ends a submission that a replica has refused, or tries another one."""
    if (found := place.open.get(number)) is None:
      return
    self._remove(place, found)
    if is_failed:
      self.move(found)
    elif not isinstance(error, engine_lib.Overloaded):
      self._end(found, (), error)
    else:
      found.refused_by.add(place)
      is_full = found.refused_by >= set(self._ready())
      if is_full and not found.is_accepted:
        self._end(found, (), error)
      else:  # another replica has taken it before: it is not lost
        self.place(found)

  def ended(
    self, place: place_lib.Place, number: int, last: Sequence[Any], kind: str
  ) -> None:
    """Ends a submission as a replica has; moves it if the engine failed."""
    if (found := place.open.get(number)) is None:
      return
    self._remove(place, found)
    items = [values.item(each) for each in last]
    if kind == engine_thread.Failed.__name__:
      self.move(found, items)
    elif kind:
      self._end(found, items, engine_thread.stopping())
    else:
      self._end(found, items, None)

  def leave(self, found: submission_lib.Submission) -> None:
    """Cancels a submission; its client has left."""
    if found.is_ended:
      return
    found.is_left = True
    if found.place:
      found.place.send('cancel', self.number, found.number)
    else:
      if found in self._pending:
        self._pending.remove(found)
      self._end(found, self._counted(found), None)

  def move(
    self,
    found: submission_lib.Submission,
    last: Sequence[engine_loop.Item] | None = None,
  ) -> None:
    """Sends a submission to another replica; ends it if it cannot."""
    found.num_tries += 1
    found.place = None
    if found.is_left:
      self._end(found, last or self._counted(found), None)
    elif found.has_streamed or found.num_tries >= _MOST_TRIES or self.is_failed:
      error = engine_thread.failed()
      self._end(found, last or self._counted(found), error)
    else:
      found.forget()
      self._metrics.moved.inc()
      self.place(found)

  def _counted(
    self, found: submission_lib.Submission
  ) -> list[engine_loop.Item]:
    return found.counted(self.flops) if self.flops else []

  def _end(
    self,
    found: submission_lib.Submission,
    last: Sequence[engine_loop.Item],
    error: Exception | None,
  ) -> None:
    if found.is_ended:
      return
    found.is_ended = True
    for each in found.held:  # other sequences of it that are complete
      found.updates.put(each)
    found.updates.end(last, error)
    if not found.accepted.done():
      if error:
        found.accepted.set_exception(error)
      else:
        found.accepted.set_result(None)

  def place_pending(self) -> None:
    """Sends the submissions that wait for a replica."""
    waiting, self._pending = self._pending, []
    for each in waiting:
      self.place(each)

  def lose(self, place: place_lib.Place) -> None:
    """Moves the submissions of a replica that has died."""
    found, place.open, place.num_open = list(place.open.values()), {}, 0
    for each in found:
      self.move(each)

  def end_all(
    self, places: Sequence[place_lib.Place], error: Exception
  ) -> None:
    """Ends all submissions that are left, on replicas and waiting."""
    self.end_pending(error)
    for place in places:
      for each in list(place.open.values()):
        self._end(each, self._counted(each), error)
      place.open.clear()

  def end_pending(self, error: Exception) -> None:
    """Ends the submissions that wait for a replica."""
    waiting, self._pending = self._pending, []
    for each in waiting:
      self._end(each, self._counted(each), error)
