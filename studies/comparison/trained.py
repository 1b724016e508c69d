"""Sides that are experiments: trains each of them with every seed.

Each run has a workdir below --workdir, named after the experiment: the same
command resumes after an interruption, and another comparison reuses finished
runs.
"""

from collections.abc import Callable, Sequence
import pathlib

import numpy as np

from studies.common import figure, load, quiet_run
from studies.comparison import sides
from training import experiment as experiment_lib
from training.reporting import metrics

_SMOOTHED_STEPS = 10  # averaged into one point of a curve


class Stopped(Exception):
  """Raised if a signal asks the process to stop; everything is saved."""


def is_experiment(place: str) -> bool:
  """Returns whether a side is FILE, or FILE:VARIANT, of Python."""
  return place.partition(':')[0].endswith('.py')


def train(
  places: Sequence[str],
  *,
  seeds: int,
  num_steps: int,
  workdir: pathlib.Path,
  tell: Callable[[str], None],
) -> dict[str, list[pathlib.Path]]:
  """Trains experiments side by side; returns the workdirs of each.

  Args:
    places: FILE:VARIANT of each experiment.
    seeds: number of seeds of each experiment: 0, 1, ...
    num_steps: steps of each run; 0: as the experiment says.
    workdir: directory of all runs.
    tell: receives a line for each run.

  Raises:
    Stopped: a signal came; the same command resumes.
    ValueError: a file, a variant or a value is wrong.
  """
  for place in places:  # a wrong place is refused before any training
    _experiment(place, 0, num_steps).validate()
  # Seed by seed: an interrupted comparison has the same seeds on all sides.
  found: dict[str, list[pathlib.Path]] = {place: [] for place in places}
  for seed in range(seeds):
    for place in places:
      experiment = _experiment(place, seed, num_steps)
      run = workdir / f'{experiment.name}-seed{seed}'
      if quiet_run.run(experiment, run).exit_code:
        raise Stopped
      last = [r for r in metrics.read(run) if r['kind'] == 'eval'][-1]
      figures = ', '.join(
        f'{last[name]:.4f} {unit}'
        for name, unit in (
          ('loss', 'nats/token'),
          ('bits_per_byte', 'bits/byte'),
        )
        if name in last
      )
      tell(f'{place} seed {seed}: {figures}')
      found[place].append(run)
  return found


def _experiment(
  place: str, seed: int, num_steps: int
) -> experiment_lib.Experiment:
  experiment = load.experiment(place, 'side')
  experiment.seed = seed
  experiment.num_steps = num_steps or experiment.num_steps
  return experiment


def curves(compared: Sequence[sides.Side]) -> figure.Panel:
  """Returns the training loss of each side: mean and range over seeds."""
  lines = {}
  for side in compared:
    losses = [_losses(workdir) for workdir in side.workdirs]
    length = min(map(len, losses))
    width = min(_SMOOTHED_STEPS, length)
    points_SX = np.stack([_averaged(each[:length], width) for each in losses])
    lines[side.name] = figure.Line(
      x=((np.arange(points_SX.shape[1]) + 0.5) * width).tolist(),
      y=points_SX.mean(axis=0).tolist(),
      low=points_SX.min(axis=0).tolist(),
      high=points_SX.max(axis=0).tolist(),
    )
  most = max(len(side.values) for side in compared)
  return figure.Panel(
    title=f'training loss, mean and range of {most} seeds',
    x_label='step',
    y_label='nats per token',
    lines=lines,
  )


def _losses(workdir: pathlib.Path) -> list[float]:
  return [r['loss'] for r in metrics.read(workdir) if r['kind'] == 'train']


def _averaged(losses: list[float], width: int) -> np.ndarray:
  """Returns means of `width` steps each, without an incomplete last one."""
  num_points = len(losses) // width
  return np.reshape(losses[: num_points * width], (-1, width)).mean(axis=1)
