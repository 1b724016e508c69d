"""The best learning rate by width, with muP and without.

    python -m studies.mup_transfer --workdir=runs/mup \
      --figure=runs/mup.svg

Runs `experiments/mup_transfer.py` over widths and learning rates. Prints the
validation loss of each run and the optimum of each width: the lowest point of
the parabola through the best learning rate and its two neighbours, in log2.
Results are appended to a file in --workdir as they come; the same command
resumes after an interruption. One program is compiled per model: the update of
Adam without weight decay is proportional to the learning rate, which is an
argument of the program.
"""

from collections.abc import Sequence
import dataclasses
import itertools
import json
import pathlib
import statistics

from absl import app, flags, logging
import jax
import jax.numpy as jnp
import numpy as np
import optax

from data import batches as batches_lib
from experiments import mup_transfer
from hardware import host_memory
from studies.common import figure, study_flags
from training import (
  assemble,
  experiment as experiment_lib,
  learner as learner_lib,
  state as state_lib,
  step as step_lib,
)

_WIDTHS = flags.DEFINE_list(
  'widths', [str(width) for width in mup_transfer.WIDTHS], 'Model widths.'
)
_LOG2_RATES = flags.DEFINE_list(
  'log2_rates',
  [str(power) for power in range(-11, -2)],
  'Base-2 logarithms of the learning rates.',
)
_NUM_SEEDS, _NUM_STEPS = 1, 100
_EVAL_BATCHES = 32

KINDS = ('mup', 'standard')
# (kind, width, log2 of the learning rate) -> validation loss of each seed.
Losses = dict[tuple[str, int, int], list[float]]


class Model:
  """A model of the grid, compiled once for all learning rates."""

  def __init__(self, experiment: experiment_lib.Experiment):
    learner = learner_lib.make(experiment, jax.devices()[:1])
    # The update of learning rate 1, scaled by an argument of the program.
    self._optimizer = optax.chain(
      learner.optimizer, optax.inject_hyperparams(optax.scale)(step_size=1.0)
    )
    self._model = learner.model
    self._train_step = jax.jit(
      step_lib.make_train_step(
        learner.model, experiment.objective, self._optimizer
      ),
      donate_argnums=0,
    )
    self._eval_step = jax.jit(
      step_lib.make_eval_step(learner.model, experiment.objective)
    )

  def loss(
    self,
    rate: float,
    seed: int,
    batches: Sequence[batches_lib.Batch],
    eval_batches: Sequence[batches_lib.Batch],
  ) -> float:
    """Returns the validation loss after training on `batches`, nats/token."""
    state = jax.jit(
      lambda key: state_lib.init(self._model, self._optimizer, key)
    )(jax.random.key(seed))
    inner, scale = state.opt_state
    scale.hyperparams['step_size'] = jnp.float32(rate)
    state = state.replace(opt_state=(inner, scale))
    for batch in batches:
      state, _ = self._train_step(state, batch)
    sums = [self._eval_step(state.params, batch) for batch in eval_batches]
    total = sum(float(part['loss']) for part in sums)
    return total / sum(float(part['weight']) for part in sums)


def optimum(rates: Sequence[int], losses: Sequence[float]) -> float | None:
  """Returns log2 of the best learning rate; None at an edge of the grid.

  Args:
    rates: log2 of the learning rates, ascending and one apart.
    losses: mean over seeds per rate; not finite if training diverged.
  """
  finite = np.where(np.isfinite(losses), losses, np.inf)
  best = int(np.argmin(finite))
  if best in (0, len(losses) - 1) or not np.isfinite(losses[best + 1]):
    return None
  # The vertex of the parabola through three points that are one apart.
  left, middle, right = finite[best - 1 : best + 2]
  return rates[best] + 0.5 * (left - right) / (left - 2 * middle + right)


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


def measure(
  workdir: pathlib.Path, widths: Sequence[int], rates: Sequence[int]
) -> Losses:
  """Trains the runs missing in the workdir's file; returns all losses."""
  workdir.mkdir(parents=True, exist_ok=True)
  kept = workdir / 'losses.jsonl'
  known = _read(kept)
  for kind in KINDS:
    for width in widths:
      experiment = mup_transfer.get_config(f'{kind}-{width}')
      _measure_model(experiment, (kind, width), rates, known, kept)
  return {
    (kind, width, rate): [
      known[kind, width, rate, seed] for seed in range(_num_seeds())
    ]
    for kind in KINDS
    for width in widths
    for rate in rates
  }


def _measure_model(experiment, place, rates, known, kept) -> None:
  """Adds the missing runs of one model to `known` and to the file."""
  missing = [
    (rate, seed)
    for seed in range(_num_seeds())
    for rate in rates
    if (*place, rate, seed) not in known
  ]
  if not missing:
    return
  experiment.num_steps = study_flags.STEPS.value or _NUM_STEPS
  # The learning rate is an argument of the program, see `Model`.
  experiment.optimizer.peak_lr = 1.0
  experiment.validate()
  model = Model(experiment)
  for seed in sorted({seed for _, seed in missing}):
    batches, eval_batches = _batches(experiment, seed, kept.parent)
    for rate in [rate for rate, of in missing if of == seed]:
      loss = model.loss(2.0**rate, seed, batches, eval_batches)
      known[(*place, rate, seed)] = loss
      kind, width = place
      print(
        f'{kind:8} {width:4} 2^{rate:<3} seed {seed}: {loss:.4f}', flush=True
      )
      with kept.open('a') as file:
        file.write(json.dumps([*place, rate, seed, loss]) + '\n')


def _num_seeds() -> int:
  return study_flags.SEEDS.value or _NUM_SEEDS


def _read(path: pathlib.Path) -> dict[tuple[str, int, int, int], float]:
  lines = path.read_text().splitlines() if path.exists() else []
  return {tuple(key): loss for *key, loss in map(json.loads, lines)}


def _batches(experiment, seed, workdir):
  """Returns the training batches and the evaluation batches of a run."""
  experiment = dataclasses.replace(experiment, seed=seed)
  parts = assemble.assemble(experiment, workdir)
  batches = list(itertools.islice(parts.batches, experiment.num_steps))
  parts.batches.close()
  return batches, list(itertools.islice(parts.eval_batches, _EVAL_BATCHES))


def main(argv: list[str]) -> None:
  """Measures the grid and prints losses and optima."""
  if len(argv) > 1:
    raise app.UsageError(f'got unknown arguments {argv[1:]}, expected flags')
  # TFDS logs every data set that it loads, twice.
  logging.set_verbosity(logging.ERROR)
  host_memory.reuse_freed_memory()
  widths = [int(width) for width in _WIDTHS.value]
  rates = sorted(int(rate) for rate in _LOG2_RATES.value)
  losses = measure(pathlib.Path(study_flags.required_workdir()), widths, rates)
  print(f'| model | {" | ".join(f"2^{rate}" for rate in rates)} | optimum |')
  print(f'|---|{"---|" * len(rates)}---|')
  for kind in KINDS:
    for width in widths:
      means = [statistics.mean(losses[kind, width, rate]) for rate in rates]
      best = optimum(rates, means)
      cells = [f'{loss:.3f}' for loss in means]
      told = 'at the edge' if best is None else f'2^{best:.2f}'
      print(f'| {kind} {width} | {" | ".join(cells)} | {told} |')
  if study_flags.FIGURE.value:
    figure.save(study_flags.FIGURE.value, panels(losses, rates))


if __name__ == '__main__':
  app.run(main)
