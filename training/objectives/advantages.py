"""Advantages of sampled completions: rewards less a baseline.

Completions of one prompt are a group. A baseline lowers the variance of the
policy gradient and, if it does not depend on the completion itself, keeps its
mean. These are host functions: they stamp numbers that `token_loss.TokenLoss`
reads.
"""

import dataclasses

import numpy as np

from checks import expect

BASELINES = 'none', 'group', 'leave_one_out', 'batch'
SCALES = 'none', 'group', 'batch'
_EPSILON = 1e-4  # added to a deviation of rewards, as in TRL and verl's GRPO


@dataclasses.dataclass(frozen=True, kw_only=True)
class Advantages:
  """The recipe: REINFORCE, RLOO and GRPO differ here."""

  # The baseline. none: 0, REINFORCE. group: the mean of the group, GRPO
  # (arXiv:2402.03300). leave_one_out: the mean of the others, RLOO
  # (arXiv:2402.14740). batch: less the mean of the whole batch.
  baseline: str = 'none'
  group_size: int = 1  # completions of each prompt
  # The divisor of advantages. group: the deviation of the rewards of their
  # group, GRPO. batch: the deviation of the batch's advantages, REINFORCE++
  # (arXiv:2501.03262). none: Dr. GRPO (arXiv:2503.20783).
  scale: str = 'none'

  def validate(self) -> None:
    """Raises ValueError for a recipe that ignores all rewards."""
    name = 'objective.advantages'
    expect.one_of(f'{name}.baseline', self.baseline, BASELINES)
    expect.one_of(f'{name}.scale', self.scale, SCALES)
    expect.at_least(f'{name}.group_size', self.group_size, 1)
    if self.group_size > 1:
      return
    of_groups = 'group', 'leave_one_out'
    needs = (
      f'baseline = {self.baseline}'
      if self.baseline in of_groups
      else 'scale = group'
      if self.scale in of_groups
      else ''
    )
    if needs:
      raise ValueError(
        f'{name}.group_size: got 1 with {needs}, expected at least 2: a'
        ' completion that is compared with itself has the advantage 0; sample'
        ' more completions, or take baseline = none'
      )

  def __call__(self, rewards_N: np.ndarray) -> np.ndarray:
    """Returns the advantage of each completion, float32 [N].

    Args:
      rewards_N: rewards; the rewards of one group lie side by side.

    Raises:
      ValueError: the rewards are not whole groups.
    """
    rewards_N = np.asarray(rewards_N, np.float64)
    if rewards_N.ndim != 1 or rewards_N.size % self.group_size:
      raise ValueError(
        f'rewards: got an array of shape {rewards_N.shape}, expected whole'
        f' groups of {self.group_size}, side by side'
      )
    size = self.group_size
    rewards_GR = rewards_N.reshape(-1, size)
    advantages_GR = rewards_GR
    if self.baseline == 'batch':
      advantages_GR = rewards_GR - rewards_GR.mean()
    elif self.baseline != 'none':
      mean_G1 = rewards_GR.mean(axis=1, keepdims=True)
      advantages_GR = rewards_GR - mean_G1
    if self.baseline == 'leave_one_out':
      # r - (sum - r) / (n - 1) is n / (n - 1) times r - mean.
      advantages_GR = advantages_GR * size / (size - 1)
    if self.scale == 'batch':
      advantages_GR = advantages_GR / (advantages_GR.std() + _EPSILON)
    if self.scale == 'group':
      deviation_G1 = rewards_GR.std(axis=1, ddof=1, keepdims=True)
      advantages_GR = advantages_GR / (deviation_G1 + _EPSILON)
    return advantages_GR.reshape(-1).astype(np.float32)
