"""Models of graded ability: training ends once half of the answers are right.

A model that answers everything gains nothing by thinking, and one that answers
nothing neither. The step at which an ability comes differs between seeds by a
factor of two or more, so a fixed number of steps gives the one or the other.
"""

from collections.abc import Callable
import json
import pathlib

from data.problems import generator as problems_lib, problem as problem_lib
from experiments import test_time_scaling as experiments
from frozen import freeze
from inference import generate
from storage import atomic
from studies.common import quiet_run
from studies.think import pool as pool_lib
from training import experiment as experiment_lib

_NUM_PER_LEVEL = 20  # questions of a look
_NUM_SAMPLES = 4  # of each
_LOOKS = 'looks.json'  # in the workdir: accuracy by step


def questions() -> list[problem_lib.Problem]:
  """Returns questions of the training split: those of tests choose nothing."""
  return [
    made
    for level in sorted(experiments.LEVELS.values())
    for made in problems_lib.make(
      problems_lib.Settings(
        count=_NUM_PER_LEVEL, families=('columns',), levels=(level,)
      ),
      'train',
    )
  ]


def train(
  experiment: experiment_lib.Experiment,
  workdir: pathlib.Path,
  *,
  target: float = experiments.TARGET,
  every: int = experiments.LOOK_EVERY,
  look: Callable[[pathlib.Path], float] | None = None,
) -> pathlib.Path:
  """Trains until a share of sampled answers is right; returns the frozen model.

  Args:
    experiment: the run; its number of steps is the most.
    workdir: of the run. The same call resumes.
    target: the share.
    every: steps between two looks.
    look: returns the share of a frozen model; None: that of `questions`.

  Raises:
    SystemExit: a signal stopped the run.
  """
  looks, look = _read(workdir / _LOOKS), look or _accuracy
  frozen = workdir / 'frozen'
  for step in [
    *range(every, experiment.num_steps, every),
    experiment.num_steps,
  ]:
    if str(step) not in looks:
      if quiet_run.run(experiment, workdir, stop_after=step).exit_code:
        raise SystemExit('stopped by a signal; the same command resumes')
      freeze.freeze_checkpoint(workdir, step=step, out=frozen, overwrite=True)
      looks[str(step)] = look(frozen)
      atomic.write_text(workdir / _LOOKS, json.dumps(looks, indent=2) + '\n')
    if looks[str(step)] >= target:
      break
  return frozen


def _accuracy(frozen: pathlib.Path) -> float:
  found = pool_lib.draw(
    generate.load(frozen, pool_lib.ENGINE),
    questions(),
    num_samples=_NUM_SAMPLES,
    max_tokens=experiments.MAX_TOKENS,
  )
  return float(found.is_right_QN.mean())


def _read(path: pathlib.Path) -> dict[str, float]:
  return json.loads(path.read_text('utf-8')) if path.exists() else {}
