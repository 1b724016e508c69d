"""A paired comparison of experiments over seeds, with confidence intervals.

    E=experiments/muon_against_adamw.py
    python -m studies.compare_experiments \
      --experiments=$E:adamw,$E:muon \
      --seeds=5 --workdir=runs/compared --figure=runs/muon.svg

Trains every experiment with every seed as `train.py` would. Prints the
validation losses, and their differences to the first experiment. Each run has a
workdir below --workdir, named after the experiment: the same command resumes
after an interruption, and another comparison reuses finished runs.

Seeds are paired. A seed gives both sides the same order of data, and the same
initial weights if the models are the same, so that common noise cancels. The
interval is Student's, at 95 %, over seeds. `seeds to resolve` is the number of
pairs with which a test at that level would see the measured difference four
times out of five (normal approximation, two-sided).
"""

from collections.abc import Sequence
import dataclasses
import math
import pathlib
import statistics

from absl import app, flags, logging
import numpy as np
from scipy import stats

from checks import expect
from hardware import host_memory
from studies import figure, load, quiet_run, study_flags
from training import experiment as experiment_lib
from training.reporting import metrics

_EXPERIMENTS = flags.DEFINE_list(
  'experiments',
  None,
  'FILE:VARIANT of each experiment; others are compared with the first.',
  required=True,
)
_NUM_SEEDS = 5
_LEVEL, _POWER = 0.95, 0.8
_ROUNDING = 1e-9  # a spread below this part of the mean is rounding
_SMOOTHED_STEPS = 10  # averaged into one point of a curve


@dataclasses.dataclass(frozen=True, kw_only=True)
class Trained:
  """The result of a run."""

  losses: list[float]  # of training, nats per token, one per step
  validation_loss: float  # nats per token, of the last step
  bits_per_byte: float


@dataclasses.dataclass(frozen=True, kw_only=True)
class Difference:
  """A paired difference over seeds, with its uncertainty."""

  mean: float
  half_width: float  # of the 95 % interval
  # Infinite if the measured difference is zero; nan if all pairs differ alike,
  # and so do not show how much seeds vary.
  seeds_to_resolve: float

  @property
  def is_resolved(self) -> bool:
    """Whether the interval is known and excludes zero."""
    is_known = not math.isnan(self.seeds_to_resolve)
    return is_known and abs(self.mean) > self.half_width


def train(
  experiment: experiment_lib.Experiment, workdir: pathlib.Path
) -> Trained | None:
  """Trains or resumes in `workdir`; None if a signal stopped the run."""
  result = quiet_run.run(experiment, workdir)
  if result.exit_code:
    return None
  records = metrics.read(workdir)
  last = [record for record in records if record['kind'] == 'eval'][-1]
  return Trained(
    losses=[r['loss'] for r in records if r['kind'] == 'train'],
    validation_loss=last['loss'],
    bits_per_byte=last['bits_per_byte'],
  )


def difference(side: Sequence[float], reference: Sequence[float]) -> Difference:
  """Returns the mean of side - reference over pairs, with its interval.

  Raises:
    ValueError: fewer than two pairs.
  """
  expect.at_least('pairs of runs', len(side), 2, 'raise --seeds')
  gaps = [a - b for a, b in zip(side, reference, strict=True)]
  mean, deviation = statistics.mean(gaps), statistics.stdev(gaps)
  quantile = float(stats.t.ppf((1 + _LEVEL) / 2, len(gaps) - 1))
  return Difference(
    mean=mean,
    half_width=quantile * deviation / math.sqrt(len(gaps)),
    seeds_to_resolve=_seeds_to_resolve(mean, deviation),
  )


def _seeds_to_resolve(mean: float, deviation: float) -> float:
  if not mean:
    return math.inf
  if deviation <= _ROUNDING * abs(mean):
    return math.nan
  z = float(stats.norm.ppf((1 + _LEVEL) / 2) + stats.norm.ppf(_POWER))
  return (z * deviation / mean) ** 2


