"""What an evaluation asks of a model: two functions and a tokenizer.

Evaluations import nothing of ours. Whoever has a model, in training or in
serving, wraps it into these functions; what is measured is then the same.
"""

from collections.abc import Callable, Mapping, Sequence
import dataclasses
from typing import Any, NamedTuple, Protocol

import numpy as np

Ids = Sequence[int]


class Tokenizer(Protocol):
  """What is asked of a tokenizer; those of `text/` have it."""

  @property
  def bos_id(self) -> int | None:
    """Of the token that begins a document; None if there is none."""
    ...

  @property
  def eos_id(self) -> int | None:
    """Of the token that ends a document; None if there is none."""
    ...

  def encode(self, text: str) -> list[int]:
    """Returns the ids of `text`, no special ones among them."""
    ...

  def decode(self, ids: Any) -> str:
    """Returns the text of `ids`; special ids contribute nothing."""
    ...

  def num_bytes_V(self) -> np.ndarray:
    """Returns integers [V], bytes of text per id, 0 for special ids."""
    ...


class MarkingTokenizer(Protocol):
  """A tokenizer that can be told where special tokens stand in a text."""

  @property
  def special_tokens(self) -> Mapping[str, int]:
    """All strings that name a token, with its id."""
    ...

  def encode_marked(self, text: str, spans: Any) -> tuple[list[int], Any]:
    """Returns the ids of `text`, in which (start, end) are special tokens."""
    ...


class Scored(NamedTuple):
  """How probable a continuation is."""

  logprob: float  # of the whole, in nats
  is_greedy: bool  # every token is the most probable one
  token_logprobs: np.ndarray  # of each token


class LogprobFn(Protocol):
  """Scores continuations. Requests come in any number and any length."""

  def __call__(self, requests: Sequence[tuple[Ids, Ids]]) -> Sequence[Scored]:
    """Returns one score per (context_ids, continuation_ids), in order.

    Neither part is empty. Together they have at most `max_length + 1` tokens:
    the last one is predicted and never read.
    """
    ...


@dataclasses.dataclass(frozen=True, kw_only=True)
class SampleSettings:
  """How completions are drawn."""

  max_tokens: int  # of a completion, at most
  temperature: float = 0.0  # 0 is greedy
  top_k: int = 0  # most probable tokens to keep; 0 keeps all
  top_p: float = 1.0  # probability mass to keep; 1 keeps all
  min_p: float = 0.0  # least share of the largest probability; 0 keeps all
  seed: int = 0  # samples of one call differ, those of the same call repeat
  stop: tuple[str, ...] = ()  # ends a completion, not part of its text


class Completion(NamedTuple):
  """What a prompt was continued with."""

  text: str  # without the stop string or the end-of-document token
  ids: tuple[int, ...]


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

  tokenizer: Tokenizer
  max_length: int  # tokens that the model reads at most
  logprob_fn: LogprobFn | None = None
  sample_fn: SampleFn | None = None
  adds_bos: bool = False  # a text begins with bos_id, as it did in training
  # What a text without context is predicted from; None: bos_id, or eos_id.
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
    if self.adds_bos and self.tokenizer.bos_id is None:
      raise ValueError(
        'adds_bos: got True with a tokenizer that has no bos_id, expected False'
      )
    _ = self.prefix

  @property
  def prefix(self) -> int:
    """Returns the id that the first token of a text is predicted from."""
    for candidate in (
      self.prefix_id,
      self.tokenizer.bos_id,
      self.tokenizer.eos_id,
    ):
      if candidate is not None:
        return candidate
    raise ValueError(
      'prefix_id: got None with a tokenizer that has neither bos_id nor'
      ' eos_id, expected an id that the first token is predicted from'
    )

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
