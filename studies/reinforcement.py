"""Reinforcement over seeds: reward and held-out accuracy, with a figure.

    python -m studies.reinforcement --workdir=runs/reinforced \
      --figure=runs/reinforced.svg
    python -m studies.reinforcement --workdir=runs/reinforced --method=dapo

For each seed, trains the variants `skilled` and `mixed` of experiments/grpo.py,
and continues from them with the method. Prints the accuracy of greedy answers
to all held-out questions before and after, with its standard error, and the
seconds of the runs. The figure has means over the seeds, and the range from the
lowest to the highest. Every run is a workdir below --workdir: the same command
resumes, and another method reuses the runs before it.
"""

from collections.abc import Sequence
import dataclasses
import pathlib
from typing import Any

from absl import app, flags, logging
import numpy as np

from experiments import grpo
from hardware import compilation_cache
from studies.common import figure, quiet_run, study_flags
from training import experiment as experiment_lib
from training.reporting import goodput, metrics

_METHOD = flags.DEFINE_enum(
  'method',
  'grpo',
  grpo.METHODS,
  'Variant of experiments/grpo.py that continues from `mixed`.',
)
NUM_SEEDS = 5
STAGES = 'skilled', 'mixed'  # before reinforcement
_SMOOTHED = 5  # rollout batches that are averaged into one point of a curve
ACCURACY = 'reward/accuracy'


@dataclasses.dataclass(frozen=True, kw_only=True)
class Run:
  """The results in the files of a run with rollouts."""

  steps_E: np.ndarray  # of evaluations
  accuracy_E: np.ndarray  # of greedy answers to held-out questions
  error_E: np.ndarray  # standard error of each
  steps_R: np.ndarray  # of rollout batches
  reward_R: np.ndarray  # mean of each
  seconds: float  # of the whole run, evaluations and compilation included

  @property
  def first(self) -> tuple[float, float]:
    """Returns the accuracy before the first step, and its error."""
    return float(self.accuracy_E[0]), float(self.error_E[0])

  @property
  def last(self) -> tuple[float, float]:
    """Returns the accuracy of the last step, and its error."""
    return float(self.accuracy_E[-1]), float(self.error_E[-1])


def read(workdir: pathlib.Path) -> Run:
  """Returns the curves of a finished run."""
  records = metrics.read(workdir)
  evaluated = _of_kind(records, 'eval')
  rollouts = _of_kind(records, 'rollout')

  def column(rows: Sequence[dict[str, Any]], name: str) -> np.ndarray:
    return np.array([row[name] for row in rows])

  return Run(
    steps_E=column(evaluated, 'step'),
    accuracy_E=column(evaluated, ACCURACY),
    error_E=column(evaluated, f'{ACCURACY}_stderr'),
    steps_R=column(rollouts, 'step'),
    reward_R=column(rollouts, 'reward'),
    seconds=seconds_of(workdir),
  )


def _of_kind(records, kind: str) -> list[dict[str, Any]]:
  """Returns the records of a kind by step; of equal steps, the later record."""
  found = {r['step']: r for r in records if r['kind'] == kind}
  return [found[step] for step in sorted(found)]


def seconds_of(workdir: pathlib.Path) -> float:
  """Returns the seconds of a run, over all of its starts."""
  return goodput.life(goodput.read(workdir)).running


def measure(workdir: pathlib.Path, method: str, seed: int) -> Run:
  """Trains or resumes all stages of a seed; returns the last one.

  Raises:
    SystemExit: a signal stopped a run.
  """
  skilled, mixed = (workdir / f'{name}_{seed}' for name in STAGES)
  _train(dataclasses.replace(grpo.get_config('skilled'), seed=seed), skilled)
  experiment = grpo.get_config(f'mixed:{skilled / "frozen"}')
  _train(dataclasses.replace(experiment, seed=seed), mixed)
  experiment = grpo.get_config(f'{method}:{mixed / "frozen"}')
  place = workdir / f'{method}_{seed}'
  _train(
    dataclasses.replace(
      experiment,
      seed=seed,
      num_steps=study_flags.STEPS.value or experiment.num_steps,
    ),
    place,
  )
  return read(place)


def _train(
  experiment: experiment_lib.Experiment, workdir: pathlib.Path
) -> None:
  if quiet_run.run(experiment, workdir).exit_code:
    raise SystemExit('stopped by a signal; the same command resumes')


def panels(runs: Sequence[Run], method: str) -> list[figure.Panel]:
  """Returns the curves of all seeds: mean, lowest and highest."""
  rewards_SR = np.stack([run.reward_R for run in runs])
  size = min(_SMOOTHED, rewards_SR.shape[1])
  whole = rewards_SR.shape[1] // size * size
  smooth_SR = rewards_SR[:, :whole].reshape(len(runs), -1, size).mean(axis=2)
  steps_R = runs[0].steps_R[:whole].reshape(-1, size).mean(axis=1)
  accuracy_SE = np.stack([run.accuracy_E for run in runs])
  label = f'{method}: mean and range of {len(runs)} seeds'
  return [
    figure.Panel(
      title='sampled answers to training questions',
      x_label='step',
      y_label='reward: share of right answers',
      lines={label: _band(steps_R, smooth_SR)},
      y_limits=(0.0, 1.0),
    ),
    figure.Panel(
      title='greedy answers to held-out questions',
      x_label='step',
      y_label='accuracy',
      lines={label: _band(runs[0].steps_E, accuracy_SE)},
      y_limits=(0.0, 1.0),
    ),
  ]


def _band(x: np.ndarray, y_SN: np.ndarray) -> figure.Line:
  return figure.Line(
    x=x.tolist(),
    y=y_SN.mean(axis=0).tolist(),
    low=y_SN.min(axis=0).tolist(),
    high=y_SN.max(axis=0).tolist(),
  )


def line_of(seed: int, run: Run, seconds_before: float) -> str:
  """Returns the row of a seed in the table."""
  (before, error_before), (after, error_after) = run.first, run.last
  return (
    f'seed {seed}: held-out accuracy {before:.1%} +- {error_before:.1%} ->'
    f' {after:.1%} +- {error_after:.1%}; seconds: {seconds_before:.0f} before,'
    f' reinforcement {run.seconds:.0f}'
  )


def main(argv: list[str]) -> None:
  """Trains all seeds, prints a line for each, and draws the figure."""
  if len(argv) > 1:
    raise app.UsageError(f'got unknown arguments {argv[1:]}, expected flags')
  workdir = pathlib.Path(study_flags.required_workdir())
  # Orbax logs many lines about saves that went well.
  logging.set_verbosity(logging.ERROR)
  method = _METHOD.value
  # The runs of all seeds have the same programs.
  if directory := compilation_cache.directory_of(None):
    compilation_cache.use(directory)
  runs = []
  for seed in range(study_flags.SEEDS.value or NUM_SEEDS):
    runs.append(measure(workdir, method, seed))
    before = sum(seconds_of(workdir / f'{name}_{seed}') for name in STAGES)
    print(line_of(seed, runs[-1], before), flush=True)
  last_S = np.array([run.last[0] for run in runs])
  print(
    f'{method}, {len(runs)} seeds: held-out accuracy at the end'
    f' {last_S.mean():.1%}, lowest {last_S.min():.1%}'
  )
  if study_flags.FIGURE.value:
    figure.save(study_flags.FIGURE.value, panels(runs, method))


if __name__ == '__main__':
  app.run(main)
