"""One side of a comparison: runs of one experiment that differ in their seed.

A side is written as

    runs/a,runs/b      workdirs of train.py
    runs/many          a directory whose subdirectories are workdirs
    runs/lr:3          trial 3 of a sweep; runs/lr:best is its best one
    FILE:VARIANT    an experiment, which `trained.py` trains first
"""

from collections.abc import Mapping, Sequence
import dataclasses
import json
import pathlib
from typing import Any

from frozen import run_record
from storage import file_names
from studies.comparison import run_values
from studies.sweeps import claims
from studies.sweeps.reporting import results

_BEST = 'best'
# Fields in which the runs of a side may differ.
_FREE = ('seed', 'name')


@dataclasses.dataclass(frozen=True, kw_only=True)
class Side:
  """The runs of one side."""

  name: str  # as it was written
  values: Mapping[int, float]  # the metric by seed
  step: int  # of the last evaluation, the same in all runs
  config: Mapping[str, Any]  # by dotted name, without `_FREE`
  workdirs: tuple[pathlib.Path, ...]


def read(place: str, metric: str) -> Side:
  """Returns the runs of a side.

  Args:
    place: workdirs with commas between them, a directory of workdirs, or a
      trial of a sweep.

  Raises:
    ValueError: there is no run, a run has no evaluation or no such metric, two
      runs have one seed, or they differ in more than their seed.
  """
  return of_workdirs(place, _workdirs(place), metric)


def of_workdirs(
  name: str, workdirs: Sequence[pathlib.Path], metric: str
) -> Side:
  """Returns the side of these runs; see `read` for errors."""
  values: dict[int, float] = {}
  steps, configs = [], []
  for workdir in workdirs:
    step, value = run_values.last(workdir, metric)
    config = run_record.read(workdir)['config']
    seed = int(config['seed'])
    if seed in values:
      raise ValueError(
        f'{workdir}: got a second run of seed {seed}, expected each seed once;'
        ' leave one out'
      )
    values[seed] = value
    steps.append(step)
    configs.append(_flat({k: v for k, v in config.items() if k not in _FREE}))
    if differing := config_differences(configs[0], configs[-1]):
      raise ValueError(
        f'{workdir}: got a run with {differing[0]} (as in {workdirs[0]}, and'
        ' here), expected runs of one side to differ in their seed only; make'
        ' it a side of its own'
      )
    if step != steps[0]:
      raise ValueError(
        f'{workdir}: got a last evaluation at step {step}, expected step'
        f' {steps[0]} as in {workdirs[0]}; train it to its end'
      )
  return Side(
    name=name,
    values=values,
    step=steps[0],
    config=configs[0],
    workdirs=tuple(workdirs),
  )


def config_differences(
  first: Mapping[str, Any], second: Mapping[str, Any]
) -> list[str]:
  """Returns the fields that differ, each as `NAME: A | B`."""
  return [
    f'{name}: {first.get(name)} | {second.get(name)}'
    for name in sorted(first.keys() | second.keys())
    if first.get(name) != second.get(name)
  ]


def _flat(config: Mapping[str, Any], prefix: str = '') -> dict[str, Any]:
  found = {}
  for name, value in config.items():
    path = f'{prefix}{name}'
    found |= (
      _flat(value, f'{path}.')
      if isinstance(value, Mapping) and value
      else {path: value}
    )
  return found


def _workdirs(place: str) -> list[pathlib.Path]:
  found = []
  for each in place.split(','):
    path = _of_trial(each) or pathlib.Path(each)
    if (path / file_names.RUN).exists():
      found.append(path)
      continue
    below = sorted(p.parent for p in path.glob(f'*/{file_names.RUN}'))
    if not below:
      sweep = (path / claims.TRIALS).is_dir()
      hint = f'; for a trial of this sweep, write {each}:3' if sweep else ''
      raise ValueError(
        f'{each}: got a directory without runs, expected a workdir of train.py,'
        f' a directory of workdirs, or a trial of a sweep{hint}'
      )
    found += below
  return found


def _of_trial(place: str) -> pathlib.Path | None:
  """Returns the directory of a trial of a sweep; None for other places."""
  root, _, trial = place.rpartition(':')
  if not root or not (trial.isdigit() or trial == _BEST):
    return None
  number = _best_of(pathlib.Path(root)) if trial == _BEST else int(trial)
  trials = pathlib.Path(root) / claims.TRIALS
  path = trials / f'{number:04d}'
  if not path.is_dir():
    count = len(list(trials.glob('[0-9]*')))
    raise ValueError(
      f'{place}: got no trial {number}, expected one of the {count} trials of'
      f' {root}, counted from 0'
      if count
      else f'{place}: got {root}, which is no --workdir of sweep.py; expected'
      ' one, as in runs/lr:3'
    )
  return path


def _best_of(root: pathlib.Path) -> int:
  path = root / results.JSON
  try:
    best = json.loads(path.read_text())['best']
  except (OSError, ValueError, KeyError) as error:
    raise ValueError(
      f'{root}:{_BEST}: got no results of a sweep ({error}), expected'
      f' {path}; run the sweep to its end'
    ) from None
  if best is None:
    raise ValueError(
      f'{root}:{_BEST}: got a sweep without a best trial, expected one that is'
      ' complete and finite'
    )
  return best
