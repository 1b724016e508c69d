"""The port of sampling: completions with all that training needs of them.

The engine implements it (`inference/rollouts.py`). Training calls it for
rollouts (`training/rollouts/`) and never imports the engine.
"""

from collections.abc import Sequence
import dataclasses
from typing import Any, NamedTuple, Protocol

import numpy as np

from evals import judges


@dataclasses.dataclass(frozen=True, kw_only=True)
class Ask:
  """A request for completions of one prompt."""

  prompt_ids: tuple[int, ...]
  # 64 bits. Completion i is a function of seed, i, prompt and weights alone.
  seed: int
  max_tokens: int
  num_samples: int = 1
  temperature: float = 1.0  # divides the logits; 0 takes the likeliest token
  stop_ids: tuple[int, ...] = ()  # ids that end the completion, beside EOS
  stop: tuple[str, ...] = ()  # strings that end it; their ids are among `ids`


class Sample(NamedTuple):
  """One completion of an `Ask`."""

  ids: tuple[int, ...]  # as sampled, with the stop token
  text: str  # without the stop token or stop string
  logprobs: np.ndarray  # float32, in the distribution that each id came from
  versions: np.ndarray  # int32, the version of the weights that drew each id
  is_truncated: bool  # ended by max_tokens


class Sampler(Protocol):
  """Samples completions with the weights of its last `update`."""

  def update(self, params: Any, version: int) -> None:
    """Takes new weights, and forgets all results of other weights.

    Args:
      params: variables of the model. They are copied: the train step donates
        its own.
      version: optimizer steps that the weights have taken.
    """
    ...

  def sample(self, asks: Sequence[Ask]) -> Sequence[Sequence[Sample]]:
    """Returns the completions of each ask, in their order.

    Raises:
      ValueError: an ask does not fit the model, or the model computed numbers
        that are not finite.
    """
    ...

  def pause(self) -> None:
    """Stops before the next step; returns when nothing is computed."""
    ...

  def resume(self) -> None:
    """Continues after `pause`."""
    ...

  def open_scorer(self, path: str) -> judges.ScoreFn:
    """Loads a frozen reward model; returns the function that scores answers.

    Raises:
      FileNotFoundError, ValueError: it is absent, or no reward model.
    """
    ...

  def close(self) -> None:
    """Frees the memory of weights and caches."""
    ...
