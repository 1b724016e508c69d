"""The runs of a sweep at Weights & Biases: --wandb=PROJECT of sweep.py.

Runs are sent at the end of every start of the sweep, as for TensorBoard. A
point is a group, so that W&B shows means over its seeds; a run is sent only
once.
"""

import pathlib

from storage import file_names
from studies.sweeps import claims
from training.reporting import wandb_mirror


def save(workdir: pathlib.Path, sweep: str, project: str) -> int:
  """Sends the new records of all runs; returns how many.

  Args:
    workdir: workdir of the sweep.
    sweep: name of the sweep.
    project: PROJECT or TEAM/PROJECT.

  Raises:
    ValueError: `wandb_mirror.library` raises it, or W&B refused a run.
  """
  wandb, count = wandb_mirror.library(project), 0
  for run in sorted(
    path.parent
    for path in (workdir / claims.TRIALS).glob(f'*/seed*/{file_names.RUN}')
  ):
    point = run.parent.name
    mirror = wandb_mirror.Mirror(
      run,
      project,
      wandb,
      name=f'{sweep}-{point}-{run.name}',
      group=f'{sweep}-{point}',
    )
    try:
      count += mirror.sync()
      mirror.close()
    except Exception as error:  # of its own classes, or of its network library
      raise ValueError(
        f'--wandb={project}: got {" ".join(str(error).split())} at {run},'
        ' expected W&B to take it; the trials are kept: the same command sends'
        ' the rest'
      ) from None
  return count
