"""One program that trains many runs: the train step, mapped over runs.

    states, metrics = train(states, batches, numbers)

Every array of a state has a leading axis of runs, R, spread over the devices.
Values that differ between runs are arguments: a table of learning rates by
step, and the numbers of `chain.Numbers`. Runs of one seed train on the same
batches, so batches have an axis of seeds, and each run has the index of its
seed. No value of a run depends on another run, so NaN stays within its run.
"""

from collections.abc import Sequence
import functools
from typing import Any

import jax
import jax.numpy as jnp
from jax.sharding import Mesh, NamedSharding, PartitionSpec
import numpy as np

from models import execution as execution_lib
from training import (
  experiment as experiment_lib,
  learner as learner_lib,
  run as run_lib,
  state as state_lib,
  step as step_lib,
)
from training.optimizer import chain, spikes

_RUNS = 'runs'


class Program:
  """The compiled steps of one structure, on all devices of this process."""

  def __init__(
    self,
    experiment: experiment_lib.Experiment,
    spare_ids: tuple[tuple[int, int], ...],
  ):
    """Compiles nothing yet: the first call does.

    Args:
      experiment: any of the runs.
      spare_ids: ids without a token of the tokenizer, which are masked.
    """
    # A mesh of one device: every run lies whole on one device.
    learner = learner_lib.make(experiment, jax.devices()[:1])
    self.learner = learner.masking(spare_ids)
    self._experiment = self.learner.experiment
    self._mesh = Mesh(np.array(jax.devices()), (_RUNS,))
    by_run = PartitionSpec(_RUNS)
    self._by_run = NamedSharding(self._mesh, by_run)
    self._shared = NamedSharding(self._mesh, PartitionSpec())
    shard = functools.partial(
      jax.shard_map, mesh=self._mesh, out_specs=by_run, check_vma=False
    )
    self._train = jax.jit(
      shard(
        self._mapped_train,
        in_specs=(by_run, PartitionSpec(), by_run, by_run),
      ),
      donate_argnums=0,
    )
    self._evaluate = jax.jit(
      shard(self._mapped_evaluate, in_specs=(by_run, PartitionSpec()))
    )
    self._init = jax.jit(self._first_state)

  @property
  def abstract_state(self) -> state_lib.TrainState:
    """Shapes and dtypes of the state of one run."""
    return self.learner.abstract_state

  def padded(self, num_runs: int) -> int:
    """Returns the size of the axis of runs: a multiple of the devices."""
    num_devices = self._mesh.size
    return -(-num_runs // num_devices) * num_devices

  def first_state(self, seed: int) -> state_lib.TrainState:
    """Returns the state of a run before its first step."""
    return self._init(run_lib.first_key(seed))

  def numbers(
    self, experiments: Sequence[experiment_lib.Experiment]
  ) -> dict[str, jax.Array]:
    """Returns the numbers of runs, each [R]; `rates` is [R, T] by step."""
    tables = [_rates(each) for each in experiments]
    found = {'rates': np.stack(tables)}
    for name in ('peak_lr', 'weight_decay', 'clip_norm'):
      found[name] = np.array(
        [getattr(each.optimizer, name) for each in experiments], np.float32
      )
    return self.placed(found)

  def placed(self, tree: Any) -> Any:
    """Returns arrays with a leading axis of runs on the devices."""
    return jax.device_put(tree, self._by_run)

  def train(
    self,
    states: state_lib.TrainState,
    batches: dict[str, np.ndarray],
    seeds_R: jax.Array,
    numbers: dict[str, jax.Array],
  ) -> tuple[state_lib.TrainState, dict[str, jax.Array]]:
    """Takes one step of every run. Donates `states`.

    Args:
      batches: host arrays [S, B, T], one batch for each seed.
      seeds_R: index of every run into `batches`.
      numbers: the result of `numbers`.
    """
    batches = jax.device_put(batches, self._shared)
    return self._train(states, batches, seeds_R, numbers)

  def evaluate(self, params: Any, batch: dict[str, np.ndarray]) -> Any:
    """Returns the sums of the evaluation step of every run, each [R, ...]."""
    return self._evaluate(params, jax.device_put(batch, self._shared))

  def _mapped_train(self, states, batches, seeds_R, numbers):
    def one(state, index, own):
      batch = jax.tree.map(lambda x: x[index], batches)
      step = step_lib.make_train_step(
        self.learner.model,
        self._experiment.objective,
        self._optimizer(own),
        num_microbatches=self._experiment.num_microbatches,
      )
      return step(state, batch)

    return self._mapped(one, states, seeds_R, numbers)

  def _mapped_evaluate(self, params, batch):
    step = step_lib.make_eval_step(
      self.learner.model, self._experiment.objective
    )
    return self._mapped(lambda own: step(own, batch), params)

  def _mapped(self, one, *args):
    """Maps a function over the runs of a device."""
    if self._mesh.devices.flat[0].platform != 'cpu':
      return jax.vmap(one)(*args)
    # As fast as vmap where one run fills a core (48 runs of a tiny model: 65 ms
    # with vmap, 71 ms so), and each run has the kernels, and so the rounding,
    # of a single run. Training at too high a rate is chaotic: rounding grows.
    return jax.lax.map(lambda each: one(*each), args)

  def _optimizer(self, own):
    experiment, rates_T = self._experiment, own['rates']
    optimizer = chain.make_optimizer(
      experiment.optimizer,
      experiment.num_steps,
      experiment.model,
      self.abstract_state.params,
      numbers=chain.Numbers(
        schedule=lambda count: rates_T[jnp.minimum(count, len(rates_T) - 1)],
        peak_lr=own['peak_lr'],
        weight_decay=own['weight_decay'],
        clip_norm=own['clip_norm'],
      ),
    )
    return spikes.skipping(experiment.spikes, optimizer)

  def _first_state(self, key):
    # The structure of the state depends on no number, so the optimizer of any
    # run will do.
    return state_lib.init(
      self.learner.model.clone(execution=execution_lib.Execution()),
      self.learner.optimizer,
      key,
      make_heads=functools.partial(
        self._experiment.objective.init_heads, self._experiment.model
      ),
    )


def _rates(experiment: experiment_lib.Experiment) -> np.ndarray:
  """Returns the learning rate of every step of a run, float32 [T]."""
  schedule = chain.make_schedule(experiment.optimizer, experiment.num_steps)
  steps_T = jnp.arange(experiment.num_steps)
  rates = jax.jit(lambda t: jax.vmap(schedule)(t))(steps_T)
  return np.broadcast_to(np.asarray(rates, np.float32), (experiment.num_steps,))
