"""Tiny engines, a reference that shares nothing with them, and a crowd.

The reference computes one token of one sequence at a time over a dense cache,
and draws from a distribution that NumPy makes. What an engine answers, however
its sequences are packed, cached or interrupted, has to be what it says.
"""

import collections
from collections.abc import Hashable, Sequence
import dataclasses
import functools
from typing import NamedTuple
import weakref

import jax
import jax.numpy as jnp
import numpy as np

from inference.engine import (
  device_state,
  engine as engine_lib,
  engine_config,
)
from inference.engine.drafting import draft_model
from inference.requests import requests as requests_lib
from inference.sampling import (
  logprobs as logprobs_lib,
  settings as settings_lib,
)
from models import kv_cache, transformer
from models.linear import invariant
from tests.helpers import tiny_models
from tests.helpers.serving import guesses, simulated_device, trained_heads
from text import tokenizer as tokenizer_lib

MAX_LENGTH = 128
_MODELS = {
  'llama': tiny_models.llama_like,
  'gpt2': tiny_models.gpt2_like,
  'mixture': tiny_models.mixture,
  'odd_heads': tiny_models.odd_heads,
  'whole_norms': functools.partial(
    tiny_models.llama_like, qk_norm=True, qk_norm_whole=True
  ),
  'latent': functools.partial(
    tiny_models.llama_like,
    num_kv_heads=4,
    head_width=10,
    latent_width=8,
    query_latent_width=12,
    rotary_width=4,
    value_width=6,
  ),
}
# Weak: `tests/conftest.py` empties the cache of `engine` to free programs.
_ENGINES: weakref.WeakSet[engine_lib.Engine] = weakref.WeakSet()


class SmallTokenizer(tokenizer_lib.ByteTokenizer):
  """A vocabulary so small that every outcome can be counted."""

  vocab_size = 13
  bos_id, eos_id, pad_id = 10, 11, 12


@functools.cache
def model_config(kind: str = 'llama', vocab_size: int = 261):
  """Returns a model of one layer; its vocabulary has rows to spare."""
  return _MODELS[kind](
    num_layers=1, max_length=MAX_LENGTH, vocab_size=vocab_size
  )


@functools.cache
def params(kind: str = 'llama', vocab_size: int = 261, seed: int = 0):
  """Returns weights so large that logits differ clearly."""
  config = model_config(kind, vocab_size)
  shapes = jax.eval_shape(
    transformer.Transformer(config).init,
    jax.random.key(0),
    jnp.zeros((1, 1), jnp.int32),
  )
  rng = np.random.default_rng(seed)

  def leaf(path, shape):
    is_scale = 'scale' in jax.tree_util.keystr(path)
    values = rng.normal(float(is_scale), 0.3, shape.shape)
    return jnp.asarray(values, shape.dtype)

  return jax.tree_util.tree_map_with_path(leaf, shapes)


@functools.cache
def engine(
  kind: str = 'llama',
  *,
  is_small: bool = False,
  noise: float | None = None,
  has_head: bool = False,
  **layout,
) -> engine_lib.Engine:
  """Returns the engine of a layout, made once since compiling takes long.

  Args:
    kind: of model.
    is_small: with the vocabulary of `SmallTokenizer`.
    noise: of the draft model: it has the weights of the model with so much
      noise; None: there is none.
    has_head: whether a draft head of the model drafts.
    **layout: fields of `EngineConfig`.
  """
  vocab_size = 13 if is_small else 261
  config = model_config(kind, vocab_size)
  if has_head:
    head = trained_heads.weights(config, params(kind, vocab_size))
    made = engine_of(
      config,
      kind,
      draft=head,
      **layout,
      speculation='head',
      draft_head='given',
    )
    made._speculator._choice.costs = guesses.Costs()
    return made
  if noise is None:
    return engine_of(config, kind, **layout)
  rng = np.random.default_rng(1)
  drafting = jax.tree.map(
    lambda x: x + noise * jnp.asarray(rng.normal(0, 1, x.shape), x.dtype),
    params(kind, vocab_size),
  )
  made = engine_of(
    config,
    kind,
    draft=draft_model.Weights(
      config=config, params=device_state.unread(drafting), dtype=jnp.float32
    ),
    **layout,
    speculation='model',
    draft_model='given',
  )
  # All drafts are worth their time.
  made._speculator._choice.costs = guesses.Costs()
  return made


def engine_of(
  config, kind: str = 'llama', draft=None, **layout
) -> engine_lib.Engine:
  """Returns an engine of a model that has the weights of a kind."""
  is_small = config.vocab_size == 13
  tokenizer = SmallTokenizer() if is_small else tiny_models.byte_tokenizer()
  made = engine_lib.Engine(
    config,
    params(kind, config.vocab_size),
    tokenizer=tokenizer,
    weights_digest='first',
    config=engine_config.EngineConfig(**layout),
    draft=draft,
  )
  _ENGINES.add(made)
  return made


