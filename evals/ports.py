"""The ports of evaluations: what they ask of a model.

Training and serving each wrap their model into these functions, so that the
same evaluation measures both.
"""

from collections.abc import Callable, Mapping, Sequence
import dataclasses
from typing import Any, NamedTuple, Protocol

import numpy as np

from text import tokenizer as tokenizer_lib

Ids = Sequence[int]


class Scored(NamedTuple):
  """How probable a continuation is."""

  logprob: float  # of the whole, in nats
  is_greedy: bool  # every token is the most probable one
  token_logprobs: np.ndarray  # of each token


class LogprobFn(Protocol):
  """Scores continuations. Requests come in any number and any length."""

  def __call__(
    self, requests: Sequence[tuple[Ids, Ids]], /
  ) -> Sequence[Scored]:
    """Returns one score per (context_ids, continuation_ids), in order.

    Neither part is empty. Together they have at most `max_length + 1` tokens:
    the last one is predicted and never read.
    """
    ...


@dataclasses.dataclass(frozen=True, kw_only=True)
class SampleSettings:
  """How completions are drawn."""

  max_tokens: int  # of a completion, at most
  temperature: float = 0.0  # divides the logits; 0 is greedy
  # Further settings of the sampler by name, such as {'top_p': 0.9}.
  filters: Mapping[str, float] = dataclasses.field(default_factory=dict)
  seed: int = 0  # samples of one call differ, those of the same call repeat
  stop: tuple[str, ...] = ()  # ends a completion, not part of its text


class Completion(NamedTuple):
  """One completion of a prompt.

  Evaluations read the text. The other fields are for training on samples.
  """

  text: str  # without the stop string or the end-of-document token
  ids: tuple[int, ...]  # of the text
  all_ids: tuple[int, ...] = ()  # as sampled, with what ended the completion
  # float32, of `all_ids`, before temperature and filters.
  logprobs: np.ndarray | None = None


class SampleFn(Protocol):
  """Completes prompts. They come in any number and any length."""

  def __call__(
    self,
    prompts: Sequence[Ids],
    settings: SampleSettings,
    num_samples: int,
  ) -> Sequence[Sequence[Completion]]:
    """Returns `num_samples` completions per prompt of token ids, in order.

    A completion ends with a stop string, with the end-of-document token or with
    `max_tokens`. A prompt and its completion fit into `max_length` tokens.
    """
    ...


class ChatFn(Protocol):
  """Renders a conversation as the text of a prompt, for tasks of lm_eval."""

  def __call__(
    self, messages: list[dict[str, Any]], *, add_generation_prompt: bool
  ) -> str:
    """Returns the text, with the opening of the next turn if asked for."""
    ...


@dataclasses.dataclass(frozen=True, kw_only=True)
class Model:
  """What is evaluated. An evaluation refuses a model that lacks what it needs.

  Raises:
    ValueError: no token can stand before a text.
  """

  tokenizer: tokenizer_lib.Tokenizer
  max_length: int  # tokens that the model reads at most
  logprob_fn: LogprobFn | None = None
  sample_fn: SampleFn | None = None
  adds_bos: bool = False  # a text begins with bos_id, as it did in training
  # The id that a text without context is predicted from; None: bos_id.
  prefix_id: int | None = None
  # Like tokenizer.encode, but strings that name special tokens become their
  # ids: what tasks of lm_eval mean, chats that were rendered among them.
  encode_prompt: Callable[[str], list[int]] | None = None
  render_chat: ChatFn | None = None
  # The ids of a conversation, up to the opening of the assistant's turn. What
  # looks like a special token in a message is text.
  encode_chat: Callable[[list[dict[str, Any]]], list[int]] | None = None
  # What to call it in a result: digest of the weights, name, step.
  description: Mapping[str, Any] = dataclasses.field(default_factory=dict)

  def __post_init__(self):
    if self.max_length < 1:
      raise ValueError(
        f'max_length: got {self.max_length}, expected at least 1 token'
      )

  @property
  def prefix(self) -> int:
    """Returns the id that the first token of a text is predicted from."""
    return self.tokenizer.bos_id if self.prefix_id is None else self.prefix_id

  def scores(self) -> LogprobFn:
    """Returns `logprob_fn`, or raises ValueError if there is none."""
    if self.logprob_fn is None:
      raise ValueError(
        'logprob_fn: got none, expected one: this task scores text that is'
        ' given; give the model a logprob_fn'
      )
    return self.logprob_fn

  def samples(self) -> SampleFn:
    """Returns `sample_fn`, or raises ValueError if there is none."""
    if self.sample_fn is None:
      raise ValueError(
        'sample_fn: got none, expected one: this task reads what the model'
        ' writes; give the model a sample_fn'
      )
    return self.sample_fn