def report(runs: dict[str, list[Trained]]) -> str:
  """Returns the table of losses and of differences to the first variant."""
  lines = [
    '| variant | validation loss, by seed | mean | bits/byte | difference |',
    '|---|---|---|---|---|',
  ]
  reference = next(iter(runs.values()))
  for variant, trained in runs.items():
    losses = [one.validation_loss for one in trained]
    cells = [
      variant,
      ' '.join(f'{loss:.4f}' for loss in losses),
      f'{statistics.mean(losses):.4f}',
      f'{statistics.mean(one.bits_per_byte for one in trained):.4f}',
      _difference_cell(trained, reference),
    ]
    lines.append(f'| {" | ".join(cells)} |')
  return '\n'.join(lines)


def _difference_cell(trained: list[Trained], reference: list[Trained]) -> str:
  if trained is reference:
    return ''
  found = difference(
    [one.validation_loss for one in trained],
    [one.validation_loss for one in reference],
  )
  if math.isnan(found.seeds_to_resolve):
    return f'{found.mean:+.4f} (not resolved; all seeds differ alike)'
  verdict = 'resolved' if found.is_resolved else 'not resolved'
  return (
    f'{found.mean:+.4f} +- {found.half_width:.4f} ({verdict};'
    f' {math.ceil(found.seeds_to_resolve)} seeds to resolve)'
    if math.isfinite(found.seeds_to_resolve)
    else 'no difference'
  )


def curves(runs: dict[str, list[Trained]]) -> figure.Panel:
  """Returns the training loss of each variant: mean and range over seeds."""
  lines = {}
  for variant, trained in runs.items():
    width = min(_SMOOTHED_STEPS, len(trained[0].losses))
    points_SX = np.stack([_averaged(one.losses, width) for one in trained])
    lines[variant] = figure.Line(
      x=((np.arange(points_SX.shape[1]) + 0.5) * width).tolist(),
      y=points_SX.mean(axis=0).tolist(),
      low=points_SX.min(axis=0).tolist(),
      high=points_SX.max(axis=0).tolist(),
    )
  return figure.Panel(
    title=f'training loss, mean and range of {len(trained)} seeds',
    x_label='step',
    y_label='nats per token',
    lines=lines,
  )


def _averaged(losses: list[float], width: int) -> np.ndarray:
  """Returns means of `width` steps each, without an incomplete last one."""
  num_points = len(losses) // width
  return np.reshape(losses[: num_points * width], (-1, width)).mean(axis=1)


def main(argv: list[str]) -> int:
  """Trains every variant with every seed and prints the comparison."""
  if len(argv) > 1:
    raise app.UsageError(f'got unknown arguments {argv[1:]}, expected flags')
  # Orbax logs many lines, warnings included, about successful saves.
  logging.set_verbosity(logging.ERROR)
  host_memory.reuse_freed_memory()
  kept = pathlib.Path(study_flags.required_workdir())
  runs: dict[str, list[Trained]] = {}
  for seed in range(study_flags.SEEDS.value or _NUM_SEEDS):
    for place in _EXPERIMENTS.value:
      experiment = load.experiment(place)
      experiment.seed = seed
      experiment.num_steps = study_flags.STEPS.value or experiment.num_steps
      variant = place.partition(':')[2] or experiment.name
      workdir = kept / f'{experiment.name}-seed{seed}'
      trained = train(experiment, workdir)
      if trained is None:
        print('stopped; the same command resumes from here')
        return 1
      print(
        f'{variant} seed {seed}: {trained.validation_loss:.4f} nats/token,'
        f' {trained.bits_per_byte:.4f} bits/byte',
        flush=True,
      )
      runs.setdefault(variant, []).append(trained)
  print(report(runs))
  if study_flags.FIGURE.value:
    figure.save(study_flags.FIGURE.value, [curves(runs)])
  return 0


if __name__ == '__main__':
  app.run(main)
