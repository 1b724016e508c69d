"""The execution of a training run: the model's ports for the run's devices.

`choose` returns a `models.execution.Execution`: attention, loss, products with
weights, experts, pipeline stages and rematerialisation, as the experiment asks
and as the placement allows. An experiment that the devices cannot run as asked
is refused here, before anything is compiled.

`execution.attention` names one of four attention paths, which all compute the
same function:

    reference  models.attention.dense: plain array code, on any device
    splash     models.attention.kernels.splash_tpu: TPU
    cudnn      models.attention.kernels.cudnn_gpu: NVIDIA GPU, bfloat16
    auto       splash or cudnn where devices and shapes allow it, else reference

`models/attention/supports.py` lists the inputs that each path accepts. The
first lines of a run name the path, and why `auto` took plain attention.

If the tokens of a row are split over devices (parallel.context > 1), `auto` and
`reference` take parallel.context_attention, ring or gather, of
`parallel.attention.context`.
"""

from collections.abc import Callable, Sequence
import dataclasses
import functools
import re
from typing import Any

import jax
import jax.numpy as jnp

from checks import expect
from hardware import peaks
from models import execution as execution_lib, remat
from models.attention import dense, supports
from models.attention.kernels import cudnn_gpu, splash_tpu
from models.layers import cross_entropy
from models.linear import invariant_gradient, plain, quantized
from models.moe import dispatch
from parallel import (
  expert_parallel,
  pipeline,
  placement as placement_lib,
  sharded_loss,
)
from parallel.attention import context, sharded
from training import experiment as experiment_lib

# The attention of whole rows, and of rows split over devices, by the values of
# execution.attention and parallel.context_attention.
_PATHS = {
  'reference': supports.DENSE,
  'splash': supports.SPLASH,
  'cudnn': supports.CUDNN,
  'ring': supports.RING,
  'gather': supports.GATHER,
}


