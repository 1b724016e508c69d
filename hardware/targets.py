"""Targets: absent devices for which `--plan` compiles ahead of time.

    targets.prepare_environment()    # before anything imports jax
    target = targets.parse('v5p:4x4x4')
    devices = targets.devices(target)

`v5p:4x4x4` is a slice of TPU chips in a torus; `h100:8` is eight GPUs; `cpu:8`
is this machine's CPU as eight devices, which needs no other compiler. XLA's
own compilers need no device: libtpu compiles for a TPU; the CUDA plugin
compiles for a GPU, from a description that this file writes from datasheets.
Peak rates come from `hardware.peaks`, under the device kinds that jax reports
for present devices.

Importing this file does not import jax, which reads its environment once.

Breaks first when jax moves: `jax.experimental.topologies`, libtpu's environment
variables, and the text form of XLA's GpuTargetConfigProto.
"""

import dataclasses
import glob
import math
import os
import re
import sys
from typing import Any

from checks import expect

# Without these variables libtpu would look for a TPU machine, wait for a
# metadata server and complain that it found neither. Its lock file, which keeps
# two processes off one TPU, would refuse a second plan on this machine. jax
# would try CUDA and report that it is missing, although nothing runs on it.
_ENVIRONMENT = {
  'JAX_PLATFORMS': 'cpu',
  'TPU_SKIP_MDS_QUERY': '1',
  'TPU_WORKER_HOSTNAMES': 'localhost',
  'TPU_ACCELERATOR_TYPE': 'v5litepod-8',
  'ALLOW_MULTIPLE_LIBTPU_LOAD': '1',
  'CUDA_VISIBLE_DEVICES': '',
  # Warnings of libtpu and XLA about absent devices are noise here.
  'TF_CPP_MIN_LOG_LEVEL': '3',
  'TPU_STDERR_LOG_LEVEL': '3',
  'TPU_MIN_LOG_LEVEL': '3',
}


@dataclasses.dataclass(frozen=True, kw_only=True)
class _Tpu:
  """A generation of TPU."""

  device_kind: str  # as jax reports it; keys hardware.peaks.DATASHEETS
  num_dims: int  # of the torus
  most_chips: int  # of one slice; docs.cloud.google.com/tpu/docs
  devices_per_chip: int = 1
  options: tuple[tuple[str, Any], ...] = ()  # for libtpu
  # Slices that are rented, smallest first; docs.cloud.google.com/tpu/docs.
  slices: tuple[str, ...] = ()


_SLICES_2D = ['1x1', '2x2', '2x4', '4x4', '4x8', '8x8', '8x16', '16x16']
_SLICES_3D = [
  '2x2x1',
  '2x2x2',
  '2x2x4',
  '2x4x4',
  '4x4x4',
  '4x4x8',
  '4x8x8',
  '8x8x8',
]
_TPUS = {
  # As on a real v4: the two cores of a chip are one jax device.
  'v4': _Tpu(
    device_kind='TPU v4',
    num_dims=3,
    most_chips=4096,
    options=(('chip_config_name', 'megacore'),),
    slices=tuple(_SLICES_3D),
  ),
  'v5e': _Tpu(
    device_kind='TPU v5 lite',
    num_dims=2,
    most_chips=256,
    slices=tuple(_SLICES_2D),
  ),
  'v5p': _Tpu(
    device_kind='TPU v5',
    num_dims=3,
    most_chips=8960,
    slices=tuple(_SLICES_3D),
  ),
  'v6e': _Tpu(
    device_kind='TPU v6 lite',
    num_dims=2,
    most_chips=256,
    slices=tuple(_SLICES_2D),
  ),
  'tpu7x': _Tpu(
    device_kind='TPU7x',
    num_dims=3,
    most_chips=9216,
    devices_per_chip=2,
    slices=tuple(_SLICES_3D),
  ),
}
_GPUS = {
  'a100': 'NVIDIA A100-SXM4-80GB',
  'h100': 'NVIDIA H100 80GB HBM3',
  'h200': 'NVIDIA H200',
}
_CPU = 'cpu'  # the generation of this machine's CPU
_MOST_CPU_DEVICES = 64
# Device files of TPUs (up to v4; from v5 on), of NVIDIA and AMD GPUs, and of
# GPUs under WSL.
_ACCELERATORS = (
  '/dev/accel*', '/dev/vfio/*', '/dev/nvidia*', '/dev/kfd', '/dev/dxg',
)  # fmt: skip
HERE = 'here'  # value of --plan: the devices of this machine, no target
GPUS_PER_HOST = 8  # all connected by NVLink
_EXAMPLES = 'v5e:2x4, v5p:4x4x4, h100:8 or cpu:1'


