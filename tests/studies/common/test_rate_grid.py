"""A grid of learning rates: its file, and what the next start trains."""

import math

import pytest

from studies.common import rate_grid


class Trained:
  """Stands for a model: its loss is a formula, and its runs are counted."""

  runs: list = []

  def __init__(self, experiment):
    self._width = experiment.width

  def loss(self, rate, seed, batches, eval_batches):
    del batches, eval_batches
    self.runs.append((self._width, math.log2(rate), seed))
    return abs(math.log2(rate) + 6) + seed


class Experiment:
  """Stands for an experiment: the fields that a grid sets."""

  def __init__(self, width):
    self.width = width
    self.optimizer = self
    self.is_checked = False

  def validate(self):
    self.is_checked = True


@pytest.fixture
def counted(monkeypatch):
  monkeypatch.setattr(rate_grid, 'Model', Trained)
  monkeypatch.setattr(rate_grid, '_batches', lambda *_: ((), ()))
  monkeypatch.setattr(Trained, 'runs', [])
  return Trained.runs


def grid(path, rates=(-7, -6), seeds=(0, 1)):
  made = []

  def experiment_of(kind, width):
    del kind
    made.append(Experiment(width))
    return made[-1]

  return rate_grid.Grid(
    experiment_of=experiment_of, rates=rates, seeds=seeds, num_steps=3,
    kept=path / 'losses.jsonl',
  ), made  # fmt: skip


def test_the_next_start_trains_the_missing_runs_only(tmp_path, counted):
  first, made = grid(tmp_path)
  lines = []
  losses = first.measure([('mup', 64)], tell=lines.append)
  assert losses == {('mup', 64, -7): [1.0, 2.0], ('mup', 64, -6): [0.0, 1.0]}
  assert len(counted) == len(lines) == 4
  assert 'mup        64 2^-7  seed 0: 1.0000' in lines
  (experiment,) = made
  # Losses are of the rate that a run is given, so the config's must be 1.
  assert experiment.peak_lr == 1.0
  assert experiment.num_steps == 3
  assert experiment.is_checked

  counted.clear()
  again, made = grid(tmp_path)
  assert again.measure([('mup', 64)]) == losses
  assert not made
  assert not counted

  wider, _ = grid(tmp_path, rates=(-8, -7, -6))
  wider.measure([('mup', 64), ('standard', 64)])
  assert counted[:2] == [(64, -8.0, 0), (64, -8.0, 1)]
  assert len(counted) == 2 + 6
