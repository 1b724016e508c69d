"""Requests to the engine, its answers, and their usage of resources."""

import collections
from collections.abc import Iterable, Sequence
import dataclasses
from typing import Any

import numpy as np

from inference.constraints import grammars, thinking as thinking_lib
from inference.engine import pooling
from inference.sampling import (
  logprobs as logprobs_lib,
  settings as settings_lib,
)
from inference.scheduling import fairness


class Overloaded(RuntimeError):
  """Too many sequences wait for the engine to take more; try again later."""


class TooLong(ValueError):
  """A prompt, with its completion, does not fit into the context or cache."""


class Stuck(ValueError):
  """The grammar of a request has no next token, or is too complex there."""


class NotFinite(ValueError):
  """The model computed numbers that are not finite: no next token exists."""


@dataclasses.dataclass(frozen=True, kw_only=True)
class Request:
  """A prompt and the settings of its continuation."""

  prompt_ids: tuple[int, ...]
  settings: settings_lib.Settings = settings_lib.Settings()
  # The tenant. Fairness is between principals, and cached prefixes are not
  # shared between them. It comes from authentication, never from the body.
  principal: str = ''
  priority: int = 0  # lower is sooner
  weight: float = 1.0  # share of the engine, relative to other principals
  # Taken as the first token instead of a sampled one, to get its logprob. With
  # max_tokens = 1 no later step reads it, so that the prompt may fill the
  # context.
  target: int | None = None
  # 'mean' or 'last': the completion has the prompt's final hidden states,
  # pooled in this way.
  pooling: str | None = None
  # Digest of the adapter that answers, see `adapter_table`; '': the base.
  adapter: str = ''
  # Whether `logprobs` are of the distribution that tokens were drawn from,
  # after temperature, penalties and filters, and not of the model itself.
  scores_drawn: bool = False
  # Number of the first of its n samples, on which their seeds depend.
  first_sample: int = 0
  # FLOPs that each sequence may use; it ends with reason 'length' before it
  # would use more, as after a preemption. None: no limit.
  most_flops: float | None = None
  # Number of tokens that may follow the prompt, set by `Engine.checked`; None:
  # the engine has not checked the request yet.
  room: int | None = None
  # The most reasoning of each sequence, None for no limit.
  thinking: thinking_lib.Cap | None = None
  # Grammar of `settings.constraint` and `thinking`, set by `Engine.checked`.
  grammar: grammars.Grammar | thinking_lib.Capped | None = None


@dataclasses.dataclass(kw_only=True)
class Usage:
  """The resources that one sequence used; seconds are wall time."""

  prompt_tokens: int = 0  # of the prompt so far: computed, or cached
  prefill_tokens: int = 0  # computed in chunks, also after a preemption
  decode_tokens: int = 0  # computed one at a time
  cached_tokens: int = 0  # prompt tokens that other sequences had computed
  accepted_tokens: int = 0  # guesses of its next tokens that were right
  rejected_tokens: int = 0  # guesses that were wrong, or behind its end
  preemptions: int = 0  # how often the sequence gave its pages back
  flops: float = 0.0  # of matrix products, without padding
  kv_byte_seconds: float = 0.0  # bytes of its pages, times the duration
  queue_seconds: float = 0.0  # from submission to its first step
  prefill_seconds: float = 0.0  # from its first step to its first token
  decode_seconds: float = 0.0  # from its first token to its last token