class TargetError(ValueError):
  """A target is unknown or impossible; the message is for the user."""


@dataclasses.dataclass(frozen=True, kw_only=True)
class Target:
  """A set of absent devices."""

  name: str  # 'v5p:4x4x4'
  generation: str  # 'v5p'
  device_kind: str  # keys hardware.peaks.DATASHEETS
  shape: tuple[int, ...]  # chips along each axis, or number of GPUs
  num_devices: int
  is_tpu: bool


def parse(name: str) -> Target:
  """Returns the target of that name; imports and compiles nothing.

  Raises:
    TargetError: the name is unknown, or its size is impossible.
  """
  generation, _, size = name.partition(':')
  known = [*_TPUS, *_GPUS, _CPU]
  if generation not in known:
    raise TargetError(
      f'--plan: got the unknown target {name!r}, expected one of'
      f' {", ".join(known)} with a size, as in {_EXAMPLES}'
      f'{expect.meant(generation, known)}'
    )
  is_tpu = generation in _TPUS
  num_dims = _TPUS[generation].num_dims if is_tpu else 1
  if not re.fullmatch('x'.join([r'[1-9]\d*'] * num_dims), size):
    expected = (
      f'{num_dims} sizes, as in {generation}:{"x".join("4" * num_dims)}'
      if is_tpu
      else f'a number of devices, as in {generation}:8'
    )
    raise TargetError(f'--plan: got {name!r}, expected {expected}')
  shape = tuple(int(part) for part in size.split('x'))
  num_devices = math.prod(shape)
  if is_tpu:
    if num_devices > _TPUS[generation].most_chips:
      raise TargetError(
        f'--plan: got {name!r} of {num_devices} chips, expected at most'
        f' {_TPUS[generation].most_chips}, the largest slice of {generation};'
        ' plan for a smaller one'
      )
    num_devices *= _TPUS[generation].devices_per_chip
  elif generation == _CPU:
    if num_devices > _MOST_CPU_DEVICES:
      raise TargetError(
        f'--plan: got {name!r}, expected at most {_MOST_CPU_DEVICES} devices of'
        ' one CPU; lower it'
      )
  elif num_devices > GPUS_PER_HOST and num_devices % GPUS_PER_HOST:
    raise TargetError(
      f'--plan: got {name!r}, expected at most {GPUS_PER_HOST} devices or a'
      f' multiple of {GPUS_PER_HOST}: a plan uses all GPUs of each host'
    )
  return Target(
    name=name,
    generation=generation,
    device_kind=(
      _TPUS[generation].device_kind
      if is_tpu
      else _GPUS.get(generation, generation)
    ),
    shape=shape,
    num_devices=num_devices,
    is_tpu=is_tpu,
  )


def slices(target: Target) -> tuple[tuple[str, int], ...]:
  """Returns slices of the target's generation, smallest first.

  Each with its number of devices; of GPUs, whole numbers of hosts or the half
  and the quarter of one.
  """
  generation = _TPUS.get(target.generation)
  sizes = [str(1 << power) for power in range(8)]
  sizes = generation.slices if generation else sizes
  if target.generation == _CPU:
    return ()
  names = [f'{target.generation}:{size}' for size in sizes]
  return tuple((name, parse(name).num_devices) for name in names)


def prepare_environment() -> None:
  """Prepares this process to compile for absent devices without noise.

  Call it before jax looks for devices. The process then sees only its CPU.
  """
  os.environ.update(_ENVIRONMENT)
  if 'jax' in sys.modules:  # jax read its environment when it was imported
    sys.modules['jax'].config.update('jax_platforms', 'cpu')


def prepare_for(plan: str | None) -> None:
  """Prepares the environment for a value of `--plan`.

  With a target, as `prepare_environment`. Without one, jax is kept from looking
  for accelerators on a machine that has none: with their compilers installed
  (requirements-plan.txt) it would take seconds to report that none is there.
  A user's own JAX_PLATFORMS wins.
  """
  if plan and plan != HERE:
    prepare_environment()
    if match := re.fullmatch(rf'{_CPU}:(\d+)', plan):
      option = '--xla_force_host_platform_device_count'
      given = os.environ.get('XLA_FLAGS', '')
      os.environ['XLA_FLAGS'] = f'{given} {option}={match[1]}'.strip()
  elif sys.platform == 'linux' and not any(map(glob.glob, _ACCELERATORS)):
    os.environ.setdefault('JAX_PLATFORMS', 'cpu')


