"""Which attention a run computes with: `execution.attention`, resolved.

    reference  models.attention.dense: plain array code, on any device
    splash     models.attention.splash_tpu: TPU
    cudnn      models.attention.cudnn_gpu: NVIDIA GPU, bfloat16
    auto       splash where devices and shapes allow it, else reference

All compute the same function. `auto` takes splash on TPUs if the row length is
a multiple of 128, nothing is dropped from the attention weights and the heads
divide among the devices of the tensor axis. It never takes cudnn: that path is
compiled for GPUs by the tests but has not been timed on one.

Where the tokens of a row are split (parallel.context > 1) attention is the
business of `parallel.context`, and only `auto` and `reference` are accepted.
"""

from collections.abc import Callable
import functools
from typing import Any

from models.attention import cudnn_gpu, dense, splash_tpu
from parallel import placement as placement_lib
from parallel.attention import sharded
from training import experiment as experiment_lib

_PLATFORMS = {'splash': ('tpu',), 'cudnn': ('gpu', 'cuda')}


def attend(
  experiment: experiment_lib.Experiment, placement: placement_lib.Placement
) -> Callable[..., Any]:
  """Returns the model's `attend` port for rows that are not split.

  Raises:
    ValueError: the path asked for cannot be taken here.
  """
  path = resolve(experiment, placement)
  if path == 'reference':
    return dense.attend
  local = {'splash': splash_tpu.attend, 'cudnn': cudnn_gpu.attend}[path]
  mesh = getattr(placement, 'mesh', None)
  return local if mesh is None else sharded.attend(local, mesh)


def resolve(
  experiment: experiment_lib.Experiment, placement: placement_lib.Placement
) -> str:
  """Returns reference, splash or cudnn.

  Raises:
    ValueError: the path asked for cannot be taken here.
  """
  asked = experiment.execution.attention
  if asked == 'reference':
    return asked
  if asked == 'auto':
    return 'reference' if problem('splash', experiment, placement) else 'splash'
  reason = problem(asked, experiment, placement)
  if reason:
    raise ValueError(f'execution.attention = {asked}: {reason}')
  return asked


def problem(
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
