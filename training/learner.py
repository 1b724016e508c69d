"""What learns: a model, its optimizer, and how both lie on the devices.

Everything that an experiment says but its data; `training/assemble.py` adds
that. `train.py --plan` stops here: nothing in this file allocates.
"""

from collections.abc import Callable, Sequence
import dataclasses
import functools
from typing import Any

from flax import linen as nn
import jax
import jax.numpy as jnp
import optax

from hardware import peaks
from models import axes, execution as execution_lib, flops, transformer
from parallel import placement as placement_lib
from training import (
  execution,
  experiment as experiment_lib,
  state as state_lib,
  step as step_lib,
)
from training.optimizer import chain, spikes


@dataclasses.dataclass(frozen=True, kw_only=True)
class Learner:
  """A model on its devices, before it has any values."""

  experiment: experiment_lib.Experiment
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

  @property
  def objective(self) -> step_lib.Objective:
    """The experiment's, told what else the experiment wants in the loss."""
    objective = self.experiment.objective
    weight = self.experiment.z_loss_weight
    if not weight:
      return objective
    return functools.partial(objective, z_loss_weight=weight)

  def init(self, key: jax.Array) -> state_lib.TrainState:
    """Returns the state before the first step, on the devices."""
    # With nothing of the mesh's: a model is initialised on a single token.
    model = self.model.clone(execution=execution_lib.Execution())
    return self.placement.init(
      lambda key: state_lib.init(
        model,
        self.optimizer,
        key,
        has_average=self.experiment.ema_decay > 0,
      ),
      key,
    )

  def peak_flops_per_s(self) -> float:
    """Returns what all devices together can do at best in the model's dtype."""
    dtype = jnp.dtype(self.experiment.compute_dtype).name
    return sum(
      peaks.peaks(device).flops_per_s[dtype]
      for device in self.placement.devices
    )

  def build_train_step(self, all_sum: Any, shard_key: Any) -> Any:
    """What `placement.compile_train` and `lower_train` take."""
    return step_lib.make_train_step(
      self.model,
      self.objective,
      self.optimizer,
      num_microbatches=self.experiment.num_microbatches,
      ema_decay=self.experiment.ema_decay,
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
        self.model, self.objective, all_sum=all_sum
      )
    )

  def batch_shapes(self) -> dict[str, jax.ShapeDtypeStruct]:
    """Returns what a batch looks like; the last, where batches grow."""
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
  experiment: experiment_lib.Experiment,
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
  optimizer = chain.make_optimizer(
    experiment.optimizer,
    experiment.num_steps,
    experiment.model,
    state_lib.abstract_params(model),
    is_staged=experiment.parallel.stage > 1,
  )
  optimizer = spikes.skipping(experiment.spikes, optimizer)
  abstract_state = jax.eval_shape(
    lambda key: state_lib.init(
      model, optimizer, key, has_average=experiment.ema_decay > 0
    ),
    jax.random.key(0),
  )
  execution.check_model(experiment)
  placement = placement_lib.make(
    experiment.parallel,
    abstract_state,
    state_lib.logical_axes(
      abstract_state, axes.param_axes(abstract_state.params)
    ),
    devices,
  )
  execution.check_batch(experiment, placement.num_batch_shards)
  return Learner(
    experiment=experiment,
    model=model.clone(execution=execution.choose(experiment, placement)),
    schedule=chain.make_schedule(experiment.optimizer, experiment.num_steps),
    optimizer=optimizer,
    placement=placement,
    abstract_state=abstract_state,
    flops_per_token=flops.train_flops_per_token(
      experiment.model, experiment.data.row_length
    ),
  )
