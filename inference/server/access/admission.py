"""Admission: a request passes the limits of its key, and is billed.

    admitted = await admission.admit(requests, model=name, weights_digest=...)
    await engine_loop.submit(admitted.requests, admitted.end)

Admission reserves each prompt, and for each of its n completions the most
tokens that may follow. The engine's counts settle the reservation when the
request ends for any reason: the model, a stop string, a client that left, an
error, the end of the server. A token that is computed again after a preemption
is billed once.
"""

import asyncio
from collections.abc import Sequence
import dataclasses
import itertools
import logging
import sqlite3
import time

from checks import expect
from inference.requests import prices as prices_lib, requests as requests_lib
from inference.server import engine_loop as engine_loop_lib, server_config
from inference.server.access import keys, limits
from inference.server.api import errors
from inference.server.http import exchanges
from inference.server.records import ledger as ledger_lib

Prices = prices_lib.Prices
_LOG = logging.getLogger('uvicorn.error')


def prices(config: server_config.ServerConfig) -> Prices:
  """Returns the prices of a config."""
  return Prices(
    prompt=config.price_prompt,
    cached=config.price_cached,
    completion=config.price_completion,
  )


class Admission:
  """Admits requests; belongs to one event loop."""

  def __init__(self, ledger: ledger_lib.Ledger, prices: Prices = Prices()):
    self.ledger, self.prices = ledger, prices
    self._spent = ledger.spent()  # before this start
    self._limits: dict[str, limits.Limits] = {}  # by id of the key

  async def admit(
    self,
    requests: Sequence[requests_lib.Request],
    *,
    model: str,
    weights_digest: str,
  ) -> 'Admitted':
    """Reserves the tokens that the requests of one HTTP request may use.

    Raises:
      ApiError: status 429, a limit of the key is reached; 503, the ledger
        cannot be written.
    """
    exchange = exchanges.current()
    prompt, completion = _most_tokens(requests)
    nanos = self.prices.most_nanos(prompt=prompt, completion=completion)
    key = exchange.key
    mine = self._limits_of(key) if key else None
    now = time.monotonic()
    if mine:
      refusal = mine.refusal(tokens=prompt + completion, nanos=nanos, now=now)
      if not refusal:
        mine.take(tokens=prompt + completion, nanos=nanos, now=now)
      exchange.limit_headers.update(mine.headers(now))
      if refusal:
        self.ledger.metrics.refused.labels(refusal.kind).inc()
        raise refusal
    about = ledger_lib.About(
      request_id=exchange.request_id,
      idempotency=exchange.idempotency,
      key_id=key.id if key else '',
      principal=key.name if key else '',
      model=model,
      weights_digest=weights_digest,
      reserved_tokens=prompt + completion,
      reserved_nanos=nanos,
    )
    weight = key.weight if key else 1.0
    admitted = Admitted(
      [dataclasses.replace(each, weight=weight) for each in requests],
      self.ledger.reserve(about),
      mine,
      self.prices,
    )
    if self.ledger.is_failing:
      await admitted.probe()  # before the engine works for nothing
    return admitted

  def _limits_of(self, key: keys.Key) -> limits.Limits:
    """Returns the state of a key, which may have new limits since."""
    now = time.monotonic()
    if key.id not in self._limits:
      if key.budget is not None and self.prices == Prices():
        _LOG.warning(
          '%s of %s has a budget that never ends, since all prices are 0; give'
          ' --server.price_prompt and the other prices',
          key.id,
          expect.shown(key.name),
        )
      self._limits[key.id] = limits.Limits(
        key, spent=self._spent.get(key.id, 0), now=now
      )
    self._limits[key.id].follow(key, now)
    return self._limits[key.id]


