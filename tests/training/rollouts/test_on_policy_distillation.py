"""A student that learns from a teacher on answers of its own."""

import dataclasses

import jax
import jax.numpy as jnp
import pytest

from models import layout, transformer
from tests.helpers import frozen_dirs
from tests.helpers.training import rollout_run
from training.objectives import distillation
from training.rollouts import rollout_config


def _measured(weight=0.0):
  return rollout_config.RewardConfig(
    reward=rollout_run.few_high_bytes, weight=weight
  )


@pytest.fixture(scope='module')
def student(tmp_path_factory):
  """An experiment whose teacher has other weights."""
  directory = tmp_path_factory.mktemp('student')
  made = rollout_run.experiment(
    directory,
    {'rewards': (_measured(),), 'num_prompts': 8, 'inner_epochs': 1},
    num_steps=24,
    eval_every_steps=12,
    ema_decay=0.0,
  )
  made = dataclasses.replace(
    made,
    checkpoint=dataclasses.replace(made.checkpoint, every_steps=9),
  )
  config = dataclasses.replace(made.model, init_std=0.3)
  params = transformer.Transformer(config).init(
    jax.random.key(1), jnp.zeros((1, 1), jnp.int32)
  )
  params, config = layout.unstack(params, config)
  frozen_dirs.write(directory / 'teacher', params=params, config=config)
  return dataclasses.replace(
    made,
    objective=distillation.Distillation(
      teacher=str(directory / 'teacher'), divergence='reverse'
    ),
  )


@pytest.fixture(scope='module')
def whole(student, tmp_path_factory):
  """The workdir of an uninterrupted run, and its text."""
  workdir = tmp_path_factory.mktemp('whole')
  result, text = rollout_run.run(student, workdir)
  assert result.exit_code == 0
  return workdir, text


@pytest.mark.slow
def test_the_student_becomes_like_its_teacher(whole):
  steps = rollout_run.records(whole[0], 'train')
  assert steps[-1]['divergence'] < 0.8 * steps[0]['divergence']


@pytest.mark.slow
def test_a_verifier_measures_and_trains_nothing(whole):
  workdir, text = whole
  for kind in ('rollout', 'eval'):
    for each in rollout_run.records(workdir, kind):
      assert each['reward'] == each['reward/few_high_bytes'] > 0
  assert 'no signal' not in text


@pytest.mark.slow
def test_a_resumed_run_has_the_bits_of_a_whole_one(student, whole, tmp_path):
  rollout_run.run(student, tmp_path, stop_after=9)
  rollout_run.run(student, tmp_path)
  for kind in ('train', 'rollout', 'eval'):
    assert rollout_run.records(tmp_path, kind) == (
      rollout_run.records(whole[0], kind)
    )


def test_softened_distributions_need_no_softened_samples(student):
  dataclasses.replace(
    student,
    objective=dataclasses.replace(student.objective, temperature=2.0),
  ).validate()


@pytest.mark.parametrize(
  ('changes', 'message'),
  [
    ({'rewards': (_measured(1.0),)}, 'got weights with an objective that'),
    ({'drops_groups_without_signal': True}, 'every answer teaches'),
  ],
)
def test_rewards_that_would_train_nothing_are_refused(
  student, changes, message
):
  with pytest.raises(ValueError, match=message):
    rollout_run.with_rollouts(student, **changes).validate()
