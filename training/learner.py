"""What learns: a model, its optimizer, and how both lie on the devices.

Everything that an experiment says but its data; `training/assemble.py` adds
that. `train.py --plan` stops here: nothing in this file allocates.
"""

from collections.abc import Callable, Sequence
import dataclasses
from typing import Any

from flax import linen as nn
import jax
import jax.numpy as jnp
import optax

from models import axes, execution as execution_lib, flops, transformer
from parallel import device_peaks, placement as placement_lib
from training import (
  config as config_lib,
  optimizer as optimizer_lib,
  state as state_lib,
  step as step_lib,
)


@dataclasses.dataclass(frozen=True, kw_only=True)
class Learner:
  """A model on its devices, before it has any values."""

  experiment: config_lib.Experiment
  model: nn.Module
  schedule: Callable[[Any], Any]  # learning rate of a step
  optimizer: optax.GradientTransformation
  placement: placement_lib.Placement
  abstract_state: state_lib.TrainState  # shapes and dtypes, whole
  flops_per_token: float  # analytic, of training

  @property
  def num_params(self) -> int:
    """Returns how many numbers are trained."""
    return sum(x.size for x in jax.tree.leaves(self.abstract_state.params))

  def init(self, key: jax.Array) -> state_lib.TrainState:
    """Returns the state before the first step, on the devices."""
    return self.placement.init(
      lambda key: state_lib.init(self.model, self.optimizer, key), key
    )

  def peak_flops_per_s(self) -> float:
    """Returns what all devices together can do at best in the model's dtype."""
    dtype = jnp.dtype(self.experiment.compute_dtype).name
    return sum(
      device_peaks.peaks(device).flops_per_s[dtype]
      for device in self.placement.devices
    )

  def build_train_step(self, all_sum: Any, shard_key: Any) -> Any:
    """What `placement.compile_train` and `lower_train` take."""
    return step_lib.make_train_step(
      self.model,
      self.experiment.objective,
      self.optimizer,
      num_microbatches=self.experiment.num_microbatches,
      all_sum=all_sum,
      shard_key=shard_key,
    )

  def compile_train_step(self) -> step_lib.TrainStep:
    """Returns the train step on the run's devices. Donates its state."""
    return self.placement.compile_train(self.build_train_step)

  def compile_eval_step(self) -> Callable[[Any, Any], dict[str, Any]]:
    """Returns the evaluation step on the run's devices."""
    return self.placement.compile_eval(
      lambda all_sum, _: step_lib.make_eval_step(
        self.model, self.experiment.objective, all_sum=all_sum
      )
    )

  def batch_shapes(self) -> dict[str, jax.ShapeDtypeStruct]:
    """Returns what a batch looks like."""
    data = self.experiment.data
    shape = data.batch_size, data.row_length
    dtypes = dict.fromkeys(
      ('tokens', 'targets', 'positions', 'segment_ids'), jnp.int32
    )
    return {
      name: jax.ShapeDtypeStruct(shape, dtype)
      for name, dtype in (dtypes | {'weights': jnp.float32}).items()
    }


def make(
  experiment: config_lib.Experiment,
  devices: Sequence[jax.Device] | None = None,
) -> Learner:
  """Builds the learner of a validated experiment.

  Args:
    experiment: what to run.
    devices: all devices if None; those of an ahead-of-time target else.

  Raises:
    ValueError: model, batch and devices do not fit each other.
  """
  dtype = jnp.dtype(experiment.compute_dtype)
  model = transformer.Transformer(experiment.model, dtype)
  optimizer = optimizer_lib.make_optimizer(
    experiment.optimizer, experiment.num_steps
  )
  abstract_state = jax.eval_shape(
    lambda key: state_lib.init(model, optimizer, key), jax.random.key(0)
  )
  _check_model(experiment)
  placement = placement_lib.make(
    experiment.parallel,
    abstract_state,
    state_lib.logical_axes(
      abstract_state, optimizer, axes.param_axes(abstract_state.params)
    ),
    devices,
  )
  _check_batch(experiment, placement.num_batch_shards)
  return Learner(
    experiment=experiment,
    model=model.clone(execution=_execution(experiment, placement)),
    schedule=optimizer_lib.make_schedule(
      experiment.optimizer, experiment.num_steps
    ),
    optimizer=optimizer,
    placement=placement,
    abstract_state=abstract_state,
    flops_per_token=flops.train_flops_per_token(
      experiment.model, experiment.data.row_length
    ),
  )


def _execution(
  experiment: config_lib.Experiment, placement: placement_lib.Placement
) -> execution_lib.Execution:
  """Joins the model's ports to what the experiment and its devices ask for."""
  del placement
  return execution_lib.Execution(remat=experiment.execution.remat)


def _check_model(experiment: config_lib.Experiment) -> None:
  """Refuses a model that cannot be cut up as the experiment asks."""
  model, parallel = experiment.model, experiment.parallel
  pieces = parallel.stage * parallel.stage_repeats
  if model.num_layers % pieces:
    raise ValueError(
      f'model.num_layers: got {model.num_layers}, expected a multiple of'
      f' parallel.stage x stage_repeats = {pieces}; change one of them'
    )
  if parallel.stage > 1 and not model.scan_layers:
    raise ValueError(
      f'model.scan_layers: got False with parallel.stage = {parallel.stage},'
      ' expected True: stages take their layers from a stack'
    )


def _check_batch(experiment: config_lib.Experiment, num_shards: int) -> None:
  data, parallel = experiment.data, experiment.parallel
  rows = data.batch_size // experiment.num_microbatches
  parts = num_shards * parallel.num_stage_microbatches
  if rows % parts:
    stages = (
      f' x {parallel.num_stage_microbatches} parts for the stages'
      if parallel.stage > 1
      else ''
    )
    raise ValueError(
      f'data.batch_size: got {data.batch_size} rows in'
      f' {experiment.num_microbatches} micro-batches of {rows}, expected a'
      f' multiple of the {num_shards} devices that split the batch{stages};'
      ' change data.batch_size, config.num_microbatches or parallel'
    )
  if data.row_length % (2 * parallel.context) and parallel.context > 1:
    raise ValueError(
      f'data.row_length: got {data.row_length}, expected a multiple of 2 x'
      f' parallel.context = {2 * parallel.context}; change one of them'
    )
