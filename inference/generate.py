"""Prompts to completions: the host side of prefill and decode.

    generator = generate.Generator(format.read(directory))
    for piece in generator.stream('def add(', settings): ...

A text prompt gets the tokenizer's BOS in front of it, so '' starts from BOS
alone; a prompt of token ids is used verbatim. A sequence ends at EOS, at a stop
string, or at its length. Nothing is truncated silently.

The host runs one step behind the device: step i+1 is dispatched before token i
is read, since a token reaches the next step without leaving the device.
"""

from collections.abc import Callable, Iterator, Sequence
from concurrent import futures
import dataclasses
import math
import os
import secrets
import time
from typing import Any, NamedTuple

import jax.numpy as jnp
import numpy as np

from frozen import format as frozen_format
from inference import decode, sampling, stop_strings
from models import transformer
from text import detokenize, tokenizer as tokenizer_lib

Prompt = str | Sequence[int]

NUM_SEEDS = 2**32


class SettingError(ValueError):
  """A generation setting out of range; `setting` names it."""

  def __init__(self, setting: str, got: Any, expected: str):
    super().__init__(f'{setting}: got {got!r}, expected {expected}')
    self.setting = setting


@dataclasses.dataclass(frozen=True, kw_only=True)
class GenerationSettings:
  """What a request may choose; checked when made.

  Raises:
    SettingError: a value is out of range.
  """

  temperature: float = 1.0  # 0 is greedy
  top_k: int = 0  # most probable tokens to keep; 0 keeps all
  top_p: float = 1.0  # probability mass to keep; 1 keeps all
  min_p: float = 0.0  # least share of the largest probability; 0 keeps all
  seed: int | None = None  # None draws one, reported in the completion
  max_tokens: int | None = None  # None is up to the end of the context
  stop: tuple[str, ...] = ()  # ends the completion, not part of its text

  def __post_init__(self):
    self._check('temperature', lambda x: 0 <= x < math.inf, 'a number >= 0')
    self._check('top_p', lambda x: 0 < x <= 1, 'a number above 0, at most 1')
    self._check('min_p', lambda x: 0 <= x < 1, 'a number >= 0 and below 1')
    self._check_count('top_k', 0, 2**31)
    if self.seed is not None:
      self._check_count('seed', 0, NUM_SEEDS)
    if self.max_tokens is not None:
      self._check_count('max_tokens', 1, 2**31)
    if not isinstance(self.stop, tuple) or not all(
      isinstance(stop, str) and stop for stop in self.stop
    ):
      raise SettingError('stop', self.stop, 'strings, none of them empty')

  def _check(self, name: str, is_valid: Callable[[Any], bool], expected: str):
    value = getattr(self, name)
    is_number = isinstance(value, int | float) and not isinstance(value, bool)
    if not (is_number and is_valid(value)):
      raise SettingError(name, value, expected)

  def _check_count(self, name: str, low: int, high: int):
    self._check(
      name,
      lambda x: isinstance(x, int) and low <= x < high,
      f'an integer from {low} to {high - 1}',
    )


@dataclasses.dataclass(frozen=True, kw_only=True)
class Completion:
  """What one prompt was answered with, and what it took."""

  text: str  # without the stop string
  token_ids: list[int]  # all sampled: with those of EOS or a stop string
  finish_reason: str  # 'stop' (EOS or stop string) | 'length'
  num_prompt_tokens: int  # with BOS
  seed: int  # with the settings and the weights: the same text again
  prefill_seconds: float  # of the batch, to its first tokens on the host
  decode_seconds: float  # of the batch, from then to this sequence's end
  compile_seconds: float  # of the batch, 0 for a shape seen before

  @property
  def num_completion_tokens(self) -> int:
    """Tokens sampled."""
    return len(self.token_ids)


class Update(NamedTuple):
  """A step of one sequence: new text, and the completion when it ends."""

  index: int  # which prompt
  piece: str  # may be empty
  completion: Completion | None


class _Sequence:
  """Host side of one sequence: its tokens, its text and why it ended."""

  def __init__(self, tokenizer: tokenizer_lib.Tokenizer, stop, max_tokens: int):
    self._eos_id = tokenizer.eos_id
    self._decoder = detokenize.StreamDecoder(tokenizer)
    self._matcher = stop_strings.StopMatcher(stop)
    self._max_tokens = max_tokens
    self.token_ids: list[int] = []
    self.text = ''
    self.finish_reason: str | None = None

  def push(self, token_id: int) -> str:
    """Takes the next token and returns the text that may be shown."""
    self.token_ids.append(token_id)
    is_last = len(self.token_ids) == self._max_tokens
    is_eos = token_id == self._eos_id
    # EOS has no text: it pushes nothing and flushes like any end.
    piece = self._matcher.push(self._decoder.push(token_id))
    if self._matcher.matched is None and (is_eos or is_last):
      piece += self._matcher.push(self._decoder.finish())
    if self._matcher.matched is not None or is_eos:
      self.finish_reason = 'stop'
    elif is_last:
      self.finish_reason = 'length'
    if self.finish_reason:
      piece += self._matcher.finish()
    self.text += piece
    return piece


