"""One process of a sweep: claims trials, trains them, records their ends."""

from collections.abc import Callable
import dataclasses
import pathlib
import sys

from storage import disk, locks
from studies.sweeps import (
  claims as claims_lib,
  points,
  single,
  store as store_lib,
)
from training import experiment as experiment_lib, sweep as sweep_lib


@dataclasses.dataclass(frozen=True, kw_only=True)
class Search:
  """A sweep with its experiment and the places of its results."""

  sweep: sweep_lib.Sweep
  experiment: experiment_lib.Experiment
  workdir: pathlib.Path
  url: str = ''  # of the storage; '': a SQLite file in the workdir
  together: bool = True  # trials that differ in numbers only, in one program
  trials_at_once: int = 0  # that a process claims; 0: the sweep's own number


def open_store(search: Search) -> store_lib.Store:
  """Checks a sweep and opens its storage.

  Raises:
    ValueError: the sweep does not fit the experiment, or the storage the sweep.
  """
  store_lib.optuna()
  search.experiment.validate()
  search.sweep.validate()
  url = search.url or store_lib.default_url(search.workdir)
  points.check(search.experiment, search.sweep, url)
  with disk.writing(search.workdir):
    token = claims_lib.token(search.workdir)
  return store_lib.Store(
    search.sweep,
    search.experiment,
    url=url,
    workdir_token=token,
    num_evaluations=len(points.evaluations(search.experiment)),
  )


def run(
  search: Search,
  store: store_lib.Store,
  progress: single.Progress = lambda slot, seed, step: None,
  tell: Callable[[str], None] = lambda text: None,
) -> int:
  """Trains trials until none is left; returns an exit code.

  Args:
    progress: receives the slot, the seed and the step that are trained now.
    tell: receives lines for the user.
  """
  taker = claims_lib.Claims(store, search.workdir)
  while batch := taker.take(1):
    for claim in batch:
      try:
        single.run_trial(claim, store, search.experiment, progress)
      except single.Stopped as stopped:
        tell('stopped; the same command resumes from here')
        return stopped.exit_code
      except (disk.SaveError, locks.InUseError) as error:
        print(f'error: {error}', file=sys.stderr)
        return 75
      finally:
        claim.release()
  return 0
