"""One process of a sweep: claims trials, trains them, records their ends."""

from collections.abc import Callable
import dataclasses
import os
import pathlib
import sys

from storage import disk, locks
from studies.sweeps import (
  claims as claims_lib,
  launchers,
  points,
  single,
  store as store_lib,
)
from studies.sweeps.groups import group as group_lib, together
from training import experiment as experiment_lib, sweep as sweep_lib
from training.lifecycle import exit_codes

# The number of structures whose data and programs are kept for later trials.
_MOST_STRUCTURES = 4
# Default number of trials that a process claims at a time.
_AT_ONCE, _AT_ONCE_LEARNING = 64, 8


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
  most_at_once(search)  # of a scheduler's variables
  url = search.url or store_lib.default_url(search.workdir)
  points.check(search.experiment, search.sweep, url)
  with disk.writing(search.workdir):
    token = claims_lib.token(search.workdir)
  # Optuna fails if two processes make the tables of a database at the same
  # time, as the processes of a job array would.
  with claims_lib.alone(search.workdir):
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
  progress: single.Progress = lambda point, seed, step: None,
  tell: Callable[[str], None] = lambda text: None,
) -> int:
  """Trains trials until none is left; returns an exit code.

  Args:
    progress: receives the point, the seed and the step that are trained now.
    tell: receives lines for the user.
  """
  taker = claims_lib.Claims(store, search.workdir)
  structures: dict[str, group_lib.Structure] = {}
  told: set[str] = set()
  while batch := taker.take(most_at_once(search)):
    try:
      groups, apart = together.members(
        batch, search.experiment, store, wanted=search.together
      )
      for members in groups:
        tell(
          f'{len(members)} trials x {len(members[0].experiments)} seeds in one'
          ' program'
        )
        key = members[0].structure
        if key not in structures:
          if len(structures) == _MOST_STRUCTURES:
            structures.clear()
          structures[key] = group_lib.Structure(search.workdir, members[0])
        group_lib.train(structures[key], members, store, progress)
      for claim, reason in apart:
        if reason not in told:
          told.add(reason)
          tell(f'trials one by one: {reason}')
        single.run_trial(claim, store, search.experiment, progress)
        claim.release()
    except single.Stopped as stopped:
      tell('stopped; the same command resumes from here')
      return stopped.exit_code
    except (disk.SaveError, locks.InUseError) as error:
      print(f'error: {error}', file=sys.stderr)
      return exit_codes.TRY_AGAIN
    finally:
      for claim in batch:
        claim.release()
  return 0


def most_at_once(search: Search) -> int:
  """Returns how many trials a process claims at a time."""
  sweep = search.sweep
  if asked := search.trials_at_once or sweep.trials_at_once:
    return asked
  learns = sweep.strategy == 'tpe' or sweep.pruner != 'none'
  most = _AT_ONCE_LEARNING if learns else _AT_ONCE
  # Each process of a job array takes a share.
  return min(most, -(-sweep.count() // launchers.num_processes(os.environ)))
