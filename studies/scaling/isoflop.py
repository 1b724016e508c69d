"""Trains an IsoFLOP grid and fits the scaling law to it.

    python -m studies.scaling.isoflop --config=experiments/scaling/bytes.py \
      --workdir=runs/isoflop --figure=runs/isoflop.svg

For each size of the experiment one run with constant learning rate, the trunk,
is trained up to the longest of its runs. Where a run of the grid begins to
decay, the trunk is branched (`training/checkpoints/branch.py`) and the branch
takes the last steps. Every run is a workdir below --workdir: the same command
resumes after an interruption, and finished runs are not repeated. Then it
writes points.csv, which `studies.scaling.fit` reads too, and prints fits with
intervals, parabolas beside the law with their bias, and the error of the
largest budget predicted from the others.

--scale=0.1 makes all budgets a tenth, to try it. A text that is one file is cut
in two: its last twentieth is evaluated.
"""

import dataclasses
import math
import pathlib
from typing import Any

from absl import app, flags, logging
import rich.console

from checks import expect, path_flags
from data import sources
from frozen import seals
from hardware import compilation_cache, host_memory
from models import flops
from storage import atomic, file_names
from studies.common import load as load_lib
from studies.scaling import fit, points as points_lib
from training import experiment as experiment_lib, run as run_lib
from training.checkpoints import branch, workdir as workdir_lib
from training.reporting import metrics

POINTS = 'points.csv'
_FIELDS = 'SIZES', 'BUDGETS', 'DECAY_SHARE', 'RATIOS', 'get_config'
_EVALUATED_SHARE = 0.05  # of a text that is one file


@dataclasses.dataclass(frozen=True, kw_only=True)
class Run:
  """One model of the grid: the trunk up to `branch_step`, then a decay."""

  experiment: experiment_lib.Experiment  # with the decay
  num_params: int
  budget: float  # FLOPs, nominal
  branch_step: int

  @property
  def name(self) -> str:
    """Returns the name of its workdir."""
    return f'{self.experiment.name}-{self.experiment.num_steps}'

  @property
  def num_tokens(self) -> int:
    """Returns the tokens that it is trained on."""
    data = self.experiment.data
    return self.experiment.num_steps * data.batch_size * data.row_length


@dataclasses.dataclass(frozen=True, kw_only=True)
class Grid:
  """The runs of each size, shortest first; the trunks by name."""

  trunks: dict[str, experiment_lib.Experiment]
  runs: dict[str, list[Run]]

  def __len__(self) -> int:
    """Returns the number of models."""
    return sum(map(len, self.runs.values()))

  @property
  def num_steps(self) -> int:
    """Returns the steps that all trunks and branches take together."""
    return sum(
      of[-1].branch_step
      + sum(run.experiment.num_steps - run.branch_step for run in of)
      for of in self.runs.values()
    )


def load(path: str) -> Any:
  """Returns the module of an experiment with a grid.

  Raises:
    ValueError: there is no such file, or it has no grid.
  """
  module = load_lib.module(path, '--config', 'experiments/scaling/bytes.py')
  missing = [name for name in _FIELDS if not hasattr(module, name)]
  if missing:
    raise ValueError(
      f'--config: got {path!r} without {", ".join(missing)}, expected a grid as'
      ' in experiments/scaling/bytes.py'
    )
  return module


