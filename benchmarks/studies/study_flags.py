"""Flags of the studies that train many small models; absl knows each name once.

benchmarks/studies/compare_experiments.py, mup_transfer.py, matmul_loss_gap.py.
"""

from absl import flags

WORKDIR = flags.DEFINE_string(
  'workdir', '', 'Where runs or results are kept, and gone on with.'
)
FIGURE = flags.DEFINE_string('figure', '', 'An SVG file to draw.')
SEEDS = flags.DEFINE_integer(
  'seeds', 0, 'Runs of each kind; 0: as many as its page says.', lower_bound=0
)
STEPS = flags.DEFINE_integer(
  'steps', 0, 'Of each run; 0: as many as its page says.', lower_bound=0
)


def required_workdir() -> str:
  """Returns --workdir.

  Raises:
    ValueError: it was not given.
  """
  if not WORKDIR.value:
    raise ValueError(
      '--workdir: got none, expected a directory to keep results in, as in'
      ' --workdir=runs/study'
    )
  return WORKDIR.value
