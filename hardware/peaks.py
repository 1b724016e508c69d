"""Peak rates of a device: the denominators of all utilisation figures.

Training divides its FLOP/s by `Peaks.flops_per_s` to report MFU. The benchmarks
divide bytes/s by `Peaks.bytes_per_s` to report how close decoding is to the
memory roofline. Figures of known accelerators come from their datasheets. Any
other device, CPUs included, is measured for about a second, once per process.

The float32 rates hold for XLA's default matmul precision: one bfloat16 pass on
TPU, TF32 on GPU. All rates are dense (no structured sparsity).
"""

from collections.abc import Callable
import dataclasses
import functools
import os
import time

import jax
import jax.numpy as jnp


@dataclasses.dataclass(frozen=True, kw_only=True)
class Peaks:
  """Upper bounds of one jax device."""

  flops_per_s: dict[str, float]  # dense matmul rate by operand dtype name
  bytes_per_s: float  # main memory (HBM on accelerators)
  memory_bytes: int = 0  # that a program may use; 0 if unknown
  # Rate to other devices, all links together, one direction; 0 without links.
  # Datasheets add up both directions: their figure is twice this one.
  link_bytes_per_s: float = 0.0
  source: str  # the datasheet, or the kind of measurement


def _tpu(
  source: str,
  bfloat16: float,
  gigabytes_per_s: float,
  gibibytes: float,
  link_gigabytes_per_s: float,
  **narrow: float,
) -> Peaks:
  rates = {'float32': bfloat16, 'bfloat16': bfloat16, **narrow}
  return Peaks(
    flops_per_s={name: tera * 1e12 for name, tera in rates.items()},
    bytes_per_s=gigabytes_per_s * 1e9,
    memory_bytes=int(gibibytes * 2**30),
    link_bytes_per_s=link_gigabytes_per_s * 1e9,
    source=f'{source}, docs.cloud.google.com/tpu/docs',
  )


def _gpu(
  source: str,
  tf32: float,
  bfloat16: float,
  terabytes_per_s: float,
  gigabytes: float,
  link_gigabytes_per_s: float,
  **narrow: float,
) -> Peaks:
  rates = {'float32': tf32, 'float16': bfloat16, 'bfloat16': bfloat16, **narrow}
  return Peaks(
    flops_per_s={name: tera * 1e12 for name, tera in rates.items()},
    bytes_per_s=terabytes_per_s * 1e12,
    memory_bytes=int(gigabytes * 1e9),
    link_bytes_per_s=link_gigabytes_per_s * 1e9,
    source=f'{source}, NVIDIA datasheet, dense',
  )


# Columns: bfloat16 TFLOP/s, memory GB/s, memory GiB, links GB/s, and TFLOP/s of
# narrower dtypes. Memory is the amount that a program may use: libtpu 0.0.42
# refuses larger programs. The datasheets have 16, 95, 32, 32 and 192 / 2 GB for
# v5e, v5p, v6e, v4 and tpu7x, of which the system reserves a part.
_V5E = _tpu('TPU v5e', 197, 819, 15.75, 200, int8=393)
_V5P = _tpu('TPU v5p', 459, 2765, 95.74, 600, int8=918)
_V6E = _tpu('TPU v6e', 918, 1638, 31.25, 400, int8=1836, float8_e4m3fn=918)
_TPU7X = _tpu(
  # jax presents each chip (2307 TFLOP/s, 7380 GB/s, 192 GB, 600 GB/s each way)
  # as two devices.
  'TPU7x, half a chip', 2307 / 2, 7380 / 2, 94.75, 600 / 2,
  float8_e4m3fn=4614 / 2,
)  # fmt: skip

# Columns: TF32 and bfloat16 TFLOP/s, memory TB/s, memory GB, links GB/s, and
# TFLOP/s of narrower dtypes.
_A100_40 = _gpu('A100 40GB SXM', 156, 312, 1.555, 40, 300, int8=624)
_A100_80 = _gpu('A100 80GB SXM', 156, 312, 2.039, 80, 300, int8=624)
_HOPPER = {'int8': 1978.9, 'float8_e4m3fn': 1978.9}
_H100 = _gpu('H100 SXM', 494.7, 989.4, 3.35, 80, 450, **_HOPPER)
_H200 = _gpu('H200 SXM', 494.7, 989.4, 4.8, 141, 450, **_HOPPER)
_B200 = _gpu(
  'B200 in HGX', 1125, 2250, 7.7, 180, 900, int8=4500, float8_e4m3fn=4500
)

