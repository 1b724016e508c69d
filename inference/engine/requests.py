"""What is asked of the engine, what it answers, and what that took."""

from collections.abc import Sequence
import dataclasses
from typing import Any

from inference.sampling import (
  logprobs as logprobs_lib,
  settings as settings_lib,
)


@dataclasses.dataclass(frozen=True, kw_only=True)
class Request:
  """A prompt and how it is to be continued."""

  prompt_ids: tuple[int, ...]
  settings: settings_lib.Settings = settings_lib.Settings()
  # On whose behalf: fairness is between principals, and so is the isolation of
  # cached prefixes. From who authenticated the request, never from its body.
  principal: str = ''
  priority: int = 0  # lower is sooner
  # Taken as the first token instead of a sampled one: to score it by
  # `logprobs`. With max_tokens = 1 it is never read, so that the prompt may
  # fill the context.
  target: int | None = None


@dataclasses.dataclass(kw_only=True)
class Usage:
  """What one sequence took; seconds are of wall time."""

  prefill_tokens: int = 0  # computed in chunks, again after a preemption too
  decode_tokens: int = 0  # computed one at a time
  cached_tokens: int = 0  # of the prompt, found computed
  preemptions: int = 0  # times that its pages were taken
  flops: float = 0.0  # of matrix products; padding is nobody's
  kv_byte_seconds: float = 0.0  # memory of its pages, times how long
  queue_seconds: float = 0.0  # until it first ran
  prefill_seconds: float = 0.0  # from then to its first token
  decode_seconds: float = 0.0  # from then to its last


@dataclasses.dataclass(frozen=True, kw_only=True)
class Completion:
  """One continuation of a prompt."""

  text: str  # without the stop string
  token_ids: list[int]  # all sampled: with those of EOS or a stop string
  num_text_ids: int  # of the first ids: they spell the text
  finish_reason: str  # 'stop' (EOS, stop string or id) | 'length'
  stop_reason: str | int | None  # the stop string or id; None for EOS
  num_prompt_tokens: int  # with BOS
  seed: int  # with the settings and the weights: the same text again
  logprobs: list[logprobs_lib.TokenLogprobs] | None  # of token_ids
  # Of the prompt's tokens; None for the first, which follows nothing.
  prompt_logprobs: list[logprobs_lib.TokenLogprobs | None] | None
  usage: Usage

  @property
  def num_completion_tokens(self) -> int:
    """Tokens sampled."""
    return len(self.token_ids)


@dataclasses.dataclass(frozen=True, slots=True)
class Update:
  """What a step adds to one sequence of a request."""

  request_id: Any
  index: int  # which of the request's n
  text: str  # may be empty
  token_ids: Sequence[int]  # those that `text` is the text of
  logprobs: Sequence[logprobs_lib.TokenLogprobs]  # one per id, if asked for
  completion: Completion | None = None  # with the last one
