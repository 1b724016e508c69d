"""RolloutConfig: what an experiment refuses, and what it records."""

import dataclasses
import json

import numpy as np
import pytest

from data import data_config
from tests.helpers.training import tiny_experiment
from training import experiment as experiment_lib
from training.objectives import advantages, token_loss
from training.rollouts import rollout_config
from training.rollouts.dialogues import environments, episodes, tools


def length(found):
  return [float(len(each.ids)) for each in found]


def of(**changes) -> experiment_lib.Experiment:
  base = tiny_experiment.make()
  rollouts = rollout_config.RolloutConfig(
    rewards=(rollout_config.RewardConfig(reward=length),),
    num_prompts=4,
    max_tokens=8,
  )
  return dataclasses.replace(
    base,
    data=dataclasses.replace(
      base.data, examples='prompts', packing='none', batch_size=8, row_length=16
    ),
    objective=token_loss.TokenLoss(
      policy_scale=1.0,
      advantages=advantages.Advantages(baseline='group', group_size=4),
    ),
    rollouts=dataclasses.replace(rollouts, **changes),
  )


def test_an_experiment_with_rollouts_is_recorded_with_its_rewards():
  found = of()
  found.validate()
  (part,) = json.loads(json.dumps(found.to_dict()))['rollouts']['rewards']
  assert part['reward'].endswith('test_rollout_config.length')
  assert found.rollouts is not None
  assert found.rollouts.rewards[0].label == 'length'


def test_the_steps_of_a_rollout_batch_cover_it_once_per_inner_epoch():
  config = of(inner_epochs=3).rollouts
  assert config is not None
  assert config.steps_per_rollout(4, 8) == 2 * 3


@pytest.mark.parametrize(
  ('changes', 'message'),
  [
    ({'num_prompts': 0}, 'rollouts.num_prompts: got 0, expected at least 1'),
    ({'num_prompts': 3}, 'expected a multiple of 2 prompts'),
    ({'environment': 3}, 'rollouts.environment: got 3 without open, schemas'),
    (
      {'environment': environments.ToolUse(tools=(tools.Calculator(),))},
      'rollouts.max_tokens: got 264, with tool tokens, expected less than',
    ),
    ({'max_tokens': 16}, 'rollouts.max_tokens: got 16, expected less than'),
    ({'temperature': 0.0}, 'rollouts.temperature: got 0.0, expected'),
    ({'overlong_tokens': 9}, 'at most rollouts.max_tokens = 8'),
    ({'overlong_penalty': -1.0}, 'rollouts.overlong_penalty: got -1.0'),
    ({'numerics': 'exact'}, "rollouts.numerics: got 'exact'"),
    ({'rewards': (length,)}, 'expected RewardConfigs'),
    (
      {'rewards': (rollout_config.RewardConfig(reward=length),) * 2},
      'got several called length',
    ),
    (
      {'rewards': (rollout_config.RewardConfig(reward=length, weight=0.0),)},
      'rollouts.rewards: got weight 0 for all of them',
    ),
    ({'rewards': ()}, 'rollouts.rewards: got none, expected one part at least'),
  ],
)
def test_values_that_no_run_can_use_are_refused(changes, message):
  with pytest.raises(ValueError, match=message.replace('(', r'\(')):
    of(**changes).validate()


def test_prompts_and_rollouts_need_each_other():
  found = of()
  for broken in (
    dataclasses.replace(found, rollouts=None),
    dataclasses.replace(
      found, data=dataclasses.replace(found.data, examples=data_config.TEXT)
    ),
  ):
    with pytest.raises(ValueError, match='data.examples: got'):
      broken.validate()


def test_packed_rows_are_refused():
  found = of()
  found.data.packing = 'first_fit'
  with pytest.raises(ValueError, match='data.packing: got first_fit'):
    found.validate()


def test_an_episode_has_one_log_probability_and_version_per_id():
  fields: dict = {
    'prompt_ids': (1,),
    'ids': (2, 3),
    'text': '',
    'is_truncated': False,
  }
  good = np.zeros(2, np.float32), np.zeros(2, np.int32)
  found = episodes.Episode(**fields, logprobs=good[0], versions=good[1])
  assert found.num_sampled == 2
  with pytest.raises(ValueError, match='got 1 logprobs of 2 ids'):
    episodes.Episode(**fields, logprobs=good[0][:1], versions=good[1])
  with pytest.raises(ValueError, match='got 3 trained of 2 ids'):
    episodes.Episode(
      **fields,
      logprobs=good[0],
      versions=good[1],
      trained=np.ones(3, bool),
    )


def test_a_policy_with_dropout_is_refused():
  made = of()
  made.model = dataclasses.replace(made.model, dropout_rate=0.1)
  with pytest.raises(ValueError, match='model.dropout_rate: got 0.1 with conf'):
    made.validate()
