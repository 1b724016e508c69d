"""Flags of the studies in this folder, which train many small models.

They are defined here because absl allows a name only once per process, and
tests import all studies.
"""

from collections.abc import Sequence
import pathlib

from absl import app, flags, logging

from checks import path_flags
from hardware import compilation_cache
from storage import atomic

WORKDIR = path_flags.DEFINE_path(
  'workdir', '', 'Directory that keeps runs or results, to resume from.'
)
FIGURE = path_flags.DEFINE_path(
  'figure', '', 'An SVG file to write; none if empty.'
)
SEEDS = flags.DEFINE_integer(
  'seeds', 0, "Runs of each kind; 0: the study's own number.", lower_bound=0
)
STEPS = flags.DEFINE_integer(
  'steps', 0, "Steps of each run; 0: the study's own number.", lower_bound=0
)
# Of studies of compute at test time, which share their samples.
QUESTIONS_PER_LEVEL = flags.DEFINE_integer(
  'questions_per_level',
  100,
  'Held-out questions of each level of difficulty.',
  lower_bound=4,
)
SAMPLES_PER_QUESTION = flags.DEFINE_integer(
  'samples_per_question',
  64,
  'Answers that each model draws to each question.',
  lower_bound=2,
)


def begin(argv: Sequence[str]) -> pathlib.Path:
  """Prepares a study that trains: returns its workdir, which is made.

  Args:
    argv: of the program; flags only.

  Raises:
    UsageError: there are arguments besides flags.
    SystemExit: there is no --workdir.
  """
  if len(argv) > 1:
    raise app.UsageError(f'got unknown arguments {argv[1:]}, expected flags')
  workdir = pathlib.Path(required_workdir())
  atomic.make_directory(workdir)
  # Orbax logs many lines about saves that went well.
  logging.set_verbosity(logging.ERROR)
  # Runs of a study have programs in common.
  if directory := compilation_cache.directory_of(None):
    compilation_cache.use(directory)
  return workdir


def required_workdir() -> str:
  """Returns --workdir; without it, ends the program with one error line."""
  if not WORKDIR.value:
    raise SystemExit(
      'error: --workdir: got none, expected a directory to keep results in, as'
      ' in --workdir=runs/study'
    )
  return WORKDIR.value
