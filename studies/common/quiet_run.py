"""Runs of experiments that print nothing, as studies start them."""

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


def _make_sampler(model: Any) -> Any:
  # Imported here: runs without rollouts do not wait for the engine.
  from inference import rollouts

  return rollouts.make(model)
