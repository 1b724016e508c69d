"""Warnings in words, penalties of length, and answers that verifiers failed."""

import numpy as np
import pytest

from evals import sampling
from training.rollouts import (
  diagnostics,
  rewards,
  rollout_config,
  rows,
)
from training.rollouts.dialogues import episodes
from training.rollouts.draws import drawing, scoring

_FINE = {
  'reward': 0.5,
  'without_signal': 0.2,
  'entropy': 1.0,
  'length': 10.0,
  'truncated': 0.0,
  'reward/held_out': 0.5,
  'failed/number': 0.0,
}
_BATCHES = 10  # that a warning looks at


def _warned(first, later=None, num_later=_BATCHES):
  """Returns the warnings after one rollout batch and then others."""
  config = rollout_config.RolloutConfig(
    rewards=(
      rollout_config.RewardConfig(reward=len, name='proxy'),
      rollout_config.RewardConfig(reward=len, weight=0.0, name='held_out'),
    )
  )
  said = []
  watch = diagnostics.Watch(config, said.append)
  for step, values in enumerate([first] * _BATCHES + [later] * num_later):
    watch.see(step, values)
  return said


@pytest.mark.parametrize(
  ('change', 'words'),
  # The means of ten batches, of which the last ones have the change.
  [
    ({'without_signal': 0.95}, 'same reward, which teaches nothing'),
    ({'entropy': 0.05}, 'the entropy fell from 1 to 0.05 nats'),
    ({'length': 30.0}, 'answers grew from 10 to 22'),
    ({'failed/number': 0.2}, 'number failed on 12% of the answers'),
    ({'reward': 0.9, 'reward/held_out': 0.2}, 'held_out, which is measured'),
  ],
)
def test_what_goes_wrong_is_said_once(change, words):
  said = _warned(_FINE, _FINE | change, num_later=3 * _BATCHES)
  assert len(said) == 1
  assert words in said[0]


@pytest.mark.parametrize(
  'change',
  [
    {},
    # Low entropy is no collapse where nearly all answers are right.
    {'entropy': 0.05, 'reward': 0.95, 'reward/held_out': 0.95},
    # Both fall: the policy got worse, and gamed nothing.
    {'reward': 0.3, 'reward/held_out': 0.2},
  ],
)
def test_what_is_fine_is_not_said(change):
  assert not _warned(_FINE, _FINE | change, num_later=3 * _BATCHES)


def _episode(num_ids, *, is_truncated=False):
  return episodes.Episode(
    prompt_ids=(5, 6),
    ids=tuple(range(num_ids)),
    text='x',
    logprobs=np.full(num_ids, -0.5, np.float32),
    versions=np.zeros(num_ids, np.int32),
    is_truncated=is_truncated,
  )


def test_long_answers_lose_reward_linearly_up_to_the_limit():
  config = rollout_config.RolloutConfig(
    max_tokens=10, overlong_tokens=4, overlong_penalty=0.5
  )
  found = scoring.score(config, [_episode(n) for n in (1, 6, 7, 8, 10)])
  np.testing.assert_allclose(
    found.parts['overlong'], [0, 0, -0.125, -0.25, -0.5]
  )
  np.testing.assert_array_equal(found.total_N, found.parts['overlong'])


@pytest.mark.parametrize('masks', [False, True])
def test_truncated_answers_train_nothing_where_they_are_masked(masks):
  arrays = rows.rows_of(
    [_episode(3), _episode(3, is_truncated=True)],
    row_length=6,
    pad_id=0,
    names={'advantages'},
    rewards_N=np.ones(2),
    advantages_N=np.array([1.0, -1.0], np.float32),
    masks_truncated=masks,
  )
  # The targets of both prompts' ends and of their ids but the last.
  assert arrays['weights'][0].tolist() == [0, 1, 1, 1, 0, 0]
  expected = [0] * 6 if masks else [0, 1, 1, 1, 0, 0]
  assert arrays['weights'][1].tolist() == expected
  assert arrays['advantages'][1].tolist() == [0, -1, -1, -1, 0, 0]


class _Sampler:
  """Gives each prompt as many answers of one id as are asked for."""

  def sample(self, asks):
    sample = sampling.Sample(
      (1,), 'x', np.zeros(1, np.float32), np.zeros(1, np.int32), False
    )
    return [[sample] * ask.num_samples for ask in asks]


def test_failures_of_verifiers_are_a_share_of_all_answers_drawn():
  def failing(found):
    return rewards.Rewards([0.0] * len(found), ['took too long'] * 2)

  config = rollout_config.RolloutConfig(
    rewards=(
      rollout_config.RewardConfig(reward=failing),
      rollout_config.RewardConfig(reward=lambda e: [1.0] * len(e), name='one'),
    ),
    num_prompts=2,
    drops_groups_without_signal=True,
    max_refills=1,
  )
  prompt = type('Prompt', (), {'ids': (3,), 'record': {}, 'messages': ()})()
  prompts = type(
    'Prompts', (), {'shuffled': lambda self, first, n, seed: [prompt] * n}
  )()
  drawer = drawing.Drawer(
    config=config,
    prompts=prompts,
    group_size=4,
    seed=0,
    stop_ids=(),
    stop=(),
  )
  drawn = drawer.draw(_Sampler(), 0, 0)
  # Two of eight answers, in each of two rounds; the other part counts none.
  assert drawn.failed == {'failing': 0.25}
