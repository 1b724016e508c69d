"""Devices that only sample, beside the devices that train."""

import re

import jax
import pytest

from inference import rollouts
from tests.helpers.training import rollout_run
from training.objectives.policy import corrections
from training.rollouts import devices


def experiment(directory, num, **changes):
  return rollout_run.experiment(directory, {'sampler_devices': num, **changes})


def test_the_last_devices_sample_and_the_others_train(tmp_path):
  every = jax.devices()
  shared, apart = (experiment(tmp_path, num) for num in (0, 3))
  assert list(devices.training(shared)) == every
  assert devices.sampling(shared) == (every[0],)
  assert list(devices.training(apart)) == every[:-3]
  assert devices.sampling(apart) == tuple(every[-3:])
  # Devices of an ahead-of-time target.
  assert devices.training(apart, every[:5]) == every[:2]


@pytest.mark.parametrize('num', [8, 9])
def test_one_device_at_least_trains(tmp_path, num):
  made = experiment(tmp_path, num)
  message = (
    f'rollouts.sampler_devices: got {num} of 8 devices, expected at most 7'
  )
  with pytest.raises(ValueError, match=re.escape(message)):
    rollout_run.run(made, tmp_path / 'run')
  assert not (tmp_path / 'run').exists()
  with pytest.raises(ValueError, match='sampler_devices: got -1'):
    rollout_run.run(experiment(tmp_path, -1), tmp_path / 'run')


@pytest.mark.slow
@pytest.mark.parametrize(('num', 'prompts'), [(1, 7), (4, 8)])
def test_a_run_with_devices_that_sample(tmp_path, num, prompts):
  every, seen = jax.devices(), []

  def make_sampler(model):
    sampler = rollouts.make(model)
    sample = sampler.sample

    def watched(asks):
      seen.append(
        {
          device
          for leaf in jax.tree.leaves(sampler.engine.params)
          for device in leaf.devices()
        }
      )
      return sample(asks)

    sampler.sample = watched
    return sampler

  made = rollout_run.experiment(
    tmp_path,
    {'sampler_devices': num, 'staleness': 1, 'inner_epochs': 1},
    objective={'correction': corrections.Correction(level='token')},
  )
  made.data.batch_size = 2 * prompts  # the devices that train divide it
  made.rollouts.num_prompts = prompts
  result, _ = rollout_run.run(made, tmp_path / 'run', make_sampler=make_sampler)
  assert result.exit_code == 0
  assert seen
  assert all(each == set(every[-num:]) for each in seen)
  drawn = rollout_run.records(tmp_path / 'run', 'rollout')
  # The first batch is drawn by the weights that it trains.
  assert drawn[0]['gap_max'] < 1e-3
  assert max(each['gap_max'] for each in drawn[1:]) > 1e-3
