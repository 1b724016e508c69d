"""A grid over learning rates, with one program for each model.

The update of Adam without weight decay is proportional to the learning rate,
which is an argument of the program here.
"""

from collections.abc import Callable, Iterable, Iterator, Sequence
import dataclasses
import itertools
import json
import pathlib
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import optax

from data import batches as batches_lib
from training import (
  assemble,
  experiment as experiment_lib,
  learner as learner_lib,
  state as state_lib,
  step as step_lib,
)

_EVAL_BATCHES = 32


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

  The lowest point of the parabola through the best rate and its neighbours.

  Args:
    rates: log2 of the learning rates, ascending and one apart.
    losses: mean over seeds per rate; not finite if training diverged.
  """
  finite = np.where(np.isfinite(losses), losses, np.inf)
  best = int(np.argmin(finite))
  if best in (0, len(losses) - 1) or not np.isfinite(losses[best + 1]):
    return None
  left, middle, right = finite[best - 1 : best + 2]
  return rates[best] + 0.5 * (left - right) / (left - 2 * middle + right)


@dataclasses.dataclass(frozen=True, kw_only=True)
class Grid:
  """The runs of a grid, with a file that keeps the results."""

  experiment_of: Callable[
    [str, int], experiment_lib.Experiment
  ]  # (kind, width)
  rates: Sequence[int]  # log2 of the learning rates
  seeds: Sequence[int]
  num_steps: int
  kept: pathlib.Path  # JSON lines: kind, width, rate, seed, loss

  def measure(
    self,
    models: Iterable[tuple[str, int]],
    tell: Callable[[str], None] = lambda line: None,
  ) -> dict[tuple[str, int, int], list[float]]:
    """Trains the runs that the file lacks.

    Args:
      models: kinds and widths.
      tell: called with a line about each run that is trained.

    Returns:
      (kind, width, log2 of the rate) -> validation loss of each seed.
    """
    self.kept.parent.mkdir(parents=True, exist_ok=True)
    models = tuple(models)
    known = _read(self.kept)
    for kind, width in models:
      for key, loss in self._missing(kind, width, known):
        known[key] = loss
        *_, rate, seed = key
        tell(f'{kind:8} {width:4} 2^{rate:<3} seed {seed}: {loss:.4f}')
        with self.kept.open('a') as file:
          file.write(json.dumps([*key, loss]) + '\n')
    return {
      (kind, width, rate): [
        known[kind, width, rate, seed] for seed in self.seeds
      ]
      for kind, width in models
      for rate in self.rates
    }

  def _missing(
    self, kind: str, width: int, known: dict[Any, float]
  ) -> Iterator[tuple[tuple[str, int, int, int], float]]:
    """Yields the key and the loss of each run of a model that is not known."""
    missing = [
      (kind, width, rate, seed)
      for seed in self.seeds
      for rate in self.rates
      if (kind, width, rate, seed) not in known
    ]
    if not missing:
      return
    experiment = self.experiment_of(kind, width)
    experiment.num_steps = self.num_steps
    # The learning rate is an argument of the program, see `Model`.
    experiment.optimizer.peak_lr = 1.0
    experiment.validate()
    model = Model(experiment)
    for seed in sorted({seed for *_, seed in missing}):
      batches, eval_batches = _batches(experiment, seed, self.kept.parent)
      for key in [key for key in missing if key[3] == seed]:
        yield key, model.loss(2.0 ** key[2], seed, batches, eval_batches)


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
