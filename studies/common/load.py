"""Experiments and other files of values, by the paths that flags give."""

import importlib.util
import pathlib
from typing import Any

from checks import paths
from training import experiment as experiment_lib


def module(path: str, flag: str, example: str) -> Any:
  """Runs a Python file and returns its module.

  Args:
    path: path of the file.
    flag: the flag that names the file, for errors.
    example: an example of a valid file, for errors.

  Raises:
    ValueError: there is no such file, or it cannot be run.
  """
  expected = f'expected a Python file, as {example}'
  path = paths.expanded(flag, path)
  spec = importlib.util.spec_from_file_location('loaded_file', path)
  if not pathlib.Path(path).is_file() or spec is None or spec.loader is None:
    raise ValueError(f'{flag}: got {path!r}, {expected}')
  found = importlib.util.module_from_spec(spec)
  try:
    spec.loader.exec_module(found)
  except (SyntaxError, ImportError, AttributeError, NameError) as error:
    raise ValueError(
      f'{flag}: got {path!r}, which cannot be loaded ({error}), {expected}'
    ) from None
  return found


def experiment(
  place: str, flag: str = '--experiments'
) -> experiment_lib.Experiment:
  """Returns the experiment of FILE:VARIANT, or of a FILE without variants.

  Args:
    place: FILE or FILE:VARIANT, as a flag gives it.
    flag: the flag that gives it, for errors.

  Raises:
    ValueError: the file or the variant does not exist.
  """
  path, _, variant = place.partition(':')
  found = module(path, flag, 'experiments/quickstart.py, and :VARIANT')
  return found.get_config(*([variant] if variant else []))
