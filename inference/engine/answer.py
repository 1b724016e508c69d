"""One sequence that the engine works on: its text so far and what it took."""

import time

from inference.engine import requests
from inference.output import stopping
from inference.sampling import logprobs, sampler
from inference.scheduling import sequence_manager
from text import tokenizer as tokenizer_lib


class Live:
  """A sequence of a request, from submission to its end."""

  def __init__(
    self,
    request_id: int,
    index: int,
    request: requests.Request,
    seed: int,
    tokenizer: tokenizer_lib.Tokenizer,
    max_tokens: int,
  ):
    self.request_id, self.index = request_id, index
    self.id = request_id, index
    self.seed = seed
    self.usage = requests.Usage()
    self.transcript = stopping.Transcript(
      tokenizer, request.settings, max_tokens=max_tokens
    )
    self.submitted_at = time.perf_counter()
    self.seated_at: float | None = None  # first time that it ran
    self.last_at: float | None = None  # its last token
    self._request, self._eos_id = request, tokenizer.eos_id
    self._logprobs: list[logprobs.TokenLogprobs] = []
    self._prompt_logprobs: list[logprobs.TokenLogprobs | None] = [
      None
    ] * self.num_prompt

  @property
  def num_prompt(self) -> int:
    """Tokens of the prompt."""
    return len(self._request.prompt_ids)

  @property
  def has_penalties(self) -> bool:
    """Whether what it samples depends on the tokens that it has."""
    settings = self._request.settings
    return (
      settings.repetition_penalty != 1
      or settings.presence_penalty != 0
      or settings.frequency_penalty != 0
    )

  def sampler_row(self) -> sampler.Sampler:
    """Returns how it samples."""
    return sampler.row(
      self._request.settings,
      num_prompt_tokens=self.num_prompt,
      seed=self.seed,
      eos_id=self._eos_id,
    )

  def scored_prompt(self) -> tuple[tuple[int, ...], int] | None:
    """Returns the prompt and the alternatives wanted, if it is to be scored.

    Of several sequences of one prompt, the first one computes it.
    """
    wanted = self._request.settings.prompt_logprobs
    if wanted is None or self.index:
      return None
    return self._request.prompt_ids, wanted

  def forced_token(self, position: int) -> int | None:
    """Returns what it has to take at a position: its target is the first.

    Told by position: when the second is dispatched, the first is not read yet.
    """
    return self._request.target if position == self.num_prompt else None

  def take_prompt_logprobs(
    self, found: logprobs.Logprobs, chunk: sequence_manager.Row, at: int
  ) -> None:
    """Keeps the scores of a chunk's targets, which are found from `at` on."""
    wanted = self._request.settings.prompt_logprobs or 0
    for row in range(chunk.length):
      position = chunk.start + row + 1
      if position < self.num_prompt:
        self._prompt_logprobs[position] = logprobs.of_row(
          found, at + row, wanted
        )

  def push(
    self, token: int, found: logprobs.Logprobs, place: int, now: float
  ) -> requests.Update:
    """Takes the next token in, and returns what it adds to the answer."""
    wanted = self._request.settings.logprobs
    scored = None
    if wanted is not None:
      scored = logprobs.of_row(found, place, wanted)
      self._logprobs.append(scored)
    if self.last_at is None:
      assert self.seated_at is not None
      self.usage.prefill_seconds = now - self.seated_at
    else:
      self.usage.decode_seconds += now - self.last_at
    self.last_at = now
    release = self.transcript.push(token, scored)
    completion = self._completion() if self.transcript.finish_reason else None
    return requests.Update(
      self.request_id,
      self.index,
      release.text,
      release.token_ids,
      release.logprobs,
      completion,
    )

  def _completion(self) -> requests.Completion:
    settings, transcript = self._request.settings, self.transcript
    return requests.Completion(
      text=transcript.text,
      token_ids=transcript.token_ids,
      num_text_ids=transcript.num_text_ids,
      finish_reason=transcript.finish_reason or '',
      stop_reason=transcript.stop_reason,
      num_prompt_tokens=self.num_prompt,
      seed=self.seed,
      logprobs=self._logprobs if settings.logprobs is not None else None,
      prompt_logprobs=self._prompt_logprobs if self.scored_prompt() else None,
      usage=self.usage,
    )
