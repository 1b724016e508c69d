"""The answer to one sequence: its text, logprobs and usage so far."""

from collections.abc import Iterable, Sequence
import math
import time

import numpy as np

from inference.engine import adapter_table, pooling, steps
from inference.output import stop_strings, stopping
from inference.requests import requests
from inference.sampling import logprobs, sampler
from inference.scheduling import page_tables, spans
from text import tokenizer as tokenizer_lib


class Live:
  """The answer to one sequence of a request, from submission to its end."""

  def __init__(
    self,
    request_id: int,
    index: int,
    request: requests.Request,
    sequence: page_tables.Sequence,
    *,
    seed: int,
    tokenizer: tokenizer_lib.Tokenizer,
    adapter: adapter_table.Loaded,
    stop: stop_strings.StopStrings | None = None,
  ):
    """Starts without tokens.

    Args:
      request_id: id of the request.
      index: index of the sequence among the n of the request.
      request: the request that is answered.
      sequence: its tokens, pages and slot, kept by the SequenceManager.
      seed: seed of the sampling.
      tokenizer: tokenizer of the model.
      adapter: adapter of the request, or the base.
      stop: the stop strings, shared by the sequences of the request.
    """
    self.request_id, self.index = request_id, index
    self.sequence, self.seed, self.adapter = sequence, seed, adapter
    self.usage = requests.Usage()
    self.transcript = stopping.Transcript(
      tokenizer,
      request.settings,
      max_tokens=sequence.max_known - sequence.num_prompt,
      stop=stop,
    )
    self.submitted_at = time.perf_counter()
    self.seated_at: float | None = None  # time of its first step
    self.last_at: float | None = None  # time of its last token
    self._request, self._eos_id = request, tokenizer.eos_id
    self.matcher = (
      request.grammar.matcher(request.settings.stop_ids)
      if request.grammar
      else None
    )
    self._logprobs: list[logprobs.TokenLogprobs] = []
    self._prompt_logprobs: list[logprobs.TokenLogprobs | None] = [
      None
    ] * sequence.num_prompt
    # The first sequence of a request computes the prompt.
    self.pool = (
      pooling.Pool(request.pooling) if request.pooling and not index else None
    )

  @property
  def is_stuck(self) -> bool:
    """Whether its grammar has no next token."""
    return self.matcher is not None and bool(self.matcher.failure)

  @property
  def wants_logprobs(self) -> bool:
    """Whether the request wants logprobs of its new tokens."""
    return self._request.settings.logprobs is not None

  @property
  def most_flops(self) -> float | None:
    """The FLOPs that the sequence may use; None: no limit."""
    return self._request.most_flops

  @property
  def has_penalties(self) -> bool:
    """Whether sampling depends on the tokens so far."""
    settings = self._request.settings
    return (
      settings.repetition_penalty != 1
      or settings.presence_penalty != 0
      or settings.frequency_penalty != 0
    )

  def begin(self, now: float) -> None:
    """Notes the first step, at a time of `time.perf_counter`."""
    self.seated_at = now
    self.usage.queue_seconds = now - self.submitted_at
    self.usage.cached_tokens = self.sequence.num_cached
    self.note_computed(self.sequence.num_cached)

  def note_computed(self, num_tokens: int) -> None:
    """Notes that the first tokens of the sequence are computed."""
    most = min(num_tokens, self.sequence.num_prompt)
    self.usage.prompt_tokens = max(self.usage.prompt_tokens, most)

  def sampler_row(self) -> sampler.Sampler:
    """Returns the sampler settings of the sequence."""
    row = sampler.row(
      self._request.settings,
      num_prompt_tokens=self.sequence.num_prompt,
      seed=self.seed,
      eos_id=self._eos_id,
    )
    if not self._request.scores_drawn:
      return row
    return row._replace(num_logprobs_B=np.int32(sampler.OF_DRAWN))

  def scored_prompt(self) -> tuple[tuple[int, ...], int] | None:
    """Returns the prompt and the number of alternatives per prompt token.

    None if the request wants no prompt logprobs, or if another sequence of the
    request computes them: the first one computes the prompt.
    """
    wanted = self._request.settings.prompt_logprobs
    if wanted is None or self.index:
      return None
    return self._request.prompt_ids, wanted

  def forced_token(self, position: int) -> int | None:
    """Returns the token to take at a position instead of a sampled one.

    The target of the request is its first new token. The position decides, not
    the tokens so far: when the second token is dispatched, the first is in
    flight.
    """
    is_first = position == self.sequence.num_prompt
    return self._request.target if is_first else None

  def take_prompt_logprobs(
    self, found: logprobs.Logprobs | None, chunk: spans.Span, at: int
  ) -> bool:
    """Keeps the logprobs of a chunk's targets, if they are wanted.

    Args:
      found: logprobs of all targets of the step, if any are wanted.
      chunk: a chunk of the prompt.
      at: index in `found` of the first target of the chunk.

    Returns:
      Whether all of them are finite.
    """
    scored_prompt = self.scored_prompt()
    if scored_prompt is None:
      return True
    assert found is not None
    _, wanted = scored_prompt
    is_finite = True
    for index in range(chunk.length):
      position = chunk.start + index + 1
      if position < self.sequence.num_prompt:
        scored = logprobs.of_row(found, at + index, wanted)
        self._prompt_logprobs[position] = scored
        is_finite &= math.isfinite(scored.chosen)
    return is_finite

  def take_hidden(
    self, hidden_MD: np.ndarray | None, chunk: spans.Span, at: int
  ) -> None:
    """Pools the final hidden states of a chunk, if the request wants them."""
    if self.pool:
      assert hidden_MD is not None
      self.pool.add(hidden_MD[at : at + chunk.length], chunk.start)

  def push(
    self,
    tokens: Sequence[int],
    found: logprobs.Logprobs | None,
    place: int,
    now: float,
  ) -> tuple[requests.Update, int]:
    """Takes the tokens of a dispatch; returns their update of the answer.

    Args:
      tokens: the next tokens. -1: no next token exists, since the model's
        numbers are not finite.
      found: logprobs [S, R] of the dispatch, if they are wanted.
      place: index of the sequence on axis R.
      now: the time, in seconds of `time.perf_counter`.

    Returns:
      The update, and the number of tokens until the end of the answer.
    """
    if not tokens:
      raise RuntimeError(
        f'sequence {self.sequence.id}: got no token, expected one, since it has'
        ' not ended; report this as a bug'
      )
    wanted = self._request.settings.logprobs
    releases = []
    for index, token in enumerate(tokens):
      if token < 0:
        releases.append(self.transcript.fail())
        break
      scored = None
      if wanted is not None:
        assert found is not None
        scored = logprobs.of_row(found, (index, place), wanted)
        self._logprobs.append(scored)
      releases.append(self.transcript.push(token, scored))
      if self.matcher:
        self.matcher.push(token)
      if self.transcript.finish_reason:
        break
    if tokens[0] >= 0:
      self._note_time(now)
    return self._update(releases), len(releases)

  def cancelled(self, now: float) -> requests.Update:
    """Returns the update that ends the answer here, as cancelled."""
    if self.seated_at is None:
      self.usage.queue_seconds = now - self.submitted_at
    elif self.last_at is None:
      self.usage.prefill_seconds = now - self.seated_at
    return requests.Update(
      self.request_id, self.index, '', (), (), self._completion('cancelled')
    )

  def cut(self, now: float) -> requests.Update:
    """Returns the update that ends the answer here, with reason 'length'."""
    if self.seated_at is not None and self.last_at is None:
      self.usage.prefill_seconds = now - self.seated_at
    return self._update([self.transcript.cut()])

  def _note_time(self, now: float) -> None:
    if self.last_at is None:
      assert self.seated_at is not None
      self.usage.prefill_seconds = now - self.seated_at
    else:
      self.usage.decode_seconds += now - self.last_at
    self.last_at = now

  def _update(self, releases: Sequence[stopping.Release]) -> requests.Update:
    reason = self.transcript.finish_reason
    completion = self._completion(reason) if reason else None
    return requests.Update(
      self.request_id,
      self.index,
      ''.join(each.text for each in releases),
      tuple(token for each in releases for token in each.token_ids),
      tuple(scored for each in releases for scored in each.logprobs),
      completion,
      self.usage.cached_tokens,
    )

  def _completion(self, reason: str) -> requests.Completion:
    settings, transcript = self._request.settings, self.transcript
    is_whole = reason not in ('error', 'cancelled')
    has_prompt_logprobs = self.scored_prompt() and is_whole
    return requests.Completion(
      text=transcript.text,
      token_ids=transcript.token_ids,
      num_text_ids=transcript.num_text_ids,
      finish_reason=reason,
      stop_reason=transcript.stop_reason,
      num_prompt_tokens=self.sequence.num_prompt,
      seed=self.seed,
      logprobs=self._logprobs if settings.logprobs is not None else None,
      prompt_logprobs=self._prompt_logprobs if has_prompt_logprobs else None,
      usage=self.usage,
      pooled_D=self.pool.vector_D() if self.pool else None,
      failure=self.matcher.failure
      if self.matcher and reason == 'error'
      else '',
    )


def wanted(
  lives: Iterable[Live | None], outputs: steps.Outputs
) -> steps.Outputs:
  """Returns the outputs of a dispatch that one of its answers asks for."""
  lives = [live for live in lives if live]
  if not any(live.wants_logprobs for live in lives):
    outputs = outputs._replace(logprobs=None)
  if not any(live.scored_prompt() for live in lives):
    outputs = outputs._replace(prompt=None)
  if not any(live.pool for live in lives):
    outputs = outputs._replace(hidden_MD=None)
  return outputs
