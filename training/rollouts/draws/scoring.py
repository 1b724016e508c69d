"""Scoring: the reward of each episode, part by part, and the groups' signal."""

from collections.abc import Mapping, Sequence
import dataclasses

import numpy as np

from training.rollouts import rollout_config
from training.rollouts.dialogues import episodes as episodes_lib

OVERLONG = 'overlong'


@dataclasses.dataclass(frozen=True, kw_only=True)
class Scored:
  """The rewards of some episodes, float64 [N]."""

  total_N: np.ndarray  # weighted sums, from which advantages are made
  parts: Mapping[str, np.ndarray]  # without their weights, by name
  # Answers whose reward is 0 because a verifier or a judge failed, by name of
  # the parts that count them.
  failures: Mapping[str, int] = dataclasses.field(default_factory=dict)


def score(
  config: rollout_config.RolloutConfig,
  episodes: Sequence[episodes_lib.Episode],
) -> Scored:
  """Returns the weighted sum of the parts of the reward, and each part.

  Where no part trains, each counts 1: their sum ranks checkpoints.

  Raises:
    ValueError: a part gives another number of rewards, or one that is not
      finite.
  """
  total_N = np.zeros(len(episodes))
  parts, failures = {}, {}
  for part in config.rewards:
    given = part.reward(episodes)
    values_N = np.asarray(given, np.float64)
    # Counted by `rewards.Rewards`; a plain function counts no failures.
    if (failed := getattr(given, 'failures', None)) is not None:
      failures[part.label] = int(failed)
    if values_N.shape != (len(episodes),):
      raise ValueError(
        f'reward {part.label}: got an array of shape {values_N.shape} for'
        f' {len(episodes)} episodes, expected a number for each'
      )
    if not np.isfinite(values_N).all():
      at = int(np.flatnonzero(~np.isfinite(values_N))[0])
      raise ValueError(
        f'reward {part.label}: got {values_N[at]} for the answer'
        f' {episodes[at].text[:200]!r}, expected a finite number; mend the'
        ' reward: one such number would spoil its whole group'
      )
    parts[part.label] = values_N
    weight = part.weight if config.is_rewarded else 1.0
    total_N += weight * values_N
  for i, episode in enumerate(episodes):
    total_N[i] += sum(episode.turn_rewards.values())
  if config.overlong_tokens:
    parts[OVERLONG] = overlong(config, episodes)
    total_N += parts[OVERLONG]
  return Scored(total_N=total_N, parts=parts, failures=failures)


def overlong(
  config: rollout_config.RolloutConfig,
  episodes: Sequence[episodes_lib.Episode],
) -> np.ndarray:
  """Returns the soft overlong punishment of DAPO, at most 0.

  Reference: arXiv:2503.14476, equation 13. It grows from 0 to
  -overlong_penalty over the last `overlong_tokens` before `max_tokens`.
  """
  lengths_N = np.asarray([each.num_sampled for each in episodes])
  first = config.max_tokens - config.overlong_tokens
  over_N = np.clip((lengths_N - first) / config.overlong_tokens, 0.0, 1.0)
  return -config.overlong_penalty * over_N


def has_signal(total_N: np.ndarray, group_size: int) -> np.ndarray:
  """Returns for each group whether its rewards differ, bool [G].

  A single answer has no other to differ from, and always has a signal.
  """
  total_GR = total_N.reshape(-1, group_size)
  if group_size == 1:
    return np.ones(len(total_GR), bool)
  return np.ptp(total_GR, axis=1) > 1e-9
