"""A submission to replicas, and the counts of it that the server has seen."""

import asyncio
from collections.abc import Sequence
import dataclasses
from typing import Any

from inference.requests import requests as requests_lib
from inference.sampling import settings as settings_lib
from inference.server import engine_loop
from models import flops as flops_lib


@dataclasses.dataclass
class Seen:
  """A sequence so far, as its updates tell it."""

  token_ids: list[int] = dataclasses.field(default_factory=list)
  num_cached: int = 0
  is_done: bool = False


@dataclasses.dataclass(eq=False)
class Submission:
  """Requests of one client, on one replica at a time."""

  requests: Sequence[requests_lib.Request]
  updates: engine_loop.Updates
  accepted: asyncio.Future
  is_stream: bool
  blocks: list[int]  # of the first prompt, see `placement`
  number: int = -1  # of the attempt
  num_tries: int = 0  # replicas that have died with it
  place: Any = None  # the replica that answers, None while none does
  refused_by: set = dataclasses.field(default_factory=set)  # of this attempt
  seen: dict[tuple[int, int], Seen] = dataclasses.field(default_factory=dict)
  held: list[engine_loop.Item] = dataclasses.field(default_factory=list)
  is_accepted: bool = False  # by any replica
  is_left: bool = False  # by the client
  is_ended: bool = False

  @property
  def num_sequences(self) -> int:
    """Sequences of all requests."""
    return sum(each.settings.n for each in self.requests)

  @property
  def has_streamed(self) -> bool:
    """Whether the client may have seen a part of the answer."""
    return self.is_stream and bool(self.seen)

  def take(self, item: engine_loop.Item) -> bool:
    """Takes an update; returns whether all sequences have ended."""
    which, update = item
    seen = self.seen.setdefault((which, update.index), Seen())
    seen.token_ids += update.token_ids
    seen.num_cached = update.num_cached
    seen.is_done = update.completion is not None
    is_whole = (
      len(self.seen) == self.num_sequences
      and seen.is_done
      and all(each.is_done for each in self.seen.values())
    )
    if self.is_stream:
      self.updates.put(item)
    else:
      self.held.append(item)
      if is_whole:
        for each in self.held:
          self.updates.put(each)
    self.is_ended = is_whole
    return is_whole

  def forget(self) -> None:
    """Forgets an answer of which the client has seen nothing."""
    self.seen.clear()
    self.held.clear()
    self.refused_by.clear()

  def counted(
    self, flops: flops_lib.SpanFlops
  ) -> list[tuple[int, requests_lib.Update]]:
    """Returns the last updates of unfinished sequences, as the server saw them.

    The replica has died with its own counts. Tokens that it had computed and
    not sent are not counted, and so not billed.

    Args:
      flops: of tokens of the model.
    """
    last = []
    for (which, index), seen in self.seen.items():
      if not seen.is_done:
        request = self.requests[which]
        last.append((which, _cut(request, index, seen, flops)))
    return last


def seeded(
  requests: Sequence[requests_lib.Request],
) -> list[requests_lib.Request]:
  """Returns requests with seeds: another replica then samples the same."""
  return [
    each
    if each.settings.seed is not None
    else dataclasses.replace(
      each,
      settings=dataclasses.replace(each.settings, seed=settings_lib.new_seed()),
    )
    for each in requests
  ]


def _cut(
  request: requests_lib.Request,
  index: int,
  seen: Seen,
  flops: flops_lib.SpanFlops,
) -> requests_lib.Update:
  prompt, num_new = len(request.prompt_ids), len(seen.token_ids)
  computed = prompt - seen.num_cached
  num_decoded = max(num_new - 1, 0)
  usage = requests_lib.Usage(
    prompt_tokens=prompt,
    prefill_tokens=computed,
    decode_tokens=num_decoded,
    cached_tokens=seen.num_cached,
    flops=flops(seen.num_cached, computed, 1)
    + flops(prompt, num_decoded, num_decoded),
  )
  completion = requests_lib.Completion(
    text='',
    token_ids=seen.token_ids,
    num_text_ids=0,
    finish_reason='cancelled',
    stop_reason=None,
    num_prompt_tokens=prompt,
    seed=request.settings.seed or 0,
    logprobs=None,
    prompt_logprobs=None,
    usage=usage,
  )
  return requests_lib.Update(None, index, '', (), (), completion)
