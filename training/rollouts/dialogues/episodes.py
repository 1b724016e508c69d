"""Episodes: prompts that a policy answered, token by token.

    prompts -> Sampler -> episodes -> rewards -> rows of arrays -> train step

An episode holds the policy's tokens as ids. Its text is for rewards and for
people, and is never tokenised again.
"""

from collections.abc import Mapping, Sequence
import dataclasses
from typing import Any

import numpy as np


@dataclasses.dataclass(frozen=True, kw_only=True)
class Episode:
  """One completion of a prompt, or several turns of one conversation."""

  prompt_ids: tuple[int, ...]
  # The ids after the prompt: sampled ids, with the stop token, and between the
  # turns of the policy the ids of tool results.
  ids: tuple[int, ...]
  text: str  # of the sampled ids, without the stop token or stop string
  # float32, one per id: log-probability in the distribution that the id was
  # drawn from, after temperature, penalties and filters; 0 for ids of tools.
  logprobs: np.ndarray
  # int32, one per id: optimizer steps that the policy had taken when it drew
  # the id.
  versions: np.ndarray
  is_truncated: bool  # it ended at a limit of tokens, not with a stop token
  # Fields of the prompt's record in the data source, such as its answer.
  record: Mapping[str, Any] = dataclasses.field(default_factory=dict)
  # The conversation before the first answer; empty for a prompt of text.
  messages: Sequence[Mapping[str, Any]] = ()
  # bool, one per id: sampled by the policy (True) or given by a tool. None: the
  # policy sampled all of them.
  trained: np.ndarray | None = None
  # Rewards that an environment gave before the end, by the index of the last id
  # of the turn.
  turn_rewards: Mapping[int, float] = dataclasses.field(default_factory=dict)

  def __post_init__(self):
    """Raises ValueError for arrays that do not have one entry per id."""
    lengths = {'logprobs': len(self.logprobs), 'versions': len(self.versions)}
    if self.trained is not None:
      lengths['trained'] = len(self.trained)
    for name, length in lengths.items():
      if length != len(self.ids):
        raise ValueError(
          f'episode: got {length} {name} of {len(self.ids)} ids, expected one'
          ' per id'
        )
    if not self.prompt_ids or not self.ids:
      raise ValueError(
        f'episode: got {len(self.prompt_ids)} ids of the prompt and'
        f' {len(self.ids)} after it, expected at least one of each'
      )

  @property
  def is_sampled(self) -> np.ndarray:
    """Returns whether the policy sampled each id, bool."""
    if self.trained is None:
      return np.ones(len(self.ids), bool)
    return np.asarray(self.trained, bool)

  @property
  def num_sampled(self) -> int:
    """Returns the number of ids that the policy sampled."""
    return int(self.is_sampled.sum())