@dataclasses.dataclass(frozen=True, kw_only=True)
class Completion:
  """One continuation of a prompt."""

  text: str  # without the stop string
  token_ids: list[int]  # all sampled ids: also of EOS or of a stop string
  num_text_ids: int  # the first ids that spell the text
  # 'stop' (EOS, stop string or id) | 'length' | 'error': the model computed
  # numbers that are not finite, or `failure`; text and ids end before the error
  # | 'cancelled': the request ended first.
  finish_reason: str
  stop_reason: str | int | None  # the stop string or id; None for EOS
  num_prompt_tokens: int  # with BOS
  seed: int  # the same seed, settings and weights give the same text
  logprobs: list[logprobs_lib.TokenLogprobs] | None  # of token_ids
  # Of the prompt's tokens; None for the first token, which has no context.
  prompt_logprobs: list[logprobs_lib.TokenLogprobs | None] | None
  usage: Usage
  pooled_D: np.ndarray | None = None  # float64; if the request has `pooling`
  failure: str = ''  # why a grammar has no next token, in an 'error'

  @property
  def num_completion_tokens(self) -> int:
    """Number of sampled tokens."""
    return len(self.token_ids)

  def check(self) -> None:
    """Raises NotFinite or Stuck if the sequence ended with an error."""
    if self.failure:
      raise Stuck(
        f'constraint: got no next token after {len(self.token_ids)} new tokens,'
        f' expected one: {self.failure}; simplify the grammar'
      )
    if self.finish_reason == 'error':
      raise NotFinite(
        f'the model: got numbers that are not finite after'
        f' {len(self.token_ids)} new tokens, expected finite ones; the weights'
        ' may have diverged, or the dtype overflows'
      )


@dataclasses.dataclass(frozen=True, slots=True)
class Update:
  """The addition of one step to one sequence of a request."""

  request_id: Any
  index: int  # of the sequence among the n of the request
  text: str  # may be empty
  token_ids: Sequence[int]  # the ids that spell `text`
  logprobs: Sequence[logprobs_lib.TokenLogprobs]  # one per id, if requested
  completion: Completion | None = None  # in the last update of the sequence
  # Prompt tokens that were found computed: the bill of a replica that dies
  # before it has told the usage.
  num_cached: int = 0


def num_sequences(requests: Iterable[Request]) -> collections.Counter[str]:
  """Returns the sequences that requests make, by principal."""
  asked: collections.Counter[str] = collections.Counter()
  for request in requests:
    asked[request.principal] += request.settings.n
  return asked


def check_few(asked: collections.Counter[str], own_most: int) -> None:
  """Refuses more sequences of one principal than may ever wait.

  Raises:
    ValueError: there are more than `own_most` sequences.
  """
  if max(asked.values()) > own_most:
    raise ValueError(
      f'prompt: got {asked.total()} completions to make, expected at most'
      f' {own_most} of one client (engine.max_waiting); send several requests'
    )


def overloaded(
  asked: collections.Counter[str], num_waiting: int, most: int
) -> Overloaded:
  """Returns the error for sequences that the queue has no places for."""
  return Overloaded(
    f'got {asked.total()} more completions to make while {num_waiting} wait,'
    f' expected at most {most} to wait, and {fairness.most_waiting(most)} of'
    ' one client; try again later'
  )


def room_for(
  request: Request, *, vocab_size: int, context: int, capacity: int
) -> int:
  """Returns how many tokens may follow the prompt of a request.

  Args:
    request: the request to check.
    vocab_size: V, ids below it exist.
    context: tokens that the model can attend to.
    capacity: tokens of one sequence that the KV cache holds.

  Raises:
    ValueError: a token id is outside the vocabulary.
    TooLong: prompt and completion do not fit into the context or the KV cache.
  """
  settings = request.settings
  num_prompt, wanted = len(request.prompt_ids), settings.max_tokens or 1
  target = () if request.target is None else (request.target,)
  for token_id in (*request.prompt_ids, *target):
    if not 0 <= token_id < vocab_size:
      raise ValueError(
        f'prompt: got token id {token_id}, expected 0 <= id < {vocab_size}'
      )
  if not num_prompt:
    raise ValueError(
      "prompt: got no token ids, expected at least one; send the text '' to"
      ' start from BOS'
    )
  settings.check_ids(vocab_size)
  pooling.check(request.pooling)
  # A target that no token follows is never computed: it needs no position.
  most = context + (request.target is not None and wanted == 1)
  if num_prompt + wanted > most:
    raise TooLong(
      f'prompt: got {num_prompt} tokens and {wanted} to generate,'
      f' expected at most {context} together (the context of this model);'
      ' shorten the prompt or lower max_tokens'
    )
  if num_prompt + wanted > capacity:
    raise TooLong(
      f'prompt: got {num_prompt} tokens and {wanted} to generate, expected at'
      f' most {capacity} together (the cache of this engine); lower'
      ' max_tokens or give the engine more pages'
    )
  return settings.max_tokens or max(min(context, capacity) - num_prompt, 1)
