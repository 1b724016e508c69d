"""The execution of a training run: the model's ports for the run's devices.

`choose` returns a `models.execution.Execution`: attention, loss, products with
weights, experts, pipeline stages and rematerialisation, as the experiment asks
and as the placement allows. An experiment that the devices cannot run as asked
is refused here, before anything is compiled.

`execution.attention` names one of four attention paths, which all compute the
same function:

    reference  models.attention.dense: plain array code, on any device
    splash     models.attention.splash_tpu: TPU
    cudnn      models.attention.cudnn_gpu: NVIDIA GPU, bfloat16
    auto       splash where devices and shapes allow it, else reference

`auto` takes splash on TPUs if the row length is a multiple of 128, the
attention weights have no dropout, and the heads divide among the devices of the
tensor axis. It never takes cudnn: the tests compile that path for GPUs, but it
has not been timed on one.

If the tokens of a row are split over devices (parallel.context > 1), attention
comes from `parallel.attention.context`; only `auto` and `reference` are
accepted.
"""

from collections.abc import Callable
import functools
from typing import Any

from checks import expect
from models import cross_entropy, execution as execution_lib, remat
from models.attention import cudnn_gpu, dense, splash_tpu
from models.linear import plain, quantized
from models.moe import dispatch
from parallel import (
  expert_parallel,
  pipeline,
  placement as placement_lib,
  sharded_loss,
)
from parallel.attention import context, sharded
from training import experiment as experiment_lib

_PLATFORMS = {'splash': ('tpu',), 'cudnn': ('gpu', 'cuda')}


