"""Points: the experiments that a sweep makes of one experiment."""

from collections.abc import Mapping
import copy

from studies.comparison import metric_names
from studies.sweeps import store as store_lib
from training import (
  experiment as experiment_lib,
  flags as flags_lib,
  sweep as sweep_lib,
)


def seeds(
  base: experiment_lib.Experiment,
  sweep: sweep_lib.Sweep,
  params: Mapping[str, sweep_lib.Scalar],
) -> list[int]:
  """Returns the seeds of a trial."""
  first = int(params.get('seed', base.seed))
  return [first + i for i in range(sweep.num_seeds)]


def experiment_of(
  base: experiment_lib.Experiment,
  params: Mapping[str, sweep_lib.Scalar],
  seed: int,
) -> experiment_lib.Experiment:
  """Returns the experiment of one run of a trial.

  The runs freeze nothing and draw no samples: train.py trains the best point
  again. A step that is not finite is not diagnosed: in a search it is a result.

  Raises:
    ValueError: a field does not exist, or no run can use the values.
  """
  experiment = copy.deepcopy(base)
  for path, value in params.items():
    flags_lib.set_field(experiment, path, value)
  experiment.seed = seed
  experiment.freeze.enabled = False
  experiment.evals.samples = 0
  experiment.diagnose_non_finite = False
  experiment.validate()
  return experiment


def evaluations(experiment: experiment_lib.Experiment) -> list[int]:
  """Returns the steps of a run that are evaluated, the last one included."""
  every, last = experiment.eval_every_steps, experiment.num_steps
  return [*range(every, last, every), last] if every else [last]


def check(
  base: experiment_lib.Experiment, sweep: sweep_lib.Sweep, url: str
) -> None:
  """Refuses a sweep that does not fit its experiment.

  Args:
    base: the experiment, validated.
    sweep: the sweep, validated.
    url: address of the storage.

  Raises:
    ValueError: a field does not exist or has another type; no run writes the
      metric; a pruner would see no evaluation before the last one, or none with
      the metric; the storage does not outlive the process.
  """
  for name, space in sweep.parameters.items():
    examples = (
      space.values
      if isinstance(space, sweep_lib.Choice)
      else [space.low]
      if isinstance(space, sweep_lib.Integer)
      else [float(space.low)]
    )
    for value in examples:
      try:
        flags_lib.set_field(copy.deepcopy(base), name, value)
      except ValueError as error:
        raise ValueError(f'parameters: {error}') from None
  if sweep.pruner != 'none' and len(evaluations(base)) < 2:
    raise ValueError(
      f'pruner: got {sweep.pruner} with config.eval_every_steps ='
      f' {base.eval_every_steps} in {base.num_steps} steps, expected'
      ' evaluations before the last step, by which trials are pruned; set'
      ' --config.eval_every_steps'
    )
  metric_names.check(base, sweep.metric)
  every = base.evals.every_steps
  if (
    sweep.pruner != 'none'
    and '/' in sweep.metric
    and base.evals.tasks
    and every not in (0, base.eval_every_steps)
  ):
    raise ValueError(
      f'pruner: got {sweep.pruner} with config.evals.every_steps = {every} and'
      f' evaluations every {base.eval_every_steps} steps, expected a score at'
      ' each of them; set --config.evals.every_steps=0'
    )
  if ':memory:' in url:
    raise ValueError(
      f'--storage: got {store_lib.redacted(url)}, expected a database that'
      ' survives the process; leave it out for a file in --workdir'
    )
