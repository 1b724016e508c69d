"""The ports of evaluations: the functions of a model that they call.

Training and serving each wrap their model into these functions, so that the
same evaluation measures both.
"""

from collections.abc import Callable, Mapping, Sequence
import dataclasses
from typing import Any, NamedTuple, Protocol

import numpy as np

from checks import expect
from text import tokenizer as tokenizer_lib

Ids = Sequence[int]


class Logprobs(NamedTuple):
  """The log-probabilities of a continuation, in nats."""

  logprob: float  # of the whole continuation
  is_greedy: bool  # whether every token is the most probable one
  token_logprobs: np.ndarray  # one per token


class LogprobFn(Protocol):
  """Scores any number of continuations, each of any length that fits."""

  def __call__(
    self, requests: Sequence[tuple[Ids, Ids]], /
  ) -> Sequence[Logprobs]:
    """Returns the log-probabilities per (context_ids, continuation_ids).

    Neither part is empty. Together they have at most `max_length + 1` tokens,
    since the last token is predicted and never read.
    """
    ...


@dataclasses.dataclass(frozen=True, kw_only=True)
class SampleSettings:
  """The settings of a completion."""

  max_tokens: int  # most tokens of a completion
  temperature: float = 0.0  # divides the logits; 0 is greedy
  # Further settings of the sampler by name, such as {'top_p': 0.9}.
  filters: Mapping[str, float] = dataclasses.field(default_factory=dict)
  # Samples of one call differ. The same call again returns the same samples.
  seed: int = 0
  stop: tuple[str, ...] = ()  # ends a completion, not part of its text


class Completion(NamedTuple):
  """One completion of a prompt.

  Evaluations read the text. The other fields are for training on samples.
  """

  text: str  # without the stop string or the end-of-document token
  ids: tuple[int, ...]  # ids of the text
  all_ids: tuple[int, ...] = ()  # as sampled, with the ids of the ending
  # Log-probabilities of `all_ids`, float32, before temperature and filters.
  logprobs: np.ndarray | None = None


class SampleFn(Protocol):
  """Completes any number of prompts, each of any length that fits."""

  def __call__(
    self, prompts: Sequence[Ids], settings: SampleSettings, num_samples: int
  ) -> Sequence[Sequence[Completion]]:
    """Returns `num_samples` completions per prompt of token ids, in order.

    A completion ends with a stop string, with the end-of-document token or
    after `max_tokens`. A prompt and its completion fit into `max_length`
    tokens.
    """
    ...


class ChatFn(Protocol):
  """Renders a conversation as the text of a prompt, for tasks of lm_eval."""

  def __call__(
    self, messages: list[dict[str, Any]], *, add_generation_prompt: bool
  ) -> str:
    """Returns the text, with the opening of the next turn on request."""
    ...


class RewardFn(Protocol):
  """Gives the reward of any number of answers."""

  def __call__(self, answers: Sequence[Ids], /) -> Sequence[float]:
    """Returns a number per answer; its ids are the ids of prompt and answer."""
    ...


@dataclasses.dataclass(frozen=True, kw_only=True)
class Model:
  """A model as evaluations see it; a task refuses a model without a function.

  Raises:
    ValueError: `max_length` is below 1.
  """

  tokenizer: tokenizer_lib.Tokenizer
  max_length: int  # tokens of the context, prompt and completion together
  logprob_fn: LogprobFn | None = None
  sample_fn: SampleFn | None = None
  adds_bos: bool = False  # a text begins with bos_id, as it did in training
  # The id that a text without context is predicted from; None: bos_id.
  prefix_id: int | None = None
  # Like tokenizer.encode, but names of special tokens become their ids. Tasks
  # of lm_eval expect it, also for the chats that they render.
  encode_prompt: Callable[[str], list[int]] | None = None
  render_chat: ChatFn | None = None
  # The ids of a conversation, up to the opening of the assistant's turn. A name
  # of a special token in a message is plain text.
  encode_chat: Callable[[list[dict[str, Any]]], list[int]] | None = None
  # For a reward model, which has neither of the functions above.
  reward_fn: RewardFn | None = None
  # The ids of a prompt, a text or messages, and of the answer to it.
  encode_answer: Callable[[Any, str], Sequence[int]] | None = None
  # Identifies the model in results: digest of the weights, name, step.
  description: Mapping[str, Any] = dataclasses.field(default_factory=dict)

  def __post_init__(self):
    expect.at_least('max_length', self.max_length, 1)

  @property
  def prefix(self) -> int:
    """Returns the id that the first token of a text is predicted from."""
    return self.tokenizer.bos_id if self.prefix_id is None else self.prefix_id

  def required_logprob_fn(self) -> LogprobFn:
    """Returns `logprob_fn`, or raises ValueError if there is none."""
    if self.logprob_fn is None:
      raise ValueError(
        'logprob_fn: got none, expected one: this task scores given text;'
        ' give the model a logprob_fn'
      )
    return self.logprob_fn

  def required_sample_fn(self) -> SampleFn:
    """Returns `sample_fn`, or raises ValueError if there is none."""
    if self.sample_fn is None:
      raise ValueError(
        'sample_fn: got none, expected one: this task reads completions of the'
        ' model; give the model a sample_fn'
      )
    return self.sample_fn
