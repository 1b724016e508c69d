"""Experiments by the names that a command line gives them."""

import importlib.util
import pathlib

from training import experiment as experiment_lib


def experiment(place: str) -> experiment_lib.Experiment:
  """Returns the experiment of FILE:VARIANT, or of a FILE without variants.

  Raises:
    ValueError: the file or the variant does not exist.
  """
  path, _, variant = place.partition(':')
  if not pathlib.Path(path).is_file():
    raise ValueError(
      f'experiment: got {place!r}, expected FILE:VARIANT of a file in'
      ' experiments/'
    )
  spec = importlib.util.spec_from_file_location('experiment', path)
  assert spec is not None
  assert spec.loader is not None
  module = importlib.util.module_from_spec(spec)
  spec.loader.exec_module(module)
  return module.get_config(*([variant] if variant else []))
