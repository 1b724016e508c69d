"""A whole sweep of tiny runs, in this process."""

import pathlib

from studies.sweeps import claims, store as store_lib, worker
from training import experiment as experiment_lib, sweep as sweep_lib


def run(
  experiment: experiment_lib.Experiment,
  sweep: sweep_lib.Sweep,
  workdir: pathlib.Path,
  *,
  resume: str = 'unfinished',
  **options,
) -> tuple[store_lib.Store, list[str]]:
  """Returns the store of a finished sweep, and the lines for the user.

  Args:
    resume: as --resume.
    **options: of the Search.
  """
  search = worker.Search(
    sweep=sweep, experiment=experiment, workdir=workdir, **options
  )
  store = worker.open_store(search)
  claims.Claims(store, workdir).begin(resume)
  lines: list[str] = []
  code = worker.run(search, store, tell=lines.append)
  assert not code
  return store, lines
