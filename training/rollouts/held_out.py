"""Held-out prompts: the rewards of greedy answers, in place of a loss.

It has the interface of `data.batches.EvalBatches` where a run describes its
data.
"""

from collections.abc import Callable, Iterator
import dataclasses
import math
import threading
from typing import Any

import numpy as np

from data.examples import prompts as prompts_lib
from evals import sampling
from training import state as state_lib
from training.rollouts import (
  prompt_source,
  rollout_config,
)
from training.rollouts.dialogues import dialogue as dialogue_lib
from training.rollouts.draws import drawing, scoring


@dataclasses.dataclass(frozen=True, kw_only=True)
class HeldOut:
  """Answers the evaluation prompts by the likeliest tokens, and scores them."""

  config: rollout_config.RolloutConfig
  prompts: prompts_lib.Prompts
  sampler: sampling.Sampler
  turn: threading.Lock  # held while the sampler works
  weights_of: Callable[[state_lib.TrainState], Any]
  stop_ids: tuple[int, ...]
  stop: tuple[str, ...]
  dialogue: dialogue_lib.Dialogue | None = None  # set with an environment

  @property
  def source(self) -> prompt_source.PromptSource:
    """Returns the evaluation prompts."""
    return prompt_source.PromptSource(self.prompts)

  def __iter__(self) -> Iterator[dict[str, np.ndarray]]:
    """Yields no rows: the answers are not known before they are sampled."""
    return iter(())

  def evaluate(
    self, step: int, state: state_lib.TrainState
  ) -> dict[str, float]:
    """Returns the mean `reward` of the answers, and further figures.

    Each part of the reward is `reward/NAME`, with its standard error.
    """
    asked = self.prompts.prompts[: self.config.eval_prompts or None]
    asks = [
      sampling.Ask(
        prompt_ids=prompt.ids,
        seed=0,
        max_tokens=self.config.max_tokens,
        temperature=0.0,
        stop_ids=self.stop_ids,
        stop=self.stop,
      )
      for prompt in asked
    ]
    with self.turn:
      self.sampler.update(self.weights_of(state), step)
      found = drawing.episodes_of(
        self.sampler, asked, asks, self.config.environment, self.dialogue
      )
    scored = scoring.score(self.config, found)
    lengths_N = np.asarray([each.num_sampled for each in found], np.float64)
    values = {
      'reward': float(scored.total_N.mean()),
      'length': float(lengths_N.mean()),
      'truncated': float(np.mean([each.is_truncated for each in found])),
    }
    for name, count in scored.failures.items():
      values[f'failed/{name}'] = count / len(found)
    for name, values_N in scored.parts.items():
      values[f'reward/{name}'] = float(values_N.mean())
      values[f'reward/{name}_stderr'] = float(
        values_N.std(ddof=min(1, len(values_N) - 1)) / math.sqrt(len(values_N))
      )
    return values


def report(values: dict[str, float]) -> str:
  """Returns the figures of `evaluate` as text."""
  parts = [
    f'{name.removeprefix("reward/")} {value:.4f} +-'
    f' {values[f"{name}_stderr"]:.4f}'
    for name, value in values.items()
    if name.startswith('reward/') and not name.endswith('_stderr')
  ]
  return (
    f'held-out {", ".join(parts) or "answers"}; length {values["length"]:.1f},'
    f' truncated {values["truncated"]:.1%}'
  )