class Admitted:
  """An admitted request, from its reservation to its settlement."""

  def __init__(
    self,
    requests: Sequence[requests_lib.Request],
    entry: ledger_lib.Entry,
    mine: limits.Limits | None,
    prices: Prices,
  ):
    self.requests = requests
    self._entry, self._limits, self._prices = entry, mine, prices

  def open(self) -> None:
    """Notes that the engine has taken the request."""
    if self._entry.state == 'reserved':  # else it has ended already
      self._entry.open()

  async def probe(self) -> None:
    """Writes the open row, and waits for it.

    Raises:
      ApiError: status 503, the row cannot be written.
    """
    try:
      await asyncio.shield(self._entry.open())
    except asyncio.CancelledError:
      self.end(engine_loop_lib.Ended(updates=[]))
      raise
    except sqlite3.Error as error:
      self.end(engine_loop_lib.Ended(updates=[], error=error))
      raise errors.ApiError(
        503,
        'the server cannot write its ledger; try again',
        param=None,
        code='ledger_unavailable',
      ) from error

  def end(self, ended: engine_loop_lib.Ended) -> asyncio.Future[int] | None:
    """Settles the request, or releases it if the engine has not taken it."""
    about = self._entry.about
    if not ended.updates and self._entry.state == 'reserved':
      self._entry.release()
      if self._limits:
        self._limits.release(
          tokens=about.reserved_tokens,
          reserved=about.reserved_nanos,
          now=time.monotonic(),
        )
      return None
    used = used_by(self.requests, ended.updates, self._prices)
    written = self._entry.settle(used, _outcome(ended))
    if self._limits:
      written.add_done_callback(lambda done: self._settled(done, used))
    return written

  def _settled(self, done: asyncio.Future[int], used: ledger_lib.Used) -> None:
    assert self._limits
    about = self._entry.about
    num_used = used.prompt_tokens + used.completion_tokens
    self._limits.settle(
      reserved=about.reserved_nanos,
      spent=0 if done.exception() else done.result(),
      unused_tokens=about.reserved_tokens - num_used,
      now=time.monotonic(),
    )


def _most_tokens(
  requests: Sequence[requests_lib.Request],
) -> tuple[int, int]:
  """Returns the tokens of prompts, and the most of their completions."""
  prompt = sum(len(each.prompt_ids) for each in requests)
  completion = sum(
    (each.room or each.settings.max_tokens or 0) * each.settings.n
    for each in requests
    if each.target is None
  )
  return prompt, completion


def _outcome(ended: engine_loop_lib.Ended) -> str:
  if isinstance(ended.error, engine_loop_lib.Stopped):
    return ledger_lib.STOPPED
  reasons = {
    update.completion.finish_reason
    for _, update in ended.updates
    if update.completion
  }
  if ended.error or 'error' in reasons:
    return ledger_lib.ERROR
  if 'cancelled' in reasons or not reasons:
    return ledger_lib.CANCELLED
  return ledger_lib.FINISHED


def used_by(
  requests: Sequence[requests_lib.Request],
  updates: Sequence[engine_loop_lib.Item],
  prices: Prices,
) -> ledger_lib.Used:
  """Returns the usage of requests, by the last updates of their sequences."""
  last = sorted(updates, key=lambda item: (item[0], item[1].index))
  prompt = cached = completion = 0
  usages = []
  for which, items in itertools.groupby(last, key=lambda item: item[0]):
    ended = [item[1].completion for item in items if item[1].completion]
    usages += (mine := [each.usage for each in ended])
    # The completions of a prompt share it: it counts once.
    longest = max(mine, key=lambda usage: usage.prompt_tokens)
    prompt += longest.prompt_tokens
    cached += longest.cached_tokens
    # A given token is scored, and not sampled.
    if requests[which].target is None:
      completion += sum(each.num_completion_tokens for each in ended)
  return ledger_lib.Used(
    prompt_tokens=prompt,
    cached_tokens=cached,
    completion_tokens=completion,
    accepted_tokens=sum(each.accepted_tokens for each in usages),
    rejected_tokens=sum(each.rejected_tokens for each in usages),
    prefill_tokens=sum(each.prefill_tokens for each in usages),
    decode_tokens=sum(each.decode_tokens for each in usages),
    preemptions=sum(each.preemptions for each in usages),
    flops=sum(each.flops for each in usages),
    kv_byte_seconds=sum(each.kv_byte_seconds for each in usages),
    queue_ms=max((1e3 * each.queue_seconds for each in usages), default=0.0),
    prefill_ms=max(
      (1e3 * each.prefill_seconds for each in usages), default=0.0
    ),
    decode_ms=max((1e3 * each.decode_seconds for each in usages), default=0.0),
    price_nanos=prices.nanos(
      prompt=prompt, cached=cached, completion=completion
    ),
  )
