"""A branch of a trunk ends with the bits of an uninterrupted run."""

import dataclasses
import json
import pathlib

import numpy as np
import pytest

from frozen import format as frozen_format
from storage import file_names
from tests.helpers.training import tiny_run
from training import experiment as experiment_lib
from training.checkpoints import branch
from training.optimizer import chain
from training.reporting import metrics

_BRANCH_STEP, _NUM_STEPS = 8, 12


@pytest.fixture(scope='module')
def trunk(tmp_path_factory):
  """Returns a finished run of constant rate, and its text."""
  directory = tmp_path_factory.mktemp('trunk')
  (directory / 'corpus').mkdir()
  corpus = tiny_run.write_corpus(directory / 'corpus')
  experiment = _trunk(corpus)
  result, _ = tiny_run.run(experiment, directory / 'run')
  assert result.step == _BRANCH_STEP
  return directory / 'run', experiment


def _trunk(corpus: str) -> experiment_lib.Experiment:
  return tiny_run.experiment(
    corpus,
    num_steps=_BRANCH_STEP,
    optimizer=chain.OptimizerConfig(
      schedule='constant', warmup_steps=2, end_lr=1e-4
    ),
  )


def _decayed(experiment: experiment_lib.Experiment):
  optimizer = dataclasses.replace(
    experiment.optimizer,
    schedule='wsd',
    decay_steps=_NUM_STEPS - _BRANCH_STEP,
    decay_shape='sqrt',
  )
  return dataclasses.replace(
    experiment, num_steps=_NUM_STEPS, optimizer=optimizer
  )


@pytest.mark.slow
def test_a_branch_has_the_bits_of_an_uninterrupted_run(trunk, tmp_path):
  workdir, experiment = trunk
  longer = _decayed(experiment)
  branched, whole = tmp_path / 'branch', tmp_path / 'whole'
  branch.branch(workdir, _BRANCH_STEP, branched)
  before = {p: p.read_bytes() for p in workdir.rglob('*') if p.is_file()}
  result, said = tiny_run.run(longer, branched)
  assert result.step == _NUM_STEPS
  assert 'optimizer.schedule' in said  # the change is told
  tiny_run.run(longer, whole)
  a, b = (
    frozen_format.read_whole(place / file_names.FROZEN).params
    for place in (branched, whole)
  )
  _assert_equal(a, b)
  assert _last_loss(branched) == _last_loss(whole)
  # The steps that the branch took itself are those behind the trunk's.
  steps = [r['step'] for r in metrics.read(branched) if r['kind'] == 'train']
  assert steps == list(range(_BRANCH_STEP + 1, _NUM_STEPS + 1))
  after = {p: p.read_bytes() for p in workdir.rglob('*') if p.is_file()}
  assert after == before


def _assert_equal(a, b):
  import jax

  leaves = zip(jax.tree.leaves(a), jax.tree.leaves(b), strict=True)
  for got, expected in leaves:
    np.testing.assert_array_equal(np.asarray(got), np.asarray(expected))


def _last_loss(workdir: pathlib.Path) -> float:
  return [r['loss'] for r in metrics.read(workdir) if r['kind'] == 'eval'][-1]


@pytest.mark.slow
def test_a_step_without_a_checkpoint_is_refused(trunk, tmp_path):
  workdir, _ = trunk
  with pytest.raises(ValueError, match='--step: got 7, expected a checkpoint'):
    branch.branch(workdir, 7, tmp_path / 'branch')
  assert not (tmp_path / 'branch').exists()


def test_a_place_that_is_taken_is_refused(trunk, tmp_path):
  workdir, _ = trunk
  with pytest.raises(ValueError, match='got a path that exists'):
    branch.branch(workdir, _BRANCH_STEP, tmp_path)


def test_a_directory_without_a_run_is_refused(tmp_path):
  with pytest.raises(FileNotFoundError, match='run.json'):
    branch.branch(tmp_path / 'nothing', 1, tmp_path / 'branch')


def test_a_damaged_checkpoint_is_not_copied(trunk, tmp_path):
  workdir, _ = trunk
  broken = tmp_path / 'broken'
  branch.branch(workdir, _BRANCH_STEP, broken)
  root = broken / file_names.CHECKPOINTS / str(_BRANCH_STEP)
  (root / file_names.PROGRESS).write_text(json.dumps({'step': 8}))
  with pytest.raises(ValueError, match=file_names.PROGRESS):
    branch.branch(broken, _BRANCH_STEP, tmp_path / 'branch')
  assert not (tmp_path / 'branch').exists()


def test_another_seed_is_refused_in_a_branch(trunk, tmp_path):
  workdir, experiment = trunk
  place = branch.branch(workdir, _BRANCH_STEP, tmp_path / 'branch')
  other = dataclasses.replace(_decayed(experiment), seed=1)
  with pytest.raises(ValueError, match='holds another run: got seed = 1'):
    tiny_run.run(other, place)