class Generator:
  """Answers prompts with one frozen model.

  Not for use by several threads at once: the device works on one batch.
  """

  def __init__(self, frozen: frozen_format.Frozen):
    self.frozen = frozen
    self.tokenizer = tokenizer_lib.load(frozen.tokenizer_dir)
    self.defaults = settings_from(frozen.generation)
    self.model = transformer.Transformer(
      config=frozen.config, dtype=jnp.dtype(frozen.manifest.dtype)
    )
    if self.tokenizer.vocab_size > frozen.config.vocab_size:
      raise ValueError(
        f'{frozen.tokenizer_dir}: got a tokenizer of'
        f' {self.tokenizer.vocab_size} ids, expected at most the'
        f' {frozen.config.vocab_size} that the model embeds; freeze again with'
        ' the tokenizer of the training run'
      )
    self._programs: dict[tuple[int, ...], Any] = {}

  def prompt_ids(self, prompt: Prompt) -> list[int]:
    """Returns the token ids of a prompt: BOS + text, or the ids verbatim.

    Raises:
      ValueError: no ids, or an id outside the vocabulary.
    """
    if isinstance(prompt, str):
      return [self.tokenizer.bos_id, *self.tokenizer.encode(prompt)]
    ids, vocab_size = list(prompt), self.tokenizer.vocab_size
    if not ids:
      raise ValueError(
        "prompt: got no token ids, expected at least one; send the text '' to"
        ' start from BOS'
      )
    for token_id in ids:
      if not 0 <= token_id < vocab_size:
        raise ValueError(
          f'prompt: got token id {token_id}, expected 0 <= id < {vocab_size}'
        )
    return ids

  def settings_for(self, prompt: Prompt, **chosen) -> GenerationSettings:
    """Returns the model's recommended settings, but for those chosen.

    A recommended max_tokens is lowered to what fits behind the prompt; a
    chosen one is not.

    Args:
      prompt: what the settings are for.
      **chosen: fields of GenerationSettings; None leaves the recommendation.
    """
    chosen = {
      name: value for name, value in chosen.items() if value is not None
    }
    settings = dataclasses.replace(self.defaults, **chosen)
    room = self.frozen.config.max_length - len(self.prompt_ids(prompt))
    if 'max_tokens' in chosen or room >= (settings.max_tokens or math.inf):
      return settings
    return dataclasses.replace(settings, max_tokens=None)

  def max_new_tokens(
    self, num_prompt_tokens: int, settings: GenerationSettings
  ) -> int:
    """Returns how many tokens may follow a prompt.

    Raises:
      ValueError: prompt and completion do not fit into the context.
    """
    context = self.frozen.config.max_length
    wanted = settings.max_tokens or 1
    if num_prompt_tokens + wanted > context:
      raise ValueError(
        f'prompt: got {num_prompt_tokens} tokens and {wanted} to generate,'
        f' expected at most {context} together (the context of this model);'
        ' shorten the prompt or lower max_tokens'
      )
    return settings.max_tokens or context - num_prompt_tokens

  def generate(
    self,
    prompts: Sequence[Prompt],
    settings: GenerationSettings | Sequence[GenerationSettings],
  ) -> list[Completion]:
    """Returns one completion per prompt, decoded together as one batch."""
    completions: dict[int, Completion] = {}
    for update in self.updates(prompts, settings):
      if update.completion:
        completions[update.index] = update.completion
    return [completions[index] for index in range(len(prompts))]

  def stream(
    self, prompt: Prompt, settings: GenerationSettings
  ) -> Iterator[str | Completion]:
    """Yields pieces of text that join to the completion's, then that."""
    for update in self.updates([prompt], settings):
      if update.piece:
        yield update.piece
      if update.completion:
        yield update.completion

  def updates(
    self,
    prompts: Sequence[Prompt],
    settings: GenerationSettings | Sequence[GenerationSettings],
  ) -> Iterator[Update]:
    """Yields what each step adds to each sequence; closing it stops the work.

    Args:
      prompts: at least one.
      settings: of all prompts, or one of each.

    Raises:
      ValueError: before any work, for a prompt that cannot be answered.
    """
    if isinstance(settings, GenerationSettings):
      settings = [settings] * len(prompts)
    ids = [self.prompt_ids(prompt) for prompt in prompts]
    limits = [
      self.max_new_tokens(len(row), wanted)
      for row, wanted in zip(ids, settings, strict=True)
    ]
    # Checked here, at the call; a generator function would check at the first
    # `next`, when a server has already answered 200.
    return self._updates(ids, list(settings), limits)

  def _updates(self, ids, settings, limits) -> Iterator[Update]:
    seeds = [
      secrets.randbelow(NUM_SEEDS) if wanted.seed is None else wanted.seed
      for wanted in settings
    ]
    inputs = self._inputs(ids, settings, seeds)
    cache_length = decode.bucket(
      max(map(len, ids)) + max(limits), limit=self.frozen.config.max_length
    )
    prefill, decode_step, compile_seconds = self._compiled(inputs, cache_length)
    sequences = [
      _Sequence(self.tokenizer, wanted.stop, limit)
      for wanted, limit in zip(settings, limits, strict=True)
    ]
    params = self.frozen.params
    start = now = time.perf_counter()
    prefill_seconds = 0.0
    state, tokens_B = prefill(params, *inputs)
    for step in range(max(limits)):
      current_B = tokens_B
      if step + 1 < max(limits):
        state, tokens_B = decode_step(params, state)
      host_B = np.asarray(current_B)
      now = time.perf_counter()
      if step == 0:
        prefill_seconds = now - start
      for index, sequence in enumerate(sequences):
        if sequence.finish_reason:
          continue
        piece = sequence.push(int(host_B[index]))
        completion = None
        if sequence.finish_reason:
          completion = Completion(
            text=sequence.text,
            token_ids=sequence.token_ids,
            finish_reason=sequence.finish_reason,
            num_prompt_tokens=len(ids[index]),
            seed=seeds[index],
            prefill_seconds=prefill_seconds,
            decode_seconds=now - start - prefill_seconds,
            compile_seconds=compile_seconds,
          )
        yield Update(index, piece, completion)
      if all(sequence.finish_reason for sequence in sequences):
        return

  def _inputs(self, ids, settings, seeds):
    """Returns padded prompts, their lengths and the sampler, on the device."""
    length = decode.bucket(
      max(map(len, ids)), limit=self.frozen.config.max_length
    )
    # Rows are a power of two as well, so that batch sizes share programs.
    num_spare = (1 << (len(ids) - 1).bit_length()) - len(ids)
    ids = ids + ids[:1] * num_spare
    settings = settings + [GenerationSettings(temperature=0.0)] * num_spare
    tokens_BT = np.full((len(ids), length), self.tokenizer.pad_id, np.int32)
    for row, prompt in zip(tokens_BT, ids, strict=True):
      row[: len(prompt)] = prompt
    sampler = sampling.init(
      temperature=[wanted.temperature for wanted in settings],
      top_k=[wanted.top_k for wanted in settings],
      top_p=[wanted.top_p for wanted in settings],
      min_p=[wanted.min_p for wanted in settings],
      seed=seeds + [0] * num_spare,
    )
    lengths_B = np.asarray([len(prompt) for prompt in ids], np.int32)
    return jnp.asarray(tokens_BT), jnp.asarray(lengths_B), sampler

  def _compiled(self, inputs, cache_length: int):
    """Returns both programs for these shapes, and the seconds it took now."""
    shape = (*inputs[0].shape, cache_length)
    if shape in self._programs:
      return *self._programs[shape], 0.0
    start = time.perf_counter()
    static = {'model': self.model, 'vocab_size': self.tokenizer.vocab_size}
    prefill = decode.prefill.lower(
      self.frozen.params, *inputs, cache_length=cache_length, **static
    )
    state, _ = prefill.out_info
    step = decode.decode_step.lower(self.frozen.params, state, **static)
    # XLA compiles outside Python's lock: both take the time of one.
    with futures.ThreadPoolExecutor() as pool:
      programs = tuple(
        pool.map(lambda lowered: lowered.compile(), (prefill, step))
      )
    self._programs[shape] = programs
    return *programs, time.perf_counter() - start


def load(directory: str | os.PathLike) -> Generator:
  """Reads and verifies a frozen directory, ready to answer prompts."""
  return Generator(frozen_format.read(directory))


def settings_from(generation: dict[str, Any]) -> GenerationSettings:
  """Returns the settings that a frozen directory recommends.

  Raises:
    ValueError: a setting is unknown or out of range.
  """
  known = [field.name for field in dataclasses.fields(GenerationSettings)]
  if unknown := sorted(set(generation) - set(known)):
    raise ValueError(
      f'{frozen_format.GENERATION_FILE}: got the settings {unknown}, expected'
      f' only {", ".join(known)}; freeze again without them'
    )
  fields = dict(generation)
  if isinstance(fields.get('stop'), list):
    fields['stop'] = tuple(fields['stop'])
  return GenerationSettings(**fields)