# Keyed by `jax.Device.device_kind`.
DATASHEETS = {
  'TPU v4': _tpu('TPU v4', 275, 1228, 30.75, 300, int8=275),
  'TPU v5 lite': _V5E,
  'TPU v5e': _V5E,
  'TPU v5': _V5P,
  'TPU v5p': _V5P,
  'TPU v6 lite': _V6E,
  'TPU v6e': _V6E,
  'TPU7x': _TPU7X,
  'NVIDIA A100-SXM4-40GB': _A100_40,
  'NVIDIA A100-SXM4-80GB': _A100_80,
  'NVIDIA H100 80GB HBM3': _H100,
  'NVIDIA H200': _H200,
  'NVIDIA B200': _B200,
}


def peaks(device: jax.Device) -> Peaks:
  """Returns the peaks of `device`, measured once per process if unknown.

  Virtual CPU devices share one machine: each gets an equal part of the measured
  rate, so that the sum over devices is the machine's rate. An unknown device is
  assumed to be like the first device of this process, because devices of other
  processes cannot be run from here.
  """
  if device.device_kind in DATASHEETS:
    return DATASHEETS[device.device_kind]
  return _measured(jax.local_devices(backend=device.platform)[0])


@functools.cache
def _measured(device: jax.Device) -> Peaks:
  is_cpu = device.platform == 'cpu'
  num_sharing = len(device.client.local_devices()) if is_cpu else 1
  # Large enough to fill an accelerator; on a CPU, to exceed its caches.
  size, megabytes = (1024, 128) if is_cpu else (8192, 1024)
  flops_per_s = {
    name: matmul_flops_per_s(name, size=size, seconds=0.2, device=device)
    for name in ('float32', 'bfloat16')
  }
  bytes_per_s = read_bytes_per_s(
    megabytes=megabytes, seconds=0.2, device=device
  )
  return Peaks(
    flops_per_s={k: v / num_sharing for k, v in flops_per_s.items()},
    bytes_per_s=bytes_per_s / num_sharing,
    memory_bytes=_machine_bytes() // num_sharing if is_cpu else 0,
    source=f'measured on {device.device_kind}, {num_sharing} device(s)',
  )


def memory_bytes(device: jax.Device) -> int:
  """Returns the bytes of `device` that a program may use, 0 if unknown.

  Measures nothing. A CPU's memory is the machine's, divided among its virtual
  devices.
  """
  if device.platform == 'cpu':
    return _machine_bytes() // len(device.client.local_devices())
  try:
    stats = device.memory_stats() or {}
  except jax.errors.JaxRuntimeError:
    stats = {}  # of another process, or of an ahead-of-time target
  if limit := stats.get('bytes_limit'):
    return limit
  datasheet = DATASHEETS.get(device.device_kind)
  return datasheet.memory_bytes if datasheet else 0


def _machine_bytes() -> int:
  """Returns the memory of this machine in bytes, 0 if unknown."""
  try:
    return os.sysconf('SC_PHYS_PAGES') * os.sysconf('SC_PAGE_SIZE')
  except (AttributeError, OSError, ValueError):
    return 0


def matmul_flops_per_s(
  dtype: str, *, size: int, seconds: float, device: jax.Device
) -> float:
  """Returns the FLOP/s of `size` x `size` matmuls, measured for `seconds`.

  Accumulates in float32 (int32 for integers), as models do. The best run
  counts: a roofline is the device's limit, not its average.
  """
  is_integer = jnp.issubdtype(jnp.dtype(dtype), jnp.integer)
  out_dtype = jnp.int32 if is_integer else jnp.float32
  a_MM = jax.device_put(jnp.ones((size, size), dtype), device)
  matmul = jax.jit(
    lambda x_MM, y_MM: jnp.dot(x_MM, y_MM, preferred_element_type=out_dtype)
  )
  return 2 * size**3 / best_seconds(lambda: matmul(a_MM, a_MM), seconds)


def read_bytes_per_s(
  *, megabytes: int, seconds: float, device: jax.Device
) -> float:
  """Returns the bytes/s at which matrix @ vector reads a float32 matrix.

  Single-stream decoding reads its weights in the same way. On a CPU, a plain
  copy would mostly measure page faults of its output.
  """
  width = 8192
  height = max(1, megabytes * 10**6 // (4 * width))
  w_MC = jax.device_put(jnp.ones((height, width), jnp.float32), device)
  x_C = jax.device_put(jnp.ones((width,), jnp.float32), device)
  matvec = jax.jit(jnp.dot)
  return w_MC.nbytes / best_seconds(lambda: matvec(w_MC, x_C), seconds)


def best_seconds(run: Callable[[], jax.Array], budget_s: float) -> float:
  """Returns the least seconds of a call, of as many as fit the budget."""
  jax.block_until_ready(run())  # compiles
  best = float('inf')
  stop = time.perf_counter() + budget_s
  while True:
    start = time.perf_counter()
    jax.block_until_ready(run())
    end = time.perf_counter()
    best = min(best, end - start)
    if end >= stop:
      return best
