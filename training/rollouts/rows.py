"""Rows: episodes as the arrays that objectives read."""

from collections.abc import Collection, Sequence

import numpy as np

from training.rollouts.dialogues import episodes as episodes_lib

Arrays = dict[str, np.ndarray]
_FLOATS = 'rewards', 'advantages', 'sampler_logprobs'


def rows_of(
  episodes: Sequence[episodes_lib.Episode],
  *,
  row_length: int,
  pad_id: int,
  names: Collection[str],
  rewards_N: np.ndarray,
  advantages_N: np.ndarray,
  masks_truncated: bool = False,
) -> Arrays:
  """Returns a row for each episode: its prompt, then its ids.

  Args:
    row_length: T; a prompt with its ids has at most T + 1 tokens.
    names: arrays to make besides the arrays of all rows: some of `rewards`,
      `advantages`, `sampler_logprobs` and `versions`.
    rewards_N: one reward per episode, put at the last id that the policy
      sampled.
    advantages_N: one per episode, put on all ids that the policy sampled.
    masks_truncated: whether truncated episodes have weight 0.

  Raises:
    ValueError: an episode is longer than a row.
  """
  shape = len(episodes), row_length
  arrays: Arrays = {
    'tokens': np.full(shape, pad_id, np.int32),
    'targets': np.full(shape, pad_id, np.int32),
    'positions': np.zeros(shape, np.int32),
    'segment_ids': np.zeros(shape, np.int32),
    'weights': np.zeros(shape, np.float32),
    'versions': np.zeros(shape, np.int32),
  } | {name: np.zeros(shape, np.float32) for name in _FLOATS}
  for b, episode in enumerate(episodes):
    ids = np.asarray([*episode.prompt_ids, *episode.ids], np.int32)
    used = len(ids) - 1
    if used > row_length:
      raise ValueError(
        f'episode: got {len(ids)} tokens, expected at most data.row_length + 1'
        f' = {row_length + 1}; lengthen the rows'
      )
    arrays['tokens'][b, :used] = ids[:-1]
    arrays['targets'][b, :used] = ids[1:]
    arrays['positions'][b, :used] = np.arange(used)
    arrays['segment_ids'][b, :used] = 1
    # The target at place t is id t + 1.
    said = slice(len(episode.prompt_ids) - 1, used)
    is_sampled = episode.is_sampled
    is_trained = not (masks_truncated and episode.is_truncated)
    arrays['weights'][b, said] = is_sampled if is_trained else 0
    arrays['advantages'][b, said] = is_sampled * advantages_N[b]
    arrays['sampler_logprobs'][b, said] = is_sampled * episode.logprobs
    arrays['versions'][b, said] = episode.versions
    first = len(episode.prompt_ids) - 1
    for place, reward in episode.turn_rewards.items():
      arrays['rewards'][b, first + place] += reward
    last = int(np.flatnonzero(is_sampled)[-1]) if is_sampled.any() else 0
    arrays['rewards'][b, first + last] += rewards_N[b]
  wanted = {'tokens', 'targets', 'positions', 'segment_ids', 'weights'} | set(
    names
  )
  return {name: arrays[name] for name in arrays if name in wanted}
