"""Runs of experiments that print nothing, as studies start them."""

import dataclasses
import pathlib
from typing import Any

import rich.console

from training import experiment as experiment_lib, run as run_lib


def run(
  experiment: experiment_lib.Experiment,
  workdir: pathlib.Path,
  *,
  stop_after: int | None = None,
) -> run_lib.Result:
  """Trains or resumes in a workdir, as `train.py` does.

  Args:
    stop_after: see `training.run.run`, which has the errors, too.
  """
  return run_lib.run(
    experiment,
    workdir,
    rich.console.Console(quiet=True),
    stop_after=stop_after,
    make_sampler=_make_sampler,
  )


def shortened(
  experiment: experiment_lib.Experiment, steps: int
) -> experiment_lib.Experiment:
  """Returns the experiment with another number of steps.

  Args:
    experiment: experiment of a study.
    steps: steps of the run; 0: as the experiment says.
  """
  if not steps:
    return experiment
  warmup = min(experiment.optimizer.warmup_steps, steps)
  return dataclasses.replace(
    experiment,
    num_steps=steps,
    optimizer=dataclasses.replace(experiment.optimizer, warmup_steps=warmup),
  )


def _make_sampler(model: Any) -> Any:
  # Imported here: runs without rollouts do not wait for the engine.
  from inference import rollouts

  return rollouts.make(model)
