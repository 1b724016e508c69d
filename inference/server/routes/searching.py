"""Chats that a strategy answers: several submissions, one answer.

Each request of the search is admitted and billed like any other: it has a row
in the ledger, and the limits of the key hold for it. The answer is sent when
the strategy has chosen, in a stream as one piece of text.
"""

import asyncio
from collections.abc import Callable
import dataclasses
import time
from typing import Any

import fastapi
from fastapi import responses

from inference.requests import requests as requests_lib
from inference.search import (
  budget as budget_lib,
  drive,
  options as options_lib,
  reading,
  samples as samples_lib,
  search as search_lib,
)
from inference.server import engine_loop, service as service_lib
from inference.server.answers import chat
from inference.server.api import errors, search_schema
from inference.server.http import streams

# (requests, on_end) -> updates, as `ServedModel.submit`.
_Submit = Callable[..., Any]
_Item = tuple[int, requests_lib.Update] | Exception


async def answered(
  request: fastapi.Request,
  service: service_lib.Service,
  model: service_lib.ServedModel,
  answer: chat.Answer,
) -> responses.Response:
  """Searches for an answer; returns its body, or its stream.

  Raises:
    ApiError: the strategy does not fit the model or the budget, or no request
      is answered; see `ServedModel.submit`.
  """
  search = _search(model, answer)

  async def work() -> responses.Response:
    outcome = await run(search, model.submit)
    update = _chosen(outcome, answer)
    answer.receipt = {
      **dataclasses.asdict(outcome.receipt),
      'ended_by': outcome.ended_by,
    }
    if answer.is_stream:
      return streams.EventStream(
        streams.events(answer.chunks(_Once(update))),  # pyright: ignore
        _Once(update),  # pyright: ignore
        ping_seconds=service.config.ping_seconds,
      )
    await answer.finish(_Once(update))  # pyright: ignore
    return await service.bodies.in_thread(
      lambda: streams.written(answer.whole()), size=answer.size
    )

  return await streams.unless_disconnected(request, work())


class _Once:
  """The updates of an answer that is there."""

  def __init__(self, update: requests_lib.Update):
    self._left = [update]

  def __aiter__(self):
    return self

  async def __anext__(self) -> engine_loop.Item:
    if not self._left:
      raise StopAsyncIteration
    return 0, self._left.pop()

  def close(self) -> None:
    """Does nothing: the requests have ended."""


def _search(
  model: service_lib.ServedModel, answer: chat.Answer
) -> search_lib.Search:
  generator, asked, body = model.generator(), answer.asked, answer.body
  (request,) = model.asked(answer.requests)
  settings = request.settings
  spec = search_schema.spec(body)
  budget = body.budget.value() if body.budget else budget_lib.Budget()
  prices = model.admission.prices
  if budget.money is not None and prices == type(prices)():
    raise errors.invalid(
      'budget.money',
      f'got {budget.money}, expected none: all prices of this server are 0',
    )
  cap = request.thinking
  try:
    spec.check_temperature(settings.temperature)
    spec.check_whole(
      has_constraint=settings.constraint is not None, has_cap=cap is not None
    )
    strategy = options_lib.made(
      spec,
      tokenizer=generator.tokenizer,
      markers=asked.style.reasoning,
      is_open=asked.is_reasoning,
      most_reasoning=cap.most_tokens if cap else None,
    )
  except ValueError as error:
    message = str(error).removeprefix('strategy: ')
    raise errors.invalid('strategy', message) from error
  if spec.name == 'wait':  # the strategy ends the reasoning itself
    request = dataclasses.replace(request, thinking=None, grammar=None)
  return search_lib.Search(
    strategy,
    samples_lib.Question(request=request),
    budget=budget,
    costs=budget_lib.of_engine(generator.engine, request.adapter, prices),
    tokenizer=generator.tokenizer,
    room=drive.room(generator.engine, request),
    read=reading.reader(
      generator.tokenizer, asked.style, is_reasoning=asked.is_reasoning
    ),
    now=time.perf_counter(),
  )


async def run(
  search: search_lib.Search,
  submit: _Submit,
  clock: Callable[[], float] = time.perf_counter,
) -> search_lib.Outcome:
  """Returns the outcome of a search whose requests are submitted.

  However it ends, no request stays open.
  """
  arrived: asyncio.Queue[_Item] = asyncio.Queue()
  open_: dict[int, engine_loop.Updates] = {}
  readers: set[asyncio.Task] = set()

  async def start() -> None:
    while found := search.next_request():
      key, request = found

      def ended(end: engine_loop.Ended, key: int = key) -> None:
        # These reach nobody who reads updates.
        for _, update in end.updates:
          done = update.completion
          if done and done.finish_reason == 'cancelled':
            arrived.put_nowait((key, update))

      open_[key] = await submit([request], ended)
      reader = asyncio.create_task(_read(key, open_[key], arrived))
      readers.add(reader)
      reader.add_done_callback(readers.discard)

  def cancel(keys: list[int]) -> None:
    for key in keys:
      if key in open_:
        open_.pop(key).close()

  try:
    await start()
    while not search.is_done:
      deadline = search.deadline
      left = None if deadline is None else max(deadline - clock(), 0.0)
      try:
        item = await asyncio.wait_for(arrived.get(), left)
      except TimeoutError:
        search.deadline = None
        cancel(search.expire())
        continue
      if isinstance(item, Exception):
        raise item
      search.take(*item)
      cancel(search.to_cancel())
      await start()
    return search.outcome(clock())
  finally:
    cancel(list(open_))
    for reader in list(readers):
      reader.cancel()


async def _read(
  key: int, updates: engine_loop.Updates, arrived: asyncio.Queue[_Item]
) -> None:
  try:
    async for _, update in updates:
      arrived.put_nowait((key, update))
  except Exception as error:  # of the engine; the search raises it
    arrived.put_nowait(error)


def _chosen(
  outcome: search_lib.Outcome, answer: chat.Answer
) -> requests_lib.Update:
  """Returns the chosen sample as the only update of an answer.

  Raises:
    ApiError: status 400, the budget is below one token.
  """
  sample = outcome.chosen
  if sample is None:
    raise errors.invalid(
      'budget',
      f'got {answer.body.budget and answer.body.budget.value()}, expected'
      ' enough for the prompt and a token of its answer',
    )
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