def make_grid(module: Any, scale: float = 1.0, text: str = '') -> Grid:
  """Returns the grid of an experiment.

  Args:
    module: with SIZES, BUDGETS, DECAY_SHARE, RATIOS and get_config.
    scale: factor of all budgets.
    text: path of text files, with '{split}'; '': the experiment's own data.

  Raises:
    ValueError: no run is left, or a budget has too few sizes.
  """
  trunks, runs = {}, {}
  for size in module.SIZES:
    trunk = module.get_config(str(size))
    if text:
      trunk.data.open_source, trunk.data.path = sources.text_files, text
    num_params = flops.num_params(trunk.model)
    of_size = [
      _run(trunk, num_params, scale * budget, module.DECAY_SHARE)
      for budget in sorted(module.BUDGETS)
    ]
    low, high = module.RATIOS
    kept = [r for r in of_size if low <= r.num_tokens / num_params <= high]
    if kept:
      trunks[trunk.name], runs[trunk.name] = trunk, kept
  grid = Grid(trunks=trunks, runs=runs)
  for budget in module.BUDGETS:
    count = sum(
      run.budget == scale * budget for of in runs.values() for run in of
    )
    expect.at_least(
      f'sizes at {scale * budget:.3g} FLOPs',
      count,
      4,
      'choose another --scale or BUDGETS, more SIZES or wider RATIOS',
    )
  return grid


def _run(trunk, num_params, budget, decay_share) -> Run:
  """Returns the run of a size and a budget, in whole steps."""
  batch = trunk.data.batch_size * trunk.data.row_length
  num_steps = max(round(budget / (6 * num_params * batch)), 1)
  decay_steps = max(round(decay_share * num_steps), 1)
  run = dataclasses.replace(
    trunk,
    num_steps=num_steps,
    optimizer=dataclasses.replace(
      trunk.optimizer,
      schedule='wsd',
      decay_steps=decay_steps,
      end_lr=0.0,
      decay_shape='sqrt',
    ),
  )
  return Run(
    experiment=run,
    num_params=num_params,
    budget=budget,
    branch_step=num_steps - decay_steps,
  )


def measure(grid: Grid, workdir: pathlib.Path) -> points_lib.Points | None:
  """Trains the unfinished runs; returns None if a signal came."""
  measured = []
  for i, (name, runs) in enumerate(grid.runs.items(), 1):
    for run in runs:
      place = workdir / run.name
      loss = finished(run, place)
      is_new = loss is None
      if is_new:
        if not _train(grid.trunks[name], run, workdir):
          return None
        loss = finished(run, place)
        assert loss is not None, f'{place} ended without an evaluation'
      print(
        f'size {i}/{len(grid.runs)}  N {run.num_params:9,}'
        f'  C {run.budget:.2e}  D {run.num_tokens:10,}'
        f'  {run.experiment.num_steps:5} steps  loss {loss:.4f}'
        f'{"" if is_new else "  (was there)"}',
        flush=True,
      )
      measured.append((run.num_params, run.num_tokens, loss, run.budget))
  return points_lib.make(*zip(*measured, strict=True))


def finished(run: Run, place: pathlib.Path) -> float | None:
  """Returns the loss of a run, nats per token; None: it is not finished.

  Raises:
    ValueError: the run in `place` was trained with other values.
  """
  if not (place / file_names.METRICS).exists():
    return None
  last = [r for r in metrics.read(place) if r['kind'] == 'eval'][-1:]
  if not last or last[0]['step'] != run.experiment.num_steps:
    return None
  changes = [
    change
    for change in workdir_lib.changes(place, run.experiment)
    # Chosen at the start, see training/planning/choices.py.
    if not change.startswith(('execution.', 'num_microbatches'))
  ]
  if changes:
    raise ValueError(
      f'--workdir: got {place}, which was trained with other values'
      f' ({"; ".join(changes)}), expected the values of --config; use another'
      ' --workdir'
    )
  return last[0]['loss']


def _train(trunk, run: Run, workdir: pathlib.Path) -> bool:
  """Trains the trunk to the branch, then the branch; False: a signal came."""
  place, root = workdir / run.name, workdir / f'{trunk.name}-trunk'
  if not place.exists():
    steps = seals.steps(root / file_names.CHECKPOINTS)
    if steps and steps[-1] > run.branch_step and run.branch_step not in steps:
      # A budget that was added later. Uninterrupted, the run has the same bits.
      print(f'{root} is past step {run.branch_step}: {place} starts at step 0')
    else:
      longer = dataclasses.replace(trunk, num_steps=run.branch_step)
      if not _run_to_end(longer, root):
        return False
      branch.branch(root, run.branch_step, place)
  return _run_to_end(run.experiment, place)