def check_engines():
  """Asserts that each engine is idle and consistent, and cleans up."""
  for made in list(_ENGINES):
    was_busy = made.has_work
    for live in list(made._live.values()):
      # Otherwise the failure of one test would fail the next one.
      made.cancel(live.request_id)
    list(made.run())
    gauges = made.manager.gauges()
    made.manager.check()
    made.manager.clear()
    assert made.metrics.value('compilations_after_ready_total') == 0
    assert not was_busy
    assert gauges.pages_used == gauges.num_running == gauges.num_waiting == 0


# The engine of most tests: three shapes, since compiling takes the time, and
# memory for few sequences.
TIGHT = {
  'max_sequences': 8,
  'decode_shapes': (8,),
  'page_size': 16,
  'num_pages': 20,
  'chunk_tokens': 16,
  'max_chunks': 1,
  'max_mixed_chunks': 1,
  'numerics': 'invariant',
  'decode_steps': 1,  # tests look between two tokens
}
# For tests of shapes: two numbers of decodes, up to two chunks, and always as
# many decode steps as possible.
SIX_SHAPES = {
  **TIGHT,
  'decode_steps': 32,
  'stream_seconds': 0,
  'decode_shapes': (2, 8),
  'chunk_tokens': 8,
  'max_chunks': 2,
}


# ------------------------------------------------------------------------------
# The reference.


class Expected(NamedTuple):
  """The expected answer to one sequence of a request."""

  token_ids: list[int]
  logprobs: list[logprobs_lib.TokenLogprobs]
  prompt_logprobs: list[logprobs_lib.TokenLogprobs | None] | None


class Reference:
  """Answers requests one token at a time."""

  def __init__(self, kind: str = 'llama', *, is_small: bool = False):
    vocab_size = 13 if is_small else 261
    self.config = model_config(kind, vocab_size)
    self.params = params(kind, vocab_size)
    self.tokenizer = (
      SmallTokenizer() if is_small else tiny_models.byte_tokenizer()
    )
    model = transformer.Transformer(
      self.config, jnp.float32, invariant.execution()
    )
    self._apply = jax.jit(model.apply)
    self._score = jax.jit(logprobs_lib.logprobs)
    self._gumbel = jax.jit(_gumbel, static_argnums=2)
    self._answers: dict[tuple, Expected] = {}

  def answer(
    self, request: requests_lib.Request, index: int = 0, *, weights=None
  ) -> Expected:
    """Returns sequence `index` of a request that has a seed, or is greedy.

    Args:
      request: without stop strings and ids.
      index: of its n.
      weights: others than those of the engines.
    """
    asked = dataclasses.replace(request, principal='', priority=0)
    key = asked, index, id(weights)
    if key not in self._answers:
      self._answers[key] = self._answer(request, index, weights or self.params)
    return self._answers[key]

  def logits_TV(self, ids: Sequence[int], weights=None) -> np.ndarray:
    """Returns the logits after each of the ids."""
    self._begin(weights or self.params)
    return np.concatenate([self._next(token) for token in ids])

  def _begin(self, weights):
    self._weights, self._position = weights, 0
    self._cache = kv_cache.init(self.config, batch_size=1, length=MAX_LENGTH)

  def _next(self, token: int) -> np.ndarray:
    logits_1TV, self._cache = self._apply(
      self._weights,
      np.array([[token]], np.int32),
      np.array([[self._position]], np.int32),
      self._cache,
    )
    self._position += 1
    return np.asarray(logits_1TV[0, :, : self.tokenizer.vocab_size])

  def _answer(self, request, index: int, weights) -> Expected:
    settings, prompt = request.settings, request.prompt_ids
    wanted = settings.prompt_logprobs
    seed = settings_lib.sample_seed(settings.seed or 0, index) % 2**64
    words = np.frombuffer(seed.to_bytes(8, 'big'), '>u4').astype(np.uint32)
    prompt_logprobs: list[logprobs_lib.TokenLogprobs | None] = [None]
    self._begin(weights)
    for token, target in zip(prompt[:-1], prompt[1:], strict=True):
      logits_1V = self._next(token)
      if wanted is not None and not index:
        prompt_logprobs.append(self._scored(logits_1V, target, wanted))
    output, scores, last = [], [], prompt[-1]
    while len(output) < settings.max_tokens:
      logits_1V = self._next(last)
      probs_V = distribution(
        logits_1V[0], settings, prompt, output, self.tokenizer.eos_id
      )
      if request.target is not None and not output:
        last = request.target
      elif settings.temperature:
        noise_V = self._gumbel(words, self._position, len(probs_V))
        with np.errstate(divide='ignore'):
          last = int(np.argmax(np.log(probs_V) + noise_V))
      else:
        last = int(np.argmax(probs_V))
      output.append(last)
      scores.append(self._scored(logits_1V, last, settings.logprobs or 0))
      if last == self.tokenizer.eos_id and not settings.ignore_eos:
        break
    has_prompt = wanted is not None and not index
    return Expected(output, scores, prompt_logprobs if has_prompt else None)

  def _scored(self, logits_1V, token: int, wanted: int):
    """Scores one token in float32 as engines do, and checks it with NumPy."""
    found = self._score(logits_1V, np.array([token]), np.array([wanted]))
    scored = logprobs_lib.of_row(jax.device_get(found), 0, wanted)
    exact_V = np.float64(logits_1V[0]) - np.max(logits_1V)
    exact_V -= np.log(np.sum(np.exp(exact_V)))
    # float32 rounds a log-probability of 10 by 1e-6.
    np.testing.assert_allclose(scored.chosen, exact_V[token], atol=1e-5)
    best = np.sort(exact_V)[::-1][:wanted]
    np.testing.assert_allclose(scored.values, best, atol=1e-5)
    return scored