def check_model(experiment: experiment_lib.Experiment) -> None:
  """Raises ValueError for a model that the run cannot train.

  The model does not divide as `parallel` asks, or serving would compute another
  function.
  """
  model, parallel = experiment.model, experiment.parallel
  scaling, row_length = model.rope_scaling, experiment.data.row_length
  if scaling.kind == 'dynamic' and row_length > scaling.original_length:
    raise ValueError(
      f'data.row_length: got {row_length} with model.rope_scaling.kind ='
      f' dynamic, expected at most original_length = {scaling.original_length}:'
      ' the angles of a longer document depend on its later tokens, which'
      ' serving does not know; shorten the rows or train with kind yarn'
    )
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
  if parallel.stage > 1 and experiment.execution.layers == 'apart':
    raise ValueError(
      f'execution.layers: got apart with parallel.stage = {parallel.stage},'
      ' expected scanned or auto: a stage loops over its layers'
    )
  _check_experts(experiment)


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
  """Raises ValueError if batches do not divide over the devices.

  Args:
    experiment: with the batch sizes.
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


# Devices with at least this much memory hold 1 GiB of float32 logits at a time:
# on an H200, the loss at 50,304 ids takes 8.2 ms in 4 chunks and 9.1 in 16.
_LARGE_MEMORY, _LARGE_CHUNK = 40e9, 2**28
# A program with more layers, compiled apart, would compile for minutes.
_MOST_APART = 48


def settled(
  experiment: experiment_lib.Experiment, devices: Sequence[jax.Device]
) -> experiment_lib.Experiment:
  """Returns the experiment with its open choices made for the devices.

  `training.planning.choices` chooses by memory where memory costs time. Here,
  for learners without a plan, remat is none and a batch is not cut.
  """
  asked, device = experiment.execution, devices[0]
  is_accelerator = device.platform != 'cpu'
  is_large = is_accelerator and peaks.memory_bytes(device) >= _LARGE_MEMORY
  chunk = _LARGE_CHUNK if is_large else cross_entropy.MAX_CHUNK_LOGITS
  layers = asked.layers
  if layers == experiment_lib.AUTO:
    is_apart = (
      device.platform == 'gpu'
      and experiment.model.num_layers <= _MOST_APART
      and experiment.parallel.stage == 1
      # Plain attention has many kernels, each of which takes time to compile.
      and _path(experiment, device)[1] == 'cudnn'
    )
    layers = 'apart' if is_apart else 'scanned'
  return dataclasses.replace(
    experiment,
    execution=dataclasses.replace(
      asked,
      remat='none' if asked.remat == experiment_lib.AUTO else asked.remat,
      layers=layers,
      loss_chunk_logits=asked.loss_chunk_logits or chunk,
    ),
    num_microbatches=experiment.num_microbatches or 1,
  )


def choose(
  experiment: experiment_lib.Experiment,
  placement: placement_lib.Placement,
  max_documents: int | None = None,
) -> execution_lib.Execution:
  """Returns the model's ports for the run's devices.

  Args:
    max_documents: most documents of a row, padding counted as one; 0: unknown.
      None: as the packing of the experiment says.

  Raises:
    ValueError: the devices cannot run the model as the experiment asks.
  """
  found = execution_lib.Execution(
    remat=_remat(experiment, placement),
    attend=_attend(experiment, placement, max_documents),
    max_documents=(
      max_documents_of(experiment, placement, max_documents)
      if attention_path(experiment, placement) == 'cudnn'
      else 0
    ),
    weighted_nll=_weighted_nll(experiment, placement),
    linear=_linear(experiment),
    apply_experts=_apply_experts(placement),
    run_layers=_run_layers(experiment, placement),
    is_unrolled=experiment.execution.layers == 'apart',
    recomputes_activation=placement.devices[0].platform == 'gpu',
  )
  if experiment.computes_invariantly:
    _check_invariant(experiment, placement)
    return invariant_gradient.execution(found)
  return found


def _check_invariant(
  experiment: experiment_lib.Experiment, placement: placement_lib.Placement
) -> None:
  """Refuses a pass whose bits the invariant sampler would not have."""
  model, parallel = experiment.model, experiment.parallel
  asked = experiment.execution
  for name, got, wanted in (
    ('execution.attention', attention_path(experiment, placement), 'reference'),
    ('execution.matmul', asked.matmul, 'float'),
    ('parallel.context', parallel.context, 1),
    ('parallel.tensor', parallel.tensor, 1),
    ('parallel.stage', parallel.stage, 1),
    ('model.latent_width', model.latent_width, 0),
  ):
    if got != wanted:
      raise ValueError(
        f'{name}: got {got} with rollouts.numerics = invariant, expected'
        f' {wanted}: sampler and trainer would not have the same bits; set it,'
        ' or rollouts.numerics = fast'
      )


def attention_path(
  experiment: experiment_lib.Experiment, placement: placement_lib.Placement
) -> str:
  """Returns the attention path: reference, splash, cudnn, ring or gather.

  Raises:
    ValueError: the path that the experiment names cannot be taken.
  """
  name, path, request = _path(experiment, placement.devices[0])
  if problem := supports.problem(_PATHS[path], request):
    raise ValueError(f'{name} = {path}: {problem}')
  return path


def _path(
  experiment: experiment_lib.Experiment, device: jax.Device
) -> tuple[str, str, supports.Request]:
  """Returns the field that names the path, the path, and the request."""
  path, parallel = experiment.execution.attention, experiment.parallel
  name, request = 'execution.attention', _request(experiment, device)
  if path == 'auto':
    fused, refusal = _fused(request)
    path = 'reference' if refusal else fused
  if path == 'reference' and parallel.context > 1:
    name, path = 'parallel.context_attention', parallel.context_attention
  return name, path, request


def _fused(request: supports.Request) -> tuple[str, str]:
  """Returns the fused path of the devices, and why it refuses the request."""
  path = 'splash' if request.platform == 'tpu' else 'cudnn'
  return path, supports.problem(_PATHS[path], request)


def max_documents_of(
  experiment: experiment_lib.Experiment,
  placement: placement_lib.Placement,
  max_documents: int | None = None,
) -> int:
  """Returns the most documents of a row that kernels may rely on; 0: unknown.

  Args:
    max_documents: as for `choose`.
  """
  if max_documents is None:
    alone = experiment.data.packing in ('none', 'windows')
    max_documents = 1 if alone else 0
  # cuDNN takes lengths of documents since Hopper.
  is_hopper = _capability(placement.devices[0]) >= (9, 0)
  return max_documents if max_documents == 1 or is_hopper else 0


def describe_attention(
  experiment: experiment_lib.Experiment,
  placement: placement_lib.Placement,
  max_documents: int | None = None,
) -> str:
  """Returns the attention path, and the reason for it, as text."""
  path = attention_path(experiment, placement)
  request = _request(experiment, placement.devices[0])
  asked, is_cpu = experiment.execution.attention, request.platform == 'cpu'
  if asked == 'auto' and path not in ('splash', 'cudnn') and not is_cpu:
    fused, refusal = _fused(request)
    return f'{path}, because {fused} attention refuses: {refusal}'
  if path != 'cudnn':
    return path
  most = max_documents_of(experiment, placement, max_documents)
  return {
    'causal': 'cudnn, causal only: a row has one document',
    'packed': f'cudnn, by lengths of at most {most} documents of a row',
    'mask': 'cudnn, with a mask of the documents of each row',
  }[cudnn_gpu.way(most, request.form.window)]


def _request(
  experiment: experiment_lib.Experiment, device: jax.Device
) -> supports.Request:
  """Returns the request of a run, for the table of attention paths."""
  model, parallel = experiment.model, experiment.parallel
  return dataclasses.replace(
    supports.of_model(model),
    platform=device.platform,
    capability=_capability(device),
    context=parallel.context,
    tensor=parallel.tensor,
    has_dropout=model.dropout_rate > 0,
    has_segments=True,
    dtype=jnp.dtype(experiment.compute_dtype).name,
    row_length=experiment.data.row_length,
  )


def _capability(device: jax.Device) -> tuple[int, int]:
  """Returns the compute capability of an NVIDIA GPU, else (0, 0)."""
  number = getattr(device, 'compute_capability', '')
  match = re.fullmatch(r'(\d+)\.(\d+)', str(number))
  return (int(match[1]), int(match[2])) if match else (0, 0)


def _attend(
  experiment: experiment_lib.Experiment,
  placement: placement_lib.Placement,
  max_documents: int | None,
) -> execution_lib.Attend:
  """Returns the attention of whole rows, or of rows split across devices."""
  path = attention_path(experiment, placement)
  if path in ('ring', 'gather'):
    assert isinstance(placement, placement_lib.MeshPlacement)
    return context.make_attend(placement.mesh, path, remat.ATTENTION)
  if path == 'reference':
    if placement.devices[0].platform == 'cpu':
      return dense.attend
    return functools.partial(
      dense.attend, min_rows=dense.MIN_WIDE_ROWS, max_apart=dense.FEW_TILES
    )
  most = max_documents_of(experiment, placement, max_documents)
  local: Callable[..., Any] = {
    'splash': splash_tpu.attend,
    'cudnn': functools.partial(cudnn_gpu.attend, max_documents=most),
  }[path]
  mesh = getattr(placement, 'mesh', None)
  return local if mesh is None else sharded.attend(local, mesh)


def _weighted_nll(
  experiment: experiment_lib.Experiment, placement: placement_lib.Placement
) -> execution_lib.WeightedNll:
  """Returns the loss, with explicit sums over a mesh that splits tokens."""
  nll, most = cross_entropy.chunked_nll, experiment.execution.loss_chunk_logits
  if most != cross_entropy.MAX_CHUNK_LOGITS:
    nll = functools.partial(nll, max_logits=most)
  is_mesh = isinstance(placement, placement_lib.MeshPlacement)
  if not is_mesh or placement.mesh.size == 1:
    return nll
  sharded_loss.check_row_length(experiment.data.row_length, placement.mesh)
  return sharded_loss.make_weighted_nll(nll, placement.mesh)


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
