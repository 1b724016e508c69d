"""Stores of sweeps whose trials are not trained."""

import pathlib

from studies.sweeps import store as store_lib
from tests.helpers.training import tiny_experiment
from training import sweep as sweep_lib

SPACES = {
  'optimizer.peak_lr': sweep_lib.LogUniform(1e-4, 1e-2),
  'model.num_layers': sweep_lib.Integer(1, 3),
}


def sweep(**fields) -> sweep_lib.Sweep:
  """Returns a random search over two fields."""
  return sweep_lib.Sweep(
    **{
      'name': 'a',
      'parameters': SPACES,
      'strategy': 'random',
      'num_trials': 8,
      'num_seeds': 2,
      **fields,
    }
  )


def store(
  directory: pathlib.Path, wanted: sweep_lib.Sweep, token: str = 't', **fields
) -> store_lib.Store:
  """Opens the store of a sweep in a directory."""
  return store_lib.Store(
    wanted,
    tiny_experiment.make(**fields),
    url=store_lib.default_url(directory),
    workdir_token=token,
    num_evaluations=3,
  )
