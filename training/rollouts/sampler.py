"""The port of rollouts: what training asks of the engine that samples.

Training never imports inference. `train.py` makes the sampler of a run and
hands it to `training.run.run`.
"""

from collections.abc import Callable, Sequence
import dataclasses
from typing import Any, NamedTuple, Protocol

import numpy as np

from models import model_config as model_config_lib
from text import tokenizer as tokenizer_lib


@dataclasses.dataclass(frozen=True, kw_only=True)
class Ask:
  """One completion that is asked for."""

  prompt_ids: tuple[int, ...]
  # 64 bits. The completion is a function of seed, prompt and weights alone.
  seed: int
  max_tokens: int
  temperature: float = 1.0  # divides the logits; 0 takes the likeliest token
  stop_ids: tuple[int, ...] = ()  # ids that end the completion, beside EOS
  stop: tuple[str, ...] = ()  # strings that end it; their ids are among `ids`


class Sample(NamedTuple):
  """The completion of an `Ask`."""

  ids: tuple[int, ...]  # as sampled, with the stop token
  text: str  # without what ended it
  logprobs: np.ndarray  # float32, of the distribution that each id came from
  versions: np.ndarray  # int32, the version of the weights that drew each id
  is_truncated: bool  # ended by max_tokens


class Sampler(Protocol):
  """Samples completions with the weights that it was given last."""

  def update(self, params: Any, version: int) -> None:
    """Takes new weights, and forgets all that was computed with others.

    Args:
      params: variables of the model. They are copied: the train step donates
        its own.
      version: optimizer steps that the weights have taken.
    """
    ...

  def sample(self, asks: Sequence[Ask]) -> Sequence[Sample]:
    """Returns the completion of each ask, in their order.

    Raises:
      ValueError: an ask does not fit the model, or the model computed numbers
        that are not finite.
    """
    ...

  def pause(self) -> None:
    """Stops before the next token; returns when nothing is computed any more.

    `update` may then come while completions are unfinished: they go on with
    the new weights, and each id has the version that drew it.
    """
    ...

  def resume(self) -> None:
    """Goes on after `pause`."""
    ...

  def close(self) -> None:
    """Frees the memory of weights and caches."""
    ...


class ModelOfRun(NamedTuple):
  """What a sampler has to know of a run before its first weights."""

  config: model_config_lib.ModelConfig
  params: Any  # shapes, dtypes and shardings of `Sampler.update`'s params
  tokenizer: tokenizer_lib.Tokenizer
  compute_dtype: str
  max_length: int  # tokens of the longest prompt with its completion
  max_sequences: int  # completions of a rollout batch
  numerics: str  # fast | invariant


MakeSampler = Callable[[ModelOfRun], Sampler]
