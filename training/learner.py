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
from models import (
  axes,
  cross_entropy,
  execution as execution_lib,
  flops,
  remat,
  transformer,
)
from models.linear import plain, quantized
from models.moe import dispatch
from parallel import (
  expert_parallel,
  pipeline,
  placement as placement_lib,
  sharded_loss,
)
from parallel.attention import context
from training import (
  attention_path,
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
  _check_model(experiment)
  placement = placement_lib.make(
    experiment.parallel,
    abstract_state,
    state_lib.logical_axes(
      abstract_state, axes.param_axes(abstract_state.params)
    ),
    devices,
  )
  _check_batch(experiment, placement.num_batch_shards)
  return Learner(
    experiment=experiment,
    model=model.clone(execution=_execution(experiment, placement)),
    schedule=chain.make_schedule(experiment.optimizer, experiment.num_steps),
    optimizer=optimizer,
    placement=placement,
    abstract_state=abstract_state,
    flops_per_token=flops.train_flops_per_token(
      experiment.model, experiment.data.row_length
    ),
  )


def _execution(
  experiment: experiment_lib.Experiment, placement: placement_lib.Placement
) -> execution_lib.Execution:
  """Joins the model's ports to what the experiment and its devices ask for."""
  return execution_lib.Execution(
    remat=_remat(experiment, placement),
    attend=_attend(experiment, placement),
    weighted_nll=_weighted_nll(experiment, placement),
    linear=_linear(experiment),
    apply_experts=_apply_experts(placement),
    run_layers=_run_layers(experiment, placement),
  )


def _attend(
  experiment: experiment_lib.Experiment, placement: placement_lib.Placement
) -> execution_lib.Attend:
  """Returns the attention of whole rows, or of rows split across devices."""
  attend = attention_path.attend(experiment, placement)
  if experiment.parallel.context == 1:
    return attend
  assert isinstance(placement, placement_lib.MeshPlacement)
  return context.make_attend(
    placement.mesh, experiment.parallel.context_attention, remat.ATTENTION
  )


def _weighted_nll(
  experiment: experiment_lib.Experiment, placement: placement_lib.Placement
) -> execution_lib.WeightedNll:
  """Returns the loss, summed by hand where a mesh splits its tokens."""
  is_mesh = isinstance(placement, placement_lib.MeshPlacement)
  if not is_mesh or placement.mesh.size == 1:
    return cross_entropy.chunked_nll
  sharded_loss.check_row_length(experiment.data.row_length, placement.mesh)
  return sharded_loss.make_weighted_nll(
    cross_entropy.chunked_nll, placement.mesh
  )


def _apply_experts(
  placement: placement_lib.Placement,
) -> execution_lib.ApplyExperts:
  """Returns what applies the experts of a mixture on the run's devices."""
  if isinstance(placement, placement_lib.MeshPlacement):
    return expert_parallel.spread(dispatch.apply_experts, placement.mesh)
  return dispatch.apply_experts


def _run_layers(
  experiment: experiment_lib.Experiment, placement: placement_lib.Placement
) -> execution_lib.RunLayers | None:
  """Returns the pipeline that `parallel` asks for, if any."""
  parallel, kept = experiment.parallel, experiment.execution.remat
  if parallel.stage == 1:
    return None
  assert isinstance(placement, placement_lib.MeshPlacement)
  return pipeline.make_run_layers(
    placement.mesh,
    repeats=parallel.stage_repeats,
    num_microbatches=parallel.num_stage_microbatches,
    policy=None if kept == 'none' else remat.policy(kept),
  )


def _remat(
  experiment: experiment_lib.Experiment, placement: placement_lib.Placement
) -> str:
  """Returns the policy; refuses one that would silently be another."""
  asked = experiment.execution.remat
  # XLA:CPU drops transfers to the host's memory: it has no other.
  if asked == 'offload' and placement.devices[0].platform == 'cpu':
    raise ValueError(
      'execution.remat: got offload on devices of platform cpu, expected tpu or'
      ' gpu: a CPU has no other memory to send activations to; set'
      ' execution.remat = full, which stores the same'
    )
  return asked


def _linear(experiment: experiment_lib.Experiment) -> execution_lib.Linear:
  """Returns the product with a weight that `execution.matmul` names."""
  matmul, num_experts = (
    experiment.execution.matmul,
    experiment.model.num_experts,
  )
  if matmul == 'float':
    return plain.linear
  if num_experts:
    raise ValueError(
      f'execution.matmul: got {matmul} with model.num_experts = {num_experts},'
      ' expected float: grouped products of experts are not quantised; set'
      ' execution.matmul = float'
    )
  quantized.check_installed()
  return {'int8': quantized.int8, 'fp8': quantized.fp8}[matmul]


def _check_model(experiment: experiment_lib.Experiment) -> None:
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
  _check_experts(experiment)
  if parallel.context > 1:
    context.kv_repeats(model.num_heads, model.num_kv_heads, parallel.tensor)
  if parallel.context > 1 and model.dropout_rate > 0:
    raise ValueError(
      f'model.dropout_rate: got {model.dropout_rate} with parallel.context ='
      f' {parallel.context}, expected 0: no device has all attention weights'
      ' of a query; change one of them'
    )


def _check_experts(experiment: experiment_lib.Experiment) -> None:
  """Refuses experts that cannot be dealt out over the devices."""
  model, parallel = experiment.model, experiment.parallel
  if parallel.expert == 1:
    return
  if not model.num_experts:
    raise ValueError(
      f'parallel.expert: got {parallel.expert} with a dense model, expected 1:'
      ' there are no experts to split; use parallel.fsdp or set'
      ' model.num_experts'
    )
  if model.num_experts % parallel.expert:
    raise ValueError(
      f'parallel.expert: got {parallel.expert} for model.num_experts ='
      f' {model.num_experts}, expected a divisor of it: each device holds as'
      ' many experts as the next; change one of them'
    )


def _check_batch(
  experiment: experiment_lib.Experiment, num_shards: int
) -> None:
  data, parallel = experiment.data, experiment.parallel
  parts = num_shards * parallel.num_stage_microbatches
  for size in data.batch_sizes:
    rows = size // experiment.num_microbatches
    if rows % parts == 0:
      continue
    stages = (
      f' x {parallel.num_stage_microbatches} parts for the stages'
      if parallel.stage > 1
      else ''
    )
    name = 'batch_size' if size == data.batch_size else 'batch_ramp'
    raise ValueError(
      f'data.{name}: got {size} rows in'
      f' {experiment.num_microbatches} micro-batches of {rows}, expected a'
      f' multiple of the {num_shards} devices that split the batch{stages};'
      f' change data.{name}, config.num_microbatches or parallel'
    )
  if data.row_length % (2 * parallel.context) and parallel.context > 1:
    raise ValueError(
      f'data.row_length: got {data.row_length}, expected a multiple of 2 x'
      f' parallel.context = {2 * parallel.context}; change one of them'
    )
