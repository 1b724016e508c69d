"""Prompts to completions: the host side of prefill and decode.

    generator = generate.Generator(format.read(directory))
    for piece in generator.stream('def add(', settings): ...

A text prompt gets the tokenizer's BOS in front of it if the documents that
the model was trained on had it, and '' is BOS alone; a prompt of token ids is
used verbatim. A sequence ends at EOS, at a stop
string, or at its length. Nothing is truncated silently.

The host runs one step behind the device: step i+1 is dispatched before token i
is read, since a token reaches the next step without leaving the device.
"""

from collections import abc
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
from inference import decode, sampling, settings as settings_lib, stop_strings
from models import transformer
from text import detokenize, tokenizer as tokenizer_lib

Prompt = str | abc.Sequence[int]


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
    self.defaults = settings_lib.recommended(frozen.generation)
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
    """Returns the ids of a prompt: as text was trained on, or verbatim.

    Raises:
      ValueError: no ids, or an id outside the vocabulary.
    """
    if isinstance(prompt, str):
      ids = self.tokenizer.encode(prompt)
      # '' has to start from something, even if training never showed BOS.
      if self.frozen.manifest.has_bos or not ids:
        ids = [self.tokenizer.bos_id, *ids]
      return ids
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

  def settings_for(self, prompt: Prompt, **chosen) -> settings_lib.Settings:
    """Returns the model's recommended settings, but for those chosen.

    A recommended max_tokens is lowered to what fits behind the prompt; a
    chosen one is not.

    Args:
      prompt: what the settings are for.
      **chosen: fields of `Settings`; None leaves the recommendation.
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
    self, num_prompt_tokens: int, settings: settings_lib.Settings
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
    prompts: abc.Sequence[Prompt],
    settings: settings_lib.Settings | abc.Sequence[settings_lib.Settings],
  ) -> list[Completion]:
    """Returns one completion per prompt, decoded together as one batch."""
    completions: dict[int, Completion] = {}
    for update in self.updates(prompts, settings):
      if update.completion:
        completions[update.index] = update.completion
    return [completions[index] for index in range(len(prompts))]

  def stream(
    self, prompt: Prompt, settings: settings_lib.Settings
  ) -> abc.Iterator[str | Completion]:
    """Yields pieces of text that join to the completion's, then that.

    Raises:
      ValueError: before any work, for a prompt that cannot be answered.
    """
    return self._pieces(self.updates([prompt], settings))

  def updates(
    self,
    prompts: abc.Sequence[Prompt],
    settings: settings_lib.Settings | abc.Sequence[settings_lib.Settings],
  ) -> abc.Generator[Update]:
    """Yields what each step adds to each sequence; closing it stops the work.

    Args:
      prompts: at least one.
      settings: of all prompts, or one of each.

    Raises:
      ValueError: before any work, for a prompt that cannot be answered.
    """
    if isinstance(settings, settings_lib.Settings):
      settings = [settings] * len(prompts)
    if not prompts or len(prompts) != len(settings):
      raise ValueError(
        f'prompts: got {len(prompts)} prompts and {len(settings)} settings,'
        ' expected as many of one as of the other, and at least one'
      )
    ids = [self.prompt_ids(prompt) for prompt in prompts]
    limits = [
      self.max_new_tokens(len(row), wanted)
      for row, wanted in zip(ids, settings, strict=True)
    ]
    # Checked here, at the call; a generator function would check at the first
    # `next`, when a server has already answered 200.
    return self._updates(ids, list(settings), limits)

  def _pieces(self, updates) -> abc.Iterator[str | Completion]:
    for update in updates:
      if update.piece:
        yield update.piece
      if update.completion:
        yield update.completion

  def _updates(self, ids, settings, limits) -> abc.Generator[Update]:
    seeds = [
      secrets.randbelow(settings_lib.NUM_SEEDS)
      if wanted.seed is None
      else wanted.seed
      for wanted in settings
    ]
    inputs = self._inputs(ids, settings, seeds)
    # A row that ends before the longest does may run past its cache: harmless.
    cache_length = decode.bucket(
      max(len(row) + limit for row, limit in zip(ids, limits, strict=True)),
      limit=self.frozen.config.max_length,
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
    settings = settings + [settings_lib.Settings(temperature=0.0)] * num_spare
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