def distribution(
  logits_V: np.ndarray,
  settings: settings_lib.Settings,
  prompt: Sequence[int],
  output: Sequence[int],
  eos_id: int,
) -> np.ndarray:
  """Returns the next token's distribution, in float64, rule by rule."""
  logits_V = np.array(logits_V, np.float64)
  for token in {*prompt, *output}:
    factor = settings.repetition_penalty
    logits_V[token] *= 1 / factor if logits_V[token] > 0 else factor
  for token, count in collections.Counter(output).items():
    logits_V[token] -= settings.frequency_penalty * count
    logits_V[token] -= settings.presence_penalty
  for token, bias in settings.logit_bias:
    logits_V[token] += bias
  if len(output) < settings.min_tokens:
    logits_V[[eos_id, *settings.stop_ids]] = -np.inf
  logits_V = (logits_V - logits_V.max()) / (settings.temperature or 1.0)
  probs_V = np.exp(logits_V)
  ranked = np.argsort(-logits_V, kind='stable')  # equal values by lower id
  if settings.top_k:
    probs_V[ranked[settings.top_k :]] = 0
  probs_V /= probs_V.sum()
  mass_before = np.cumsum(probs_V[ranked]) - probs_V[ranked]
  if settings.top_p < 1:
    probs_V[ranked[mass_before >= settings.top_p]] = 0
  probs_V[probs_V < settings.min_p * probs_V.max()] = 0
  return probs_V / probs_V.sum()


def _gumbel(words, position, size: int):
  """Returns noise whose key is of the sequence's seed and the position."""
  key = jax.random.fold_in(jax.random.wrap_key_data(words), position)
  return jax.random.gumbel(key, (size,))


# ------------------------------------------------------------------------------
# The crowd.


def _field(factory):
  return dataclasses.field(default_factory=factory)


@dataclasses.dataclass
class Served:
  """The completions of requests that were served together."""

  # By request, then by index.
  completions: list[list[requests_lib.Completion]] = _field(list)
  # Of each sequence: the text of its updates, and its slots.
  texts: dict[tuple[int, int], str] = _field(
    lambda: collections.defaultdict(str)
  )
  slots: dict[tuple[int, int], set[int]] = _field(
    lambda: collections.defaultdict(set)
  )
  preemptions: collections.Counter[tuple[int, int]] = _field(
    collections.Counter
  )
  num_running: int = 0  # at most, at once
  num_steps: int = 0


def serve(
  engine: engine_lib.Engine,
  requests: Sequence[requests_lib.Request],
  *,
  rng: np.random.Generator | None = None,
  spread: int = 0,
  preemptions: Sequence[int] = (0,),
) -> Served:
  """Serves requests to the end, and checks invariants after every step.

  Args:
    engine: that has no work.
    requests: in the order in which they are submitted.
    rng: of what is left to chance.
    spread: steps over which they arrive.
    preemptions: how often a sequence loses its pages, one of these, at random
      steps; those for want of memory not counted.
  """
  rng = rng or np.random.default_rng(0)
  arrivals = sorted(int(rng.integers(spread + 1)) for _ in requests)
  which: dict[int, int] = {}
  quotas: dict[Hashable, int] = {}
  found: dict[tuple[int, int], requests_lib.Completion] = {}
  served = Served()
  while len(which) < len(requests) or engine.has_work:
    while len(which) < len(requests) and (
      arrivals[len(which)] <= served.num_steps
    ):
      number = len(which)
      which[engine.submit(requests[number])] = number
    for sequence in list(engine.manager.running()):
      quotas.setdefault(sequence.id, int(rng.choice(preemptions)))
      if quotas[sequence.id] and rng.random() < 0.2:
        quotas[sequence.id] -= 1
        live = engine._live[sequence]
        served.preemptions[which[live.request_id], live.index] += 1
        simulated_device.preempt(engine.manager, sequence)
    for update in engine.step():
      key = which[update.request_id], update.index
      served.texts[key] += update.text
      if update.completion:
        found[key] = update.completion
        served.preemptions[key] += update.completion.usage.preemptions
    running = engine.manager.running()
    for sequence in running:
      live = engine._live[sequence]
      served.slots[which[live.request_id], live.index].add(sequence.slot)
    served.num_running = max(served.num_running, len(running))
    served.num_steps += 1
    engine.manager.check()
  served.completions = [
    [found[number, index] for index in range(request.settings.n)]
    for number, request in enumerate(requests)
  ]
  return served