def with_default(
  argv: list[str], flag: str = 'plan', value: str = HERE
) -> list[str]:
  """Returns argv with a bare `--plan` as `--plan=here`."""
  return [
    f'{arg}={value}' if arg in (f'-{flag}', f'--{flag}') else arg
    for arg in argv
  ]


def value_in(argv: list[str], flag: str = 'plan') -> str | None:
  """Returns the flag's value in argv, after `with_default`; None if absent."""
  for arg in argv[1:]:
    name, _, value = arg.partition('=')
    if name in (f'-{flag}', f'--{flag}'):
      return value
  return None


def devices(target: Target) -> list[Any]:
  """Returns the target's devices: a mesh can be made of them, nothing run.

  Raises:
    TargetError: the topology does not exist, or its compiler is not installed.
  """
  from jax.experimental import topologies

  if target.generation == _CPU:
    import jax

    found = jax.devices(_CPU)
    if len(found) < target.num_devices:
      raise TargetError(
        f'--plan: got {target.name!r}, expected at most the {len(found)}'
        ' devices that this process has; set XLA_FLAGS='
        f'--xla_force_host_platform_device_count={target.num_devices}'
      )
    return found[: target.num_devices]
  try:
    if target.is_tpu:
      generation = _TPUS[target.generation]
      options = dict(generation.options)
      if math.prod(target.shape) == 1:
        # By default libtpu gives a host four chips.
        options['chips_per_host_bounds'] = (1, 1, 1)
      topology = topologies.get_topology_desc(
        platform='tpu', topology_name=target.name, **options
      )
    else:
      hosts = -(-target.num_devices // GPUS_PER_HOST)
      topology = topologies.get_topology_desc(
        platform='cuda',
        target_config=gpu_description(target),
        topology=f'1x{hosts}x{target.num_devices // hosts}',
      )
  except Exception as error:  # each compiler raises a class of its own
    raise TargetError(_why_not(target, error)) from None
  return list(topology.devices)


def _why_not(target: Target, error: Exception) -> str:
  """Returns the error text: no such topology, or a missing compiler."""
  message = str(error).split('\n')[0]
  package = 'libtpu' if target.is_tpu else 'jax-cuda13-pjrt'
  if re.search(r'INVALID_ARGUMENT|divisible|bounds', message):
    return (
      f'--plan: got the topology {target.name!r}, expected one that exists, as'
      f' in {_EXAMPLES}; the compiler says: {message}'
    )
  return (
    f'--plan={target.name}: got no compiler for it ({message}), expected'
    f' {package}; fix: pip install -r requirements-plan.txt'
  )


# Figures for XLA's GPU compiler: (compute capability, multiprocessors, shared
# memory of a multiprocessor and of a thread block in bytes, L2 cache in bytes,
# clock in GHz). From NVIDIA's datasheets and white papers of the A100, H100 and
# H200, and the CUDA programming guide, table of compute capabilities. Memory
# and its rate come from hardware.peaks.
_GPU_COMPUTE = {
  'a100': (8, 108, 167_936, 166_912, 41_943_040, 1.41),
  'h100': (9, 132, 233_472, 232_448, 52_428_800, 1.98),
  'h200': (9, 132, 233_472, 232_448, 52_428_800, 1.98),
}


def gpu_description(target: Target) -> str:
  """Returns the text form of XLA's GpuTargetConfigProto for the device."""
  from hardware import peaks as peaks_lib

  peaks = peaks_lib.DATASHEETS[target.device_kind]
  major, cores, shared, shared_block, cache, clock = _GPU_COMPUTE[
    target.generation
  ]
  return f"""
gpu_device_info {{
  threads_per_block_limit: 1024
  threads_per_warp: 32
  shared_memory_per_block: 49152
  shared_memory_per_core: {shared}
  threads_per_core_limit: 2048
  core_count: {cores}
  fpus_per_core: 128
  block_dim_limit_x: 2147483647
  block_dim_limit_y: 65535
  block_dim_limit_z: 65535
  memory_bandwidth: {int(peaks.bytes_per_s)}
  l2_cache_size: {cache}
  clock_rate_ghz: {clock}
  device_memory_size: {peaks.memory_bytes}
  shared_memory_per_block_optin: {shared_block}
  cuda_compute_capability {{ major: {major} }}
  registers_per_core_limit: 65536
  registers_per_block_limit: 65536
}}
platform_name: "CUDA"
dnn_version_info {{ major: 9 minor: 28 }}
runtime_version {{ major: 13 minor: 5 }}
device_description_str: "{target.device_kind}"
"""