def _run_to_end(
  experiment: experiment_lib.Experiment, place: pathlib.Path
) -> bool:
  quiet = rich.console.Console(quiet=True)
  return not run_lib.run(experiment, place, quiet).exit_code


def cut_text(path: str, workdir: pathlib.Path) -> str:
  """Returns a path with '{split}'; a single file is cut into two files first.

  Raises:
    ValueError: the file cannot be read, or another text was cut here before.
  """
  if not path or '{split}' in path:
    return path
  try:
    text = pathlib.Path(path).read_text(encoding='utf-8')
  except (OSError, UnicodeDecodeError) as error:
    raise ValueError(
      f'--path: got {path!r} ({error}), expected a text file, or a path with'
      ' {split} in it'
    ) from None
  end = text.rfind('\n', 0, math.floor(len(text) * (1 - _EVALUATED_SHARE))) + 1
  end = end or math.floor(len(text) * (1 - _EVALUATED_SHARE))
  directory = workdir / 'text'
  directory.mkdir(parents=True, exist_ok=True)
  for split, part in (('train', text[:end]), ('validation', text[end:])):
    file = directory / f'{split}.txt'
    if file.exists() and file.read_text(encoding='utf-8') != part:
      raise ValueError(
        f'--path: got {path!r}, expected the text that {directory} was cut'
        ' from; use another --workdir'
      )
    atomic.write_text(file, part)
  return str(directory / '{split}.txt')


def _define_flags() -> None:
  path_flags.DEFINE_path(
    'config', None, 'Experiment with a grid: experiments/scaling/bytes.py.',
    required=True,
  )  # fmt: skip
  path_flags.DEFINE_path(
    'workdir', None, 'Directory that keeps the runs, to resume from.',
    required=True,
  )  # fmt: skip
  path_flags.DEFINE_path(
    'path',
    '',
    "A text file, or files with '{split}' in the path; empty: the data of the"
    ' experiment.',
  )
  flags.DEFINE_float('scale', 1.0, 'Factor of all budgets.', lower_bound=1e-6)
  flags.DEFINE_integer('resamples', 200, 'Bootstrap resamples.', lower_bound=2)
  path_flags.DEFINE_path('figure', '', 'A .svg or .png file; none if empty.')


def main(argv: list[str]) -> int:
  """Trains the grid, writes its points and prints their analysis."""
  if len(argv) > 1:
    raise app.UsageError(f'got unknown arguments {argv[1:]}, expected flags')
  # Orbax logs many lines, warnings included, about successful saves.
  logging.set_verbosity(logging.ERROR)
  host_memory.reuse_freed_memory()
  values = flags.FLAGS
  try:
    if directory := compilation_cache.directory_of(None):
      compilation_cache.use(directory)
    workdir = pathlib.Path(values.workdir)
    text = cut_text(values.path, workdir)
    grid = make_grid(load(values.config), values.scale, text)
    sizes = [runs[0].num_params for runs in grid.runs.values()]
    print(
      f'{len(grid)} models of {min(sizes):,} to {max(sizes):,} parameters,'
      f' {grid.num_steps:,} steps'
    )
    points = measure(grid, workdir)
    if points is None:
      print('stopped; the same command resumes from here')
      return 1
    points_lib.write(workdir / POINTS, points)
    fit.analyse(points, values.resamples, [])
    if values.figure:
      fit.draw(values.figure, points)
  except ValueError as error:
    print(f'error: {error}')
    return 1
  return 0


if __name__ == '__main__':
  # Not at import: other commands have flags of these names.
  _define_flags()
  app.run(main)
