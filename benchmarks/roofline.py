"""What this machine can do at best, measured: every other speed's yardstick.

    python -m benchmarks.roofline --out=runs/bench/roofline.json

Matmul rate per dtype (float32 accumulation, int32 for int8) and the rate at
which weights are read from memory. Median over rounds, with the best round
beside it; the two lie apart where the machine is shared. Training cannot exceed
the first, single-stream decoding cannot exceed the second (Williams et al.,
"Roofline", 2009). Where the device has a datasheet, its figures follow.
"""

import statistics
import sys
from typing import Any

from absl import app, flags
import jax

from benchmarks import timing
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
  """Returns the rates of every round: FLOP/s by dtype, and 'read' in bytes/s.

  Args:
    device: what is measured.
    dtypes: operand types of the matmuls.
    size: rows and columns of the matrices.
    megabytes: size of the matrix that is read.
    rounds: how often everything is measured.
    seconds: of each measurement.
  """

  def matmul(dtype):
    return lambda: peaks.matmul_flops_per_s(
      dtype, size=size, seconds=seconds, device=device
    )

  turns = {dtype: matmul(dtype) for dtype in dtypes}
  turns['read'] = lambda: peaks.read_bytes_per_s(
    megabytes=megabytes, seconds=seconds, device=device
  )
  return timing.interleave(turns, rounds)


def report(device: jax.Device, rates: dict[str, list[float]]) -> str:
  """Returns the table of measured rates."""
  rows = [('', 'median', 'best', '')]
  for name, values in rates.items():
    unit = 'GB/s' if name == 'read' else 'GFLOP/s'
    median, best = statistics.median(values), max(values)
    rows.append((name, f'{median / 1e9:.1f}', f'{best / 1e9:.1f}', unit))
  lines = [timing.table(f'Roofline of {device.device_kind}', rows)]
  if datasheet := peaks.DATASHEETS.get(device.device_kind):
    lines.append(
      f'  {datasheet.source}: {datasheet.bytes_per_s / 1e9:.0f} GB/s; '
      + ', '.join(
        f'{name} {rate / 1e12:.0f} TFLOP/s'
        for name, rate in datasheet.flops_per_s.items()
      )
    )
  return '\n'.join(lines)


def main(argv: list[str]) -> None:
  """Measures, prints, and writes what the flags ask for."""
  del argv
  if note := timing.busy_note():
    print(note, file=sys.stderr)
  device = jax.devices()[0]
  is_cpu = device.platform == 'cpu'
  rates = measure(
    device,
    dtypes=['float32', 'bfloat16', 'int8'],
    size=1024 if is_cpu else 8192,
    megabytes=128 if is_cpu else 1024,
    rounds=flags.FLAGS.rounds,
    seconds=0.3,
  )
  print(report(device, rates))
  if flags.FLAGS.out:
    result: dict[str, Any] = {
      'benchmark': 'roofline',
      'device': device.device_kind,
      'rates': rates,
    }
    timing.write_json(flags.FLAGS.out, result)


if __name__ == '__main__':
  flags.DEFINE_integer('rounds', 5, 'How often everything is measured.')
  flags.DEFINE_string('out', '', 'File to write the result to, as JSON.')
  app.run(main)
