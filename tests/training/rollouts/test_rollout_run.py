"""Runs that sample what they train on: resume, reports and refusals."""

import json
import re

import numpy as np
import pytest

from tests.helpers.training import rollout_run
from training.objectives import advantages

KINDS = 'train', 'eval', 'rollout'


@pytest.fixture(scope='module')
def whole(tmp_path_factory):
  """An uninterrupted run: its directory and its text."""
  directory = tmp_path_factory.mktemp('whole')
  made = rollout_run.experiment(directory)
  result, text = rollout_run.run(made, directory / 'run')
  assert (result.step, result.exit_code) == (8, 0)
  return directory, text


@pytest.mark.slow
def test_a_run_reports_rewards_samples_and_held_out_answers(whole):
  directory, text = whole
  drawn = rollout_run.records(directory / 'run', 'rollout')
  assert [each['step'] for each in drawn] == [0, 4]
  for each in drawn:
    assert each['reward'] == pytest.approx(each['reward/few_high_bytes'])
    assert each['staleness'] == 0
    assert each['gap_max'] < 1e-3
    assert each['entropy'] > 0
  assert 'rollout 0: reward' in text
  assert re.search(r'step 8: held-out few_high_bytes \d', text)
  # Rewards are no loss, neither in the figures nor in the words.
  assert 'validation loss' not in text
  for each in rollout_run.records(directory / 'run', 'eval'):
    assert 'loss' not in each
    assert each['reward'] == pytest.approx(each['reward/few_high_bytes'])
  assert 'sampling the rows to train on' in text
  lines = (directory / 'run' / 'samples.jsonl').read_text().splitlines()
  rows = [json.loads(line) for line in lines]
  assert {row['step'] for row in rows} == {0, 4}
  assert len(rows) == 2 * 4 * 2  # rollout batches, groups shown, answers
  assert rows[0]['parts'].keys() == {'few_high_bytes'}


def test_the_first_step_on_a_rollout_batch_has_ratio_one(whole):
  directory, _ = whole
  steps = rollout_run.records(directory / 'run', 'train')
  assert steps[0]['ratio'] == pytest.approx(1.0, abs=1e-6)
  # The second epoch trains a policy that has moved.
  assert abs(steps[2]['ratio'] - 1.0) > 1e-6


@pytest.mark.slow
@pytest.mark.parametrize('stop_after', [2, 3, 4])
def test_a_resumed_run_has_the_bits_of_a_whole_one(whole, tmp_path, stop_after):
  # 2 and 3 are between the steps of a rollout batch, which is in the
  # checkpoint; after 4, the next one is.
  directory, _ = whole
  made = rollout_run.experiment(tmp_path)
  made.data.path = rollout_run.experiment(directory).data.path
  stopped, _ = rollout_run.run(made, tmp_path / 'run', stop_after=stop_after)
  assert stopped.step == stop_after
  rollout_run.run(made, tmp_path / 'run')
  for kind in KINDS:
    assert rollout_run.records(tmp_path / 'run', kind) == rollout_run.records(
      directory / 'run', kind
    )
  samples = [p / 'run' / 'samples.jsonl' for p in (directory, tmp_path)]
  assert samples[0].read_text() == samples[1].read_text()


@pytest.mark.slow
def test_a_sampler_that_dies_loses_nothing(whole, tmp_path):
  directory, _ = whole
  made = rollout_run.experiment(tmp_path)
  made.data.path = rollout_run.experiment(directory).data.path
  from inference import rollouts

  def dying(model):
    sampler = rollouts.make(model)
    sample, calls = sampler.sample, []

    def once(asks):
      calls.append(asks)
      if len(calls) == 3:  # an evaluation is between the two rollouts
        raise RuntimeError('killed')
      return sample(asks)

    sampler.sample = once
    return sampler

  with pytest.raises(RuntimeError, match='killed'):
    rollout_run.run(made, tmp_path / 'run', make_sampler=dying)
  rollout_run.run(made, tmp_path / 'run')
  for kind in KINDS:
    assert rollout_run.records(tmp_path / 'run', kind) == rollout_run.records(
      directory / 'run', kind
    )


def test_a_run_without_a_sampler_is_refused(tmp_path):
  made = rollout_run.experiment(tmp_path)
  with pytest.raises(ValueError, match='config.rollouts: got no sampler'):
    rollout_run.run(made, tmp_path / 'run', make_sampler=None)


def test_a_policy_that_is_its_own_proximal_takes_one_step(tmp_path):
  made = rollout_run.experiment(tmp_path, objective={'proximal': 'own'})
  with pytest.raises(ValueError, match='objective.proximal: got own with 4'):
    made.validate()


def test_the_temperature_of_sampling_is_that_of_the_loss(tmp_path):
  made = rollout_run.experiment(tmp_path, {'temperature': 0.5})
  with pytest.raises(ValueError, match='objective.temperature: got 1.0'):
    made.validate()


@pytest.mark.slow
def test_at_another_temperature_sampler_and_trainer_agree(tmp_path):
  made = rollout_run.experiment(
    tmp_path,
    {'temperature': 0.5},
    objective={'temperature': 0.5},
    num_steps=1,
  )
  rollout_run.run(made, tmp_path / 'run')
  (drawn,) = rollout_run.records(tmp_path / 'run', 'rollout')
  assert drawn['gap_max'] < 1e-3


def test_a_reward_that_is_not_finite_names_its_part(tmp_path):
  def broken(found):
    return [float('nan')] * len(found)

  made = rollout_run.experiment(tmp_path)
  assert made.rollouts is not None
  made.rollouts.rewards[0].reward = broken
  with pytest.raises(ValueError, match='reward broken: got nan for the answer'):
    rollout_run.run(made, tmp_path / 'run')


@pytest.mark.slow
def test_groups_of_equal_rewards_are_replaced_within_a_bound(tmp_path):
  def same(found):
    return [1.0] * len(found)

  made = rollout_run.experiment(
    tmp_path,
    {'drops_groups_without_signal': True, 'max_refills': 2},
    num_steps=1,
  )
  assert made.rollouts is not None
  made.rollouts.rewards[0].reward = same
  rollout_run.run(made, tmp_path / 'run')
  (drawn,) = rollout_run.records(tmp_path / 'run', 'rollout')
  assert (drawn['rounds'], drawn['without_signal']) == (3, 1.0)


@pytest.mark.slow
def test_rewards_rise_where_they_can_be_learnt(tmp_path):
  made = rollout_run.experiment(
    tmp_path,
    {'num_prompts': 8, 'inner_epochs': 1},
    objective={
      'proximal': 'own',
      'advantages': advantages.Advantages(baseline='group', group_size=4),
    },
    num_steps=20,
    eval_every_steps=0,
  )
  made.data.batch_size = 32
  rollout_run.run(made, tmp_path / 'run')
  rewards = [
    each['reward'] for each in rollout_run.records(tmp_path / 'run', 'rollout')
  ]
  # Three batches are 576 ids: their mean has an error of 0.02.
  assert np.mean(rewards[-3:]) > np.mean(rewards[:3]) + 0.08
