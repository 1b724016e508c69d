"""A search on the server: several submissions, one answer.

    updates = await running.begin(service, model, answer)
    async for _, update in updates: ...     # as those of `ServedModel.submit`

Each request of the search is admitted and billed like any other: it has a row
in the ledger, and the limits of the key hold for it. The updates are those of
the chosen sample: in one piece when the strategy has chosen, and as they come
where there is only one sample. A client that leaves cancels what is open, and
is billed for what was computed.
"""

import asyncio
from collections.abc import AsyncGenerator
import dataclasses
import time

from inference.requests import requests as requests_lib
from inference.search import search as search_lib
from inference.server import engine_loop, service as service_lib
from inference.server.search import opening

_Item = tuple[int, requests_lib.Update] | Exception


async def begin(
  service: service_lib.Service,
  model: service_lib.ServedModel,
  answer: opening.Answer,
) -> 'Running':
  """Returns a search whose first requests are submitted.

  Raises:
    ApiError: the strategy does not fit the model or the budget, or the first
      requests are refused; see `ServedModel.submit`.
  """
  running = Running(model, answer, await opening.opened(service, model, answer))
  try:
    await running.start()
  except BaseException:
    running.close()
    raise
  return running


class Running:
  """The updates of an answer that a search makes; see `streams.Updates`."""

  def __init__(
    self,
    model: service_lib.ServedModel,
    answer: opening.Answer,
    opened: opening.Opened,
  ):
    self._model, self._answer, self._opened = model, answer, opened
    self._search = opened.search
    self._came: asyncio.Queue[_Item] = asyncio.Queue()
    self._open: dict[int, engine_loop.Updates] = {}  # by key
    self._readers: set[asyncio.Task] = set()
    self._is_closed = False
    self._items = self._made()

  async def start(self) -> None:
    """Submits what the search wants now.

    Raises:
      ApiError: a request is refused, or the budget is below one token.
    """
    while found := self._search.next_request():
      key, request = found
      model = self._search.place(key) or self._model
      self._open[key] = await model.submit(
        [request], lambda end, key=key: self._ended(key, end)
      )
      reader = asyncio.create_task(self._read(key, self._open[key]))
      self._readers.add(reader)
      reader.add_done_callback(self._readers.discard)
    if self._search.is_done and not self._search.outcome(0.0).samples:
      raise opening.spent_at_once(self._opened.budget)

  def __aiter__(self):
    return self

  async def __anext__(self) -> engine_loop.Item:
    return await anext(self._items)

  def close(self) -> None:
    """Cancels open requests, and ends the account of the search."""
    if self._is_closed:
      return
    self._is_closed = True
    self._cancel(list(self._open))
    for reader in list(self._readers):
      reader.cancel()
    if self._opened.router:
      self._opened.router.paid(self._search.spent.flops)

  async def _made(self) -> AsyncGenerator[engine_loop.Item]:
    is_live = self._opened.spec.name == 'once'
    try:
      while not self._search.is_done:
        item = await self._next()
        if item is None:
          self._search.deadline = None
          self._cancel(self._search.expire())
          continue
        if isinstance(item, Exception):
          raise item
        key, update = item
        if is_live and not update.completion:
          yield 0, dataclasses.replace(update, request_id=0)
        if self._opened.is_slow and update.completion:
          await asyncio.to_thread(self._search.take, key, update)
        else:
          self._search.take(key, update)
        self._cancel(self._search.to_cancel())
        await self.start()
      outcome = self._search.outcome(time.perf_counter())
    finally:
      self.close()
    self._answer.receipt = {
      **dataclasses.asdict(outcome.receipt),
      'ended_by': outcome.ended_by,
      **self._opened.notes,
    }
    last = _chosen(outcome)
    if is_live:
      last = dataclasses.replace(
        last, text=update.text, token_ids=update.token_ids
      )
    yield 0, last

  async def _next(self) -> _Item | None:
    """Returns what comes next; None: the deadline has come first."""
    left = None
    if self._search.deadline is not None:
      left = self._search.deadline - time.perf_counter()
      if left <= 0:  # although something may have come
        return None
    try:
      return await asyncio.wait_for(self._came.get(), left)
    except TimeoutError:
      return None

  async def _read(self, key: int, updates: engine_loop.Updates) -> None:
    try:
      async for _, update in updates:
        self._came.put_nowait((key, update))
    except Exception as error:  # of the engine; the search raises it
      self._came.put_nowait(error)

  def _ended(self, key: int, end: engine_loop.Ended) -> None:
    """Takes cancelled sequences, which reach nobody who reads updates."""
    for _, update in end.updates:
      done = update.completion
      if not done or done.finish_reason != 'cancelled':
        continue
      if not self._is_closed:
        self._came.put_nowait((key, update))
      elif router := self._opened.router:
        router.paid_late(done.usage.flops)

  def _cancel(self, keys: list[int]) -> None:
    for key in keys:
      if key in self._open:
        self._open.pop(key).close()


def _chosen(outcome: search_lib.Outcome) -> requests_lib.Update:
  """Returns the chosen sample as one update."""
  sample = outcome.chosen
  assert sample is not None  # some sample had begun
  last = sample.last
  num_after = last.num_completion_tokens - last.num_text_ids
  reason = last.finish_reason
  completion = dataclasses.replace(
    last,
    text=sample.text,
    token_ids=list(sample.ids),
    num_text_ids=len(sample.ids) - num_after,
    # The budget has ended it: its length, for a client.
    finish_reason='length' if reason == 'cancelled' else reason,
    num_prompt_tokens=outcome.receipt.prompt_tokens,
    logprobs=None,
  )
  return requests_lib.Update(
    0, 0, sample.text, sample.ids, (), completion=completion
  )
