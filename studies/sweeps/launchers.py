"""Processes of a sweep that a scheduler starts, by its environment variables.

    Slurm       sbatch --array=0-7: SLURM_ARRAY_TASK_COUNT
    Kubernetes  an Indexed Job: JOB_COMPLETION_INDEX, and NUM_PROCESSES from the
                manifest, as `parallel/processes.py` reads it

These are not the processes of one run: each claims its own trials, and they
share only the storage. A process only needs the number of processes, which
gives its share: otherwise the first process would claim all trials, to run them
together.
"""

from collections.abc import Mapping

_SLURM = 'SLURM_ARRAY_TASK_COUNT'
_KUBERNETES = 'JOB_COMPLETION_INDEX'
_COUNT = 'NUM_PROCESSES'


def num_processes(environ: Mapping[str, str]) -> int:
  """Returns how many processes share the sweep; 1 without a scheduler.

  Raises:
    ValueError: a variable is no positive integer, or an Indexed Job does not
      say its size.
  """
  if environ.get(_SLURM):
    return _positive(_SLURM, environ[_SLURM])
  if not environ.get(_KUBERNETES):
    return 1
  if not environ.get(_COUNT):
    raise ValueError(
      f'{_COUNT}: got none with {_KUBERNETES}={environ[_KUBERNETES]}, expected'
      ' the completions of the Indexed Job; set it in the manifest, or give'
      ' --trials_at_once'
    )
  return _positive(_COUNT, environ[_COUNT])


def _positive(name: str, text: str) -> int:
  value = int(text) if text.isdigit() else 0
  if value < 1:
    raise ValueError(
      f'{name}: got {text!r}, expected the number of processes, at least 1; set'
      ' it right, or give --trials_at_once'
    )
  return value
