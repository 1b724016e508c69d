"""The learning rate of the quickstart: a grid in powers of two, three seeds.

    python sweep.py --config=experiments/quickstart.py \
      --sweep=experiments/sweeps/quickstart_lr.py --workdir=runs/quickstart_lr \
      --config.num_steps=100

All trials differ in a number only, so they run together in one program.
"""

from training import sweep


def get_sweep() -> sweep.Sweep:
  """Returns the sweep."""
  return sweep.Sweep(
    name='quickstart_lr',
    parameters={'optimizer.peak_lr': sweep.LogUniform(2**-9, 2**-3, points=7)},
  )