def check_model(experiment: experiment_lib.Experiment) -> None:
  """Raises ValueError if the model does not divide as `parallel` asks."""
  model, parallel = experiment.model, experiment.parallel
  expect.multiple_of(
    'model.num_layers',
    model.num_layers,
    'parallel.stage x stage_repeats',
    parallel.stage * parallel.stage_repeats,
    'change one of them',
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
  """Raises ValueError if the experts do not divide over the devices."""
  model, parallel = experiment.model, experiment.parallel
  if parallel.expert == 1:
    return
  if not model.num_experts:
    raise ValueError(
      f'parallel.expert: got {parallel.expert} with a dense model, expected 1:'
      ' there are no experts to split; use parallel.fsdp or set'
      ' model.num_experts'
    )
  expect.divides(
    'parallel.expert',
    parallel.expert,
    'model.num_experts',
    model.num_experts,
    'every device holds the same number of experts; change one of them',
  )


def check_batch(experiment: experiment_lib.Experiment, num_shards: int) -> None:
  """Raises ValueError if batches and rows do not divide over the devices.

  Args:
    experiment: with the batch sizes and the row length.
    num_shards: devices, or groups of devices, that split the rows of a batch.
  """
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
  context.check_row_length(data.row_length, parallel.context)


def choose(
  experiment: experiment_lib.Experiment, placement: placement_lib.Placement
) -> execution_lib.Execution:
  """Returns the model's ports for the run's devices.

  Raises:
    ValueError: the devices cannot run the model as the experiment asks.
  """
  return execution_lib.Execution(
    remat=_remat(experiment, placement),
    attend=_attend(experiment, placement),
    weighted_nll=_weighted_nll(experiment, placement),
    linear=_linear(experiment),
    apply_experts=_apply_experts(placement),
    run_layers=_run_layers(experiment, placement),
  )


def attention_path(
  experiment: experiment_lib.Experiment, placement: placement_lib.Placement
) -> str:
  """Returns the attention path: reference, splash or cudnn.

  Raises:
    ValueError: the path that the experiment names cannot be taken.
  """
  asked = experiment.execution.attention
  if asked == 'reference':
    return asked
  if asked == 'auto':
    return (
      'reference' if _problem('splash', experiment, placement) else 'splash'
    )
  reason = _problem(asked, experiment, placement)
  if reason:
    raise ValueError(f'execution.attention = {asked}: {reason}')
  return asked


def _problem(
  path: str,
  experiment: experiment_lib.Experiment,
  placement: placement_lib.Placement,
) -> str:
  """Returns why `splash` or `cudnn` cannot be taken: got, expected, fix; ''."""
  model, time = experiment.model, experiment.data.row_length
  platform = placement.devices[0].platform
  if platform not in _PLATFORMS[path]:
    return (
      f'got devices of platform {platform}, expected {_PLATFORMS[path][0]};'
      ' set execution.attention = auto'
    )
  if model.dropout_rate:
    return (
      f'got model.dropout_rate = {model.dropout_rate}, expected 0: the kernel'
      ' never stores the weights that it would drop; change it or set'
      ' execution.attention = reference'
    )
  if experiment.parallel.context > 1:
    return (
      f'got parallel.context = {experiment.parallel.context}, expected 1: the'
      ' kernel sees whole rows; change it or set execution.attention = auto'
    )
  if model.latent_width:
    return (
      f'got model.latent_width = {model.latent_width}, expected 0: the kernel'
      ' wants keys and values of one width; set execution.attention = reference'
    )
  if path == 'cudnn' and (
    reason := cudnn_gpu.form_problem(model.attention_softcap)
  ):
    return reason
  mesh = getattr(placement, 'mesh', None)
  reason = (
    sharded.heads_problem(mesh, model.num_heads, model.num_kv_heads)
    if mesh is not None
    else ''
  )
  return (
    reason
    or {
      'splash': functools.partial(splash_tpu.row_length_problem, time),
      'cudnn': functools.partial(
        cudnn_gpu.shape_problem,
        time,
        model.head_width,
        experiment.compute_dtype,
      ),
    }[path]()
  )


def _attend(
  experiment: experiment_lib.Experiment, placement: placement_lib.Placement
) -> execution_lib.Attend:
  """Returns the attention of whole rows, or of rows split across devices."""
  path = attention_path(experiment, placement)
  if experiment.parallel.context > 1:
    assert isinstance(placement, placement_lib.MeshPlacement)
    return context.make_attend(
      placement.mesh, experiment.parallel.context_attention, remat.ATTENTION
    )
  if path == 'reference':
    return dense.attend
  local: Callable[..., Any] = {
    'splash': splash_tpu.attend,
    'cudnn': cudnn_gpu.attend,
  }[path]
  mesh = getattr(placement, 'mesh', None)
  return local if mesh is None else sharded.attend(local, mesh)


def _weighted_nll(
  experiment: experiment_lib.Experiment, placement: placement_lib.Placement
) -> execution_lib.WeightedNll:
  """Returns the loss, with explicit sums over a mesh that splits tokens."""
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
  """Returns the function that applies experts, split over a mesh if any."""
  if isinstance(placement, placement_lib.MeshPlacement):
    return expert_parallel.spread(dispatch.apply_experts, placement.mesh)
  return dispatch.apply_experts


def _run_layers(
  experiment: experiment_lib.Experiment, placement: placement_lib.Placement
) -> execution_lib.RunLayers | None:
  """Returns the pipeline of layers, or None without stages."""
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
  """Returns the rematerialisation policy.

  Raises:
    ValueError: the devices would silently run another policy.
  """
  asked = experiment.execution.remat
  # A CPU device has no memory besides the host's: XLA:CPU drops the transfers
  # of `offload`, which would then keep every activation in place.
  if asked == 'offload' and placement.devices[0].platform == 'cpu':
    raise ValueError(
      'execution.remat: got offload on devices of platform cpu, expected tpu or'
      ' gpu: a CPU has no other memory to send activations to; set'
      ' execution.remat = full, which stores the same'
    )
  return asked


def _linear(experiment: experiment_lib.Experiment) -> execution_lib.Linear:
  """Returns the matrix product in the format of `execution.matmul`."""
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
