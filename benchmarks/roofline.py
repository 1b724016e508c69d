"""Measured peak rates of this machine, the limits of all other benchmarks.

    python -m benchmarks.roofline --out=runs/bench/roofline.json

Measures the matmul rate per dtype (float32 accumulation, int32 for int8) and
the rate at which weights are read from memory. Prints the median over rounds
and the best round; the two differ on a shared machine. Training cannot exceed
the matmul rate, single-stream decoding cannot exceed the memory rate (Williams
et al., "Roofline", 2009). Peaks of the device's datasheet follow, if they are
known.
"""

import statistics
from typing import Any

from absl import app
import jax

from benchmarks.common import entry, timing
from hardware import peaks


def measure(
  device: jax.Device,
  *,
  dtypes: list[str],
  size: int,
  megabytes: int,
  rounds: int,
  seconds: float,
) -> dict[str, list[float]]:
  """Returns the rates of each round: FLOP/s by dtype, and 'read' in bytes/s."""

  def matmul(dtype):
    return lambda: peaks.matmul_flops_per_s(
      dtype, size=size, seconds=seconds, device=device
    )

  turns = {dtype: matmul(dtype) for dtype in dtypes}
  turns['read'] = lambda: peaks.read_bytes_per_s(
    megabytes=megabytes, seconds=seconds, device=device
  )
  return timing.interleave(turns, rounds)


def report(result: dict[str, Any]) -> str:
  """Returns the table of measured rates, and the datasheet's if known."""
  rows = [('', 'median', 'best', '')]
  for name, values in result['rates'].items():
    unit = 'GB/s' if name == 'read' else 'GFLOP/s'
    median, best = statistics.median(values), max(values)
    rows.append((name, f'{median / 1e9:.1f}', f'{best / 1e9:.1f}', unit))
  lines = [timing.table(f'Roofline of {result["device"]}', rows)]
  if datasheet := peaks.DATASHEETS.get(result['device']):
    lines.append(
      f'  {datasheet.source}: {datasheet.bytes_per_s / 1e9:.0f} GB/s; '
      + ', '.join(
        f'{name} {rate / 1e12:.0f} TFLOP/s'
        for name, rate in datasheet.flops_per_s.items()
      )
    )
  return '\n'.join(lines)


def run(rounds: int) -> dict[str, Any]:
  """Measures the first device; returns everything that `report` prints."""
  device = jax.devices()[0]
  is_cpu = device.platform == 'cpu'
  rates = measure(
    device,
    dtypes=['float32', 'bfloat16', 'int8'],
    # Large enough to fill an accelerator; on a CPU, to exceed its caches.
    size=1024 if is_cpu else 8192,
    megabytes=128 if is_cpu else 1024,
    rounds=rounds,
    seconds=0.3,
  )
  return {'benchmark': 'roofline', 'device': device.device_kind, 'rates': rates}


def main(argv: list[str]) -> None:
  """Runs the benchmark."""
  del argv
  entry.run(lambda args: [run(args.rounds)], report)


if __name__ == '__main__':
  entry.define_flags(rounds=5)
  app.run(main)
