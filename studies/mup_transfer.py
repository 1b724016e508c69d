"""The best learning rate by width, with muP and without.

    python -m studies.mup_transfer --workdir=runs/mup \
      --figure=runs/mup.svg

Runs `experiments/mup_transfer.py` over widths and learning rates. Prints the
validation loss of each run and the optimum of each width: the lowest point of
the parabola through the best learning rate and its two neighbours, in log2.
Results are appended to a file in --workdir as they come; the same command
resumes after an interruption. The claim `mup_transfer` of
`python -m studies.reproduce` has a smaller grid.
"""

from collections.abc import Sequence
import itertools
import pathlib
import statistics

from absl import app, flags, logging
import numpy as np

from experiments import mup_transfer
from hardware import host_memory
from studies.common import figure, rate_grid, study_flags

_WIDTHS = flags.DEFINE_list(
  'widths', [str(width) for width in mup_transfer.WIDTHS], 'Model widths.'
)
_LOG2_RATES = flags.DEFINE_list(
  'log2_rates',
  [str(power) for power in range(-11, -2)],
  'Base-2 logarithms of the learning rates.',
)
_NUM_SEEDS, _NUM_STEPS = 1, 100

KINDS = ('mup', 'standard')
# (kind, width, log2 of the learning rate) -> validation loss of each seed.
Losses = dict[tuple[str, int, int], list[float]]


def panels(losses: Losses, rates: Sequence[int]) -> list[figure.Panel]:
  """Returns panels of loss over learning rate: one per kind, lines by width."""
  titles = {'standard': 'standard parametrisation', 'mup': 'muP'}
  finite = [v for vs in losses.values() for v in vs if np.isfinite(v)]
  lowest = min(finite)
  return [
    figure.Panel(
      title=titles[kind],
      x_label='learning rate',
      y_label='validation loss, nats per token',
      lines={
        f'width {width}': figure.Line(
          x=[2.0**rate for rate in rates],
          y=[statistics.mean(losses[kind, width, rate]) for rate in rates],
          style='.-',
        )
        for width in sorted({width for of, width, _ in losses if of == kind})
      },
      log_x=True,
      y_limits=(lowest - 0.05, lowest + 1.5),
    )
    for kind in ('standard', 'mup')
  ]


def main(argv: list[str]) -> None:
  """Measures the grid and prints losses and optima."""
  if len(argv) > 1:
    raise app.UsageError(f'got unknown arguments {argv[1:]}, expected flags')
  # TFDS logs every data set that it loads, twice.
  logging.set_verbosity(logging.ERROR)
  host_memory.reuse_freed_memory()
  widths = [int(width) for width in _WIDTHS.value]
  rates = sorted(int(rate) for rate in _LOG2_RATES.value)
  grid = rate_grid.Grid(
    experiment_of=mup_transfer.of_width,
    rates=rates,
    seeds=range(study_flags.SEEDS.value or _NUM_SEEDS),
    num_steps=study_flags.STEPS.value or _NUM_STEPS,
    kept=pathlib.Path(study_flags.required_workdir()) / 'losses.jsonl',
  )
  losses = grid.measure(
    itertools.product(KINDS, widths),
    tell=lambda line: print(line, flush=True),
  )
  print(f'| model | {" | ".join(f"2^{rate}" for rate in rates)} | optimum |')
  print(f'|---|{"---|" * len(rates)}---|')
  for kind in KINDS:
    for width in widths:
      means = [statistics.mean(losses[kind, width, rate]) for rate in rates]
      best = rate_grid.optimum(rates, means)
      cells = [f'{loss:.3f}' for loss in means]
      told = 'at the edge' if best is None else f'2^{best:.2f}'
      print(f'| {kind} {width} | {" | ".join(cells)} | {told} |')
  if study_flags.FIGURE.value:
    figure.save(study_flags.FIGURE.value, panels(losses, rates))


if __name__ == '__main__':
  app.run(main)
