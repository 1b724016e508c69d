"""Trials one by one: every seed is a run of its own, as train.py would do it.

Each run has a workdir, `trials/POINT/seedSEED/`, and resumes from its
checkpoint bit for bit. With a pruner, all seeds of a trial are trained up to an
evaluation before any seed continues: the pruner sees means over seeds.
"""

from collections.abc import Callable, Mapping
import math
import pathlib
import statistics

from studies.common import quiet_run
from studies.comparison import run_values
from studies.sweeps import claims, points, store as store_lib
from training import experiment as experiment_lib
from training.reporting import metrics, reporter

# (point, seed, step) -> nothing; the seed is None if all are trained at once
Progress = Callable[[int, int | None, int], None]


class Stopped(Exception):
  """Raised if a signal asks the process to stop; everything is saved."""

  def __init__(self, exit_code: int):
    super().__init__(exit_code)
    self.exit_code = exit_code


def directory(claim: claims.Claim, seed: int) -> pathlib.Path:
  """Returns the workdir of one seed of a trial."""
  return claim.directory / f'seed{seed}'


def run_trial(
  claim: claims.Claim,
  store: store_lib.Store,
  base: experiment_lib.Experiment,
  progress: Progress,
) -> None:
  """Trains a trial to its end and records it.

  Raises:
    Stopped: a signal came; the trial is left running, to be resumed.
  """
  sweep = store.sweep
  seeds = points.seeds(base, sweep, claim.params)
  try:
    experiments = {
      seed: points.experiment_of(base, claim.params, seed) for seed in seeds
    }
    steps = points.evaluations(experiments[seeds[0]])
    rungs = steps if sweep.pruner != 'none' else steps[-1:]
    for step in rungs:
      values = {}
      for seed, experiment in experiments.items():
        progress(claim.point, seed, step)
        values[seed] = _advance(
          experiment, directory(claim, seed), sweep.metric, step
        )
      if rungs != steps:
        _report_earlier(store, claim, seeds, steps)
      if settle(store, claim, values, steps, step):
        return
  except (ValueError, OSError) as error:
    store.finish(claim.trial, state='errored', note=one_line(error))


def _report_earlier(store, claim, seeds, steps) -> None:
  """Records the evaluations of a complete trial before its last one."""
  found = [scores(directory(claim, s), store.sweep.metric) for s in seeds]
  for i, step in enumerate(steps[:-1]):
    values = [each[step] for each in found if step in each]
    if len(values) == len(seeds):
      store.report(claim.trial, i + 1, statistics.mean(values))


def settle(
  store: store_lib.Store,
  claim: claims.Claim,
  values: Mapping[int, float],
  steps: list[int],
  step: int,
) -> bool:
  """Records an evaluation of a trial; returns whether the trial is finished.

  Args:
    values: the metric by seed; not finite if the seed diverged.
    steps: steps of the trial's evaluations.
    step: step of this evaluation.
  """
  seeds = dict(values)
  diverged = [seed for seed, value in seeds.items() if not math.isfinite(value)]
  if diverged:
    store.finish(
      claim.trial,
      state='complete',
      value=store_lib.worst(store.sweep.direction),
      seeds={s: v for s, v in seeds.items() if math.isfinite(v)},
      note=f'diverged before step {step}: seed'
      f' {", ".join(map(str, diverged))} of {len(seeds)}',
    )
    return True
  mean = statistics.mean(seeds.values())
  is_pruned = store.report(claim.trial, steps.index(step) + 1, mean)
  if step == steps[-1]:
    store.finish(claim.trial, state='complete', value=mean, seeds=seeds)
    return True
  if is_pruned:
    note = f'pruned at step {step} of {steps[-1]}'
    store.finish(claim.trial, state='pruned', seeds=seeds, note=note)
  return is_pruned


def _advance(
  experiment: experiment_lib.Experiment,
  workdir: pathlib.Path,
  metric: str,
  step: int,
) -> float:
  """Trains a run up to an evaluation; returns the metric there.

  The metric is NaN if the run diverged.
  """
  found = scores(workdir, metric)
  if step not in found:
    try:
      result = quiet_run.run(experiment, workdir, stop_after=step)
    except reporter.NonFiniteError:
      return math.nan
    if result.exit_code:
      raise Stopped(result.exit_code)
    found = scores(workdir, metric)
  if step not in found:
    raise ValueError(
      f'metric: got no {metric} at step {step}, expected one at each'
      ' evaluation that counts; a speed needs a report after the first one, see'
      ' config.log_every_steps'
    )
  return found[step]


def scores(workdir: pathlib.Path, metric: str) -> dict[int, float]:
  """Returns a metric of a run at its evaluations, by step.

  Raises:
    ValueError: evaluations have no such value.
  """
  return run_values.by_step(metrics.read(workdir), metric, 'metric')


def one_line(error: Exception) -> str:
  """Returns the text of an error as one line."""
  return ' '.join(str(error).split()) or type(error).__name__
