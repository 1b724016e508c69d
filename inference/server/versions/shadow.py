"""The shadow of a version: copies of requests whose answers are discarded.

A copy runs on the version's own engine, behind all its other requests, and a
client never waits for it: a copy that finds no place is dropped. Its cost is
counted here and not billed.
"""

from __future__ import annotations

import asyncio
from collections.abc import Sequence
import contextlib
import dataclasses
import typing

import prometheus_client

from inference.engine import engine
from inference.requests import requests as requests_lib
from inference.server import engine_loop as engine_loop_lib

if typing.TYPE_CHECKING:  # it imports this module
  from inference.server import service

_LAST = 2**31 - 1  # priority; lower is sooner


class Shadow:
  """The copies that a version answers, and their cost."""

  def __init__(self, model: service.ServedModel):
    """Starts without copies."""
    self._model = model
    self._tasks: set[asyncio.Task] = set()  # else nothing refers to them
    self.registry = prometheus_client.CollectorRegistry()

    def counter(name: str, text: str, labels: Sequence[str] = ()):
      return prometheus_client.Counter(
        name, text, labels, registry=self.registry
      )

    self.requests = counter(
      'shadow_requests',
      'Copies of requests: finished, dropped for want of a place, or failed.',
      ['outcome'],
    )
    self.tokens = counter(
      'shadow_tokens', 'Tokens of copies, computed in chunks or one at a time.'
    )
    self.flops = counter('shadow_flops', 'FLOPs of copies, a part of flops.')
    self.kv_byte_seconds = counter(
      'shadow_kv_byte_seconds', 'Bytes of pages of copies, times seconds.'
    )

  def take(self, requests: Sequence[requests_lib.Request]) -> None:
    """Answers copies of requests, and discards the answers."""
    copies = [
      # `room` and grammar belong to another engine.
      dataclasses.replace(each, priority=_LAST, room=None, grammar=None)
      for each in self._model.asked(requests)
    ]
    self._model.hold()
    task = asyncio.create_task(self._answer(copies))
    self._tasks.add(task)
    task.add_done_callback(self._tasks.discard)

  async def _answer(self, copies: Sequence[requests_lib.Request]) -> None:
    outcome = 'failed'
    try:
      updates = await self._model.engine_loop.submit(copies)
      with contextlib.closing(updates):
        async for _, update in updates:
          if update.completion:
            self._charge(update.completion.usage)
      outcome = 'finished'
    except (engine.Overloaded, ValueError):
      outcome = 'dropped'
    except (engine_loop_lib.Failed, engine_loop_lib.Stopped):
      pass
    finally:
      self.requests.labels(outcome).inc(len(copies))
      self._model.release()

  def _charge(self, usage: requests_lib.Usage) -> None:
    self.tokens.inc(usage.prefill_tokens + usage.decode_tokens)
    self.flops.inc(usage.flops)
    self.kv_byte_seconds.inc(usage.kv_byte_seconds)
