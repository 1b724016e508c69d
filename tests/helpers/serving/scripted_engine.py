"""An engine without a model: sequences say texts of a known distribution.

It has the members of `inference.search.drive.Port`, and the accounts of the
real engine: FLOPs of spans, prompts shared by the sequences of a request,
tokens computed again after a preemption, several tokens in a step. What happens
is drawn from a seed. Its clock moves with its steps.
"""

import collections
from collections.abc import Callable
import dataclasses

import numpy as np

from inference.requests import requests as requests_lib
from inference.sampling import logprobs, settings as settings_lib
from models import flops, model_config
from tests.helpers import tiny_models

# Returns the text that a sequence says, by the prompt, its number among the
# samples of its search, and a generator of its seed.
Says = Callable[[tuple[int, ...], int, np.random.Generator], str]


@dataclasses.dataclass
class _Live:
  request_id: int
  index: int
  request: requests_lib.Request
  script: list[int]  # ids that it would say, EOS last
  seed: int
  ids: list[int]
  usage: requests_lib.Usage
  num_computed: int = 0
  held: float = 0.0


class ScriptedEngine:
  """See above."""

  def __init__(
    self,
    says: Says,
    *,
    seed: int = 0,
    config: model_config.ModelConfig | None = None,
    max_sequences: int = 8,
    preemption: float = 0.0,
    most_tokens: int = 1,
    max_length: int = 256,
    step_seconds: Callable[[np.random.Generator], float] = lambda _: 1.0,
  ):
    """Starts without requests.

    Args:
      says: the texts.
      seed: of preemptions and of tokens per step.
      config: of the model whose FLOPs are charged.
      max_sequences: that run at once.
      preemption: probability of one per step and running sequence.
      most_tokens: of a sequence in a step, by drafts and dispatches.
      max_length: of the context.
      step_seconds: what a step takes.
    """
    self.tokenizer = tiny_models.byte_tokenizer()
    self.model_config = config or tiny_models.llama_like(vocab_size=261)
    self._says, self._rng = says, np.random.default_rng(seed)
    self._flops = flops.SpanFlops(self.model_config)
    self._most_running, self._preemption = max_sequences, preemption
    self._most_tokens, self._max_length = most_tokens, max_length
    self._step_seconds = step_seconds
    self._waiting: collections.deque[_Live] = collections.deque()
    self._running: list[_Live] = []
    self._num_requests = 0
    self._prefixes: set[tuple[int, ...]] = set()
    self.now = self.longest = 0.0
    # What all sequences have used, counted as the engine's metrics count it.
    self.sampled = self.preemptions = self.num_steps = 0
    self.flops = self.kv_byte_seconds = 0.0
    self.completions: list[requests_lib.Completion] = []

  def clock(self) -> float:
    """The time in seconds."""
    return self.now

  @property
  def has_work(self) -> bool:
    """See `Port`."""
    return bool(self._waiting or self._running)

  def checked(self, request: requests_lib.Request) -> requests_lib.Request:
    """See `Port`."""
    room = requests_lib.room_for(
      request,
      vocab_size=self.tokenizer.vocab_size,
      context=self._max_length,
      capacity=self._max_length,
    )
    return dataclasses.replace(request, room=room)

  def has_places(self, asked: collections.Counter[str]) -> bool:
    """See `Port`."""
    return len(self._waiting) + asked.total() <= 4 * self._most_running

  def submit(self, request: requests_lib.Request) -> int:
    """See `Port`."""
    request = self.checked(request)
    self._num_requests += 1
    for index in range(request.settings.n):
      assert request.settings.seed is not None
      number = request.first_sample + index
      seed = settings_lib.sample_seed(request.settings.seed, number)
      rng = np.random.default_rng([seed, len(request.prompt_ids)])
      text = self._says(request.prompt_ids, number, rng)
      script = [*self.tokenizer.encode(text), self.tokenizer.eos_id]
      if request.target is not None:
        script = [request.target]
      self._waiting.append(
        _Live(
          self._num_requests,
          index,
          request,
          script,
          seed,
          [],
          requests_lib.Usage(),
        )
      )
    return self._num_requests

  def cancel(self, request_id: int) -> list[requests_lib.Update]:
    """See `Port`."""
    mine = [
      x for x in (*self._running, *self._waiting) if x.request_id == request_id
    ]
    return [self._end(live, 'cancelled') for live in mine]

  def step(self) -> list[requests_lib.Update]:
    """See `Port`."""
    self.num_steps += 1
    seconds = self._step_seconds(self._rng)
    self.longest = max(self.longest, seconds)
    self.now += seconds
    for live in self._running:
      used = 8.0 * live.num_computed * seconds
      live.usage.kv_byte_seconds += used
      self.kv_byte_seconds += used
    for live in list(self._running):
      if self._rng.random() < self._preemption:
        self._running.remove(live)
        self._waiting.append(live)
        live.num_computed, live.usage.preemptions = (
          0,
          live.usage.preemptions + 1,
        )
        self.preemptions += 1
    while self._waiting and len(self._running) < self._most_running:
      self._running.append(self._waiting.popleft())
    updates = [self._advance(live) for live in list(self._running)]
    return [update for update in updates if update]

  def _advance(self, live: _Live) -> requests_lib.Update | None:
    prompt, num_prompt = live.request.prompt_ids, len(live.request.prompt_ids)
    for _ in range(int(self._rng.integers(1, self._most_tokens + 1))):
      start, known = live.num_computed, num_prompt + len(live.ids)
      if start == 0:
        start = known - 1 if prompt in self._prefixes and not live.ids else 0
        if not live.usage.prefill_tokens:
          live.usage.cached_tokens = start
      cost = self._flops(start, known - start, 1)
      most = live.request.most_flops
      if most is not None and live.usage.flops + cost > most:
        return self._end(live, 'length')
      live.usage.prompt_tokens = num_prompt
      if live.ids and live.num_computed:
        live.usage.decode_tokens += known - start
      else:
        live.usage.prefill_tokens += known - start
      self._prefixes.add(prompt)
      live.usage.flops += cost
      self.flops += cost
      live.num_computed = known
      live.ids.append(live.script[len(live.ids)])
      self.sampled += live.request.target is None
      if live.ids[-1] == self.tokenizer.eos_id or self._has_stop(live):
        return self._end(live, 'stop')
      if len(live.ids) == live.request.room:
        return self._end(live, 'length')
    return None

  def _has_stop(self, live: _Live) -> bool:
    stops = live.request.settings.stop
    if not stops:
      return False
    text = self.tokenizer.decode(live.ids)
    return any(stop in text for stop in stops)

  def _end(self, live: _Live, reason: str) -> requests_lib.Update:
    (self._running if live in self._running else self._waiting).remove(live)
    ids = [x for x in live.ids if x != self.tokenizer.eos_id]
    text = self.tokenizer.decode(ids)
    found = [s for s in live.request.settings.stop if s in text]
    for stop in found:
      text = text[: text.index(stop)]
    wanted = live.request.settings.logprobs is not None
    completion = requests_lib.Completion(
      text=text,
      token_ids=list(live.ids),
      num_text_ids=len(text.encode()),
      finish_reason=reason,
      stop_reason=found[0] if found else None,
      num_prompt_tokens=len(live.request.prompt_ids),
      seed=live.seed,
      logprobs=[_scored(token) for token in live.ids] if wanted else None,
      prompt_logprobs=None,
      usage=live.usage,
    )
    self.completions.append(completion)
    return requests_lib.Update(
      live.request_id, live.index, '', (), (), completion
    )


def _scored(token: int) -> logprobs.TokenLogprobs:
  """A log-probability that the id determines."""
  return logprobs.TokenLogprobs(-1.0 - token / 300, (), ())
