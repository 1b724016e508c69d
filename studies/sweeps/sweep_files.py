"""Loads the file of a sweep; an error is one line with the fix."""

import pathlib

from checks import expect
from studies.common import load as load_lib
from training import sweep as sweep_lib

DIRECTORY = pathlib.Path(__file__).parents[2] / 'experiments' / 'sweeps'


def load(path: str) -> sweep_lib.Sweep:
  """Returns the sweep of a file.

  Raises:
    ValueError: there is no such file, or it returns no sweep.
  """
  file = pathlib.Path(path)
  if not file.is_file():
    known = sorted(p.name for p in DIRECTORY.glob('[!_]*.py'))
    wanted = f'{file.name.removesuffix(".py")}.py'
    raise ValueError(
      f'--sweep: got {path!r}, expected a file such as these in'
      ' experiments/sweeps:'
      f' {", ".join(known)}{expect.meant(wanted, known)}'
    )
  module = load_lib.module(
    path, '--sweep', 'experiments/sweeps/quickstart_lr.py'
  )
  if not callable(getattr(module, 'get_sweep', None)):
    raise ValueError(
      f'--sweep: got {path!r}, expected a file with a function get_sweep, as'
      ' experiments/sweeps/quickstart_lr.py has'
    )
  try:
    found = module.get_sweep()
  except TypeError as error:
    raise ValueError(
      f'--sweep: got {path!r}, whose get_sweep fails ({error}), expected fields'
      ' of training/sweep.py'
    ) from None
  if not isinstance(found, sweep_lib.Sweep):
    raise ValueError(
      f'--sweep: got {path!r}, whose get_sweep returns'
      f' {type(found).__name__}, expected a training.sweep.Sweep'
    )
  return found
