"""The speed of both lives on one GPU, beside its goals: `make bench-gpu`.

    python -m benchmarks.gpu_table

Each `Part` is a benchmark in a process of its own, which has the whole GPU. Its
result, the file of `--out`, becomes rows of the table. All parts together have
8 minutes; a part that fails or takes too long is a row that says so. The table
is printed, and written with the full results to
benchmarks/results/<gpu>.json.

To add rows, write a function from the JSON of a benchmark to `Row`s, and a
`Part` with its command in PARTS.
"""

from collections.abc import Callable, Sequence
import dataclasses
import datetime
import json
import os
import pathlib
import re
import subprocess
import sys
import tempfile
import time
from typing import Any

from absl import app, flags

from benchmarks.common import timing
from hardware import gpu_environment

_ROOT = pathlib.Path(__file__).parents[1]
RESULTS = _ROOT / 'benchmarks' / 'results'
SECONDS = 480.0  # of all parts


@dataclasses.dataclass(frozen=True, kw_only=True)
class Row:
  """A figure and its goal."""

  work: str  # 'train GPT-2 124M, 16 x 1024: MFU'
  value: float
  unit: str  # 'tok/s', '%', 's', 'ms' or 'x'
  goal: float
  is_lower_better: bool = False

  @property
  def is_met(self) -> bool:
    """Whether the goal is reached."""
    if self.is_lower_better:
      return self.value <= self.goal
    return self.value >= self.goal


@dataclasses.dataclass(frozen=True, kw_only=True)
class Part:
  """A benchmark, and the rows of its result."""

  name: str
  command: tuple[str, ...]  # arguments of python; --out=FILE is added
  rows: Callable[[Any], Sequence[Row]]  # of the JSON in that file
  seconds: float  # the longest time of the part


def train_rows(result: Any) -> list[Row]:
  """Returns the rows of `benchmarks.train_throughput`."""
  rows = []
  for shape in result['results']:
    name, goal = _TRAINED[shape['shape']]
    mfu = 100 * shape['ours']['mfu']
    rows.append(Row(work=f'{name}: MFU', value=mfu, unit='%', goal=goal))
    if 'ratio' in shape and shape['shape'] == '124m':
      ratio = shape['ratio']
      rows.append(
        Row(work=f'{name}: x torch.compile', value=ratio, unit='x', goal=1.3)
      )
  return rows


_TRAINED = {
  '124m': ('train GPT-2 124M, 16 x 1024', 40.0),
  '1b': ('train the Llama-3.2-1B shape, 4 x 4096', 55.0),
}


def first_step_rows(result: Any) -> list[Row]:
  """Returns the rows of `benchmarks.first_step`."""
  return [
    Row(
      work=f'first step of shakespeare_char:gpu, {name}',
      value=result[f'{name}_s'],
      unit='s',
      goal=goal,
      is_lower_better=True,
    )
    for name, goal in (('cold', 10.0), ('cached', 3.0))
  ]


def decode_rows(result: Any) -> list[Row]:
  """Returns the rows of `benchmarks.decode_rate` with three batch sizes."""
  one, eight, many = (result['batches'][size] for size in ('1', '8', '32'))
  name = 'decode the Llama-3.2-1B shape'
  share, rate = 100 * one['bandwidth'], many['tokens_per_s']
  return [
    Row(work=f'{name}, batch 1: bandwidth', value=share, unit='%', goal=70.0),
    Row(work=f'{name}, batch 32', value=rate, unit='tok/s', goal=25_000.0),
    Row(
      work='engine of that shape and 8 sequences, all programs, cold',
      value=eight['ready_s'],
      unit='s',
      goal=15.0,
      is_lower_better=True,
    ),
  ]


def host_rows(result: Any) -> list[Row]:
  """Returns the row of `benchmarks.engine_host`."""
  return [
    Row(
      work='host per decoded step of 32 sequences',
      value=min(result['step_ms'].values()),
      unit='ms',
      goal=result['goal_ms'],
      is_lower_better=True,
    )
  ]


_TRAIN = '-m', 'benchmarks.train_throughput', '--rounds=3'
PARTS = (
  # Life one.
  Part(
    name='train-124m',
    command=(*_TRAIN, '--shape=124m', '--peer'),
    rows=train_rows,
    seconds=120,
  ),
  Part(
    name='train-1b',
    command=(*_TRAIN, '--shape=1b', '--peer'),
    rows=train_rows,
    seconds=150,
  ),
  Part(
    name='first-step',
    command=('-m', 'benchmarks.first_step'),
    rows=first_step_rows,
    seconds=70,
  ),
  # Life two.
  Part(
    name='decode-1b',
    command=('-m', 'benchmarks.decode_rate', '--shape=1b', '--rounds=2'),
    rows=decode_rows,
    seconds=110,
  ),
  Part(
    name='host',
    command=('-m', 'benchmarks.engine_host', '--rounds=3'),
    rows=host_rows,
    seconds=30,
  ),
)


def measure(part: Part, seconds: float) -> dict[str, Any]:
  """Runs a part; returns {'result': JSON} or {'failure': text}."""
  with tempfile.TemporaryDirectory() as directory:
    out = pathlib.Path(directory) / 'result.json'
    try:
      done = subprocess.run(
        [sys.executable, *part.command, f'--out={out}'],
        cwd=_ROOT,
        env=os.environ | gpu_environment.BENCHMARKS,
        timeout=seconds,
        check=False,
      )
    except subprocess.TimeoutExpired:
      return {'failure': f'not done after {seconds:.0f} s'}
    if done.returncode or not out.exists():
      return {'failure': f'exited with status {done.returncode}'}
    return {'result': json.loads(out.read_text())}


def report(parts: Sequence[Part], measured: dict[str, Any]) -> str:
  """Returns the table of all parts."""
  lines = [('work', 'measured', 'goal', '')]
  for part in parts:
    found = measured[part.name]
    if 'failure' in found:
      lines.append((part.name, found['failure'], '', 'FAILED'))
      continue
    for row in part.rows(found['result']):
      bound = 'at most' if row.is_lower_better else 'at least'
      lines.append(
        (
          row.work,
          f'{row.value:,.4g} {row.unit}',
          f'{bound} {row.goal:,.4g} {row.unit}',
          'met' if row.is_met else 'not met',
        )
      )
  return timing.table('Speed on one GPU', lines)


def main(argv: list[str]) -> None:
  """Measures the parts, prints the table and writes the JSON."""
  del argv
  if problem := gpu_environment.missing():
    sys.exit(f'error: {problem}')
  wanted = flags.FLAGS.parts
  if unknown := set(wanted) - {part.name for part in PARTS}:
    sys.exit(
      f'error: --parts: got {", ".join(sorted(unknown))}, expected some of'
      f' {", ".join(part.name for part in PARTS)}'
    )
  parts = [part for part in PARTS if not wanted or part.name in wanted]
  stop, measured = time.monotonic() + SECONDS, {}
  for part in parts:
    print(f'--- {part.name}', flush=True)
    left = max(stop - time.monotonic(), 1.0)
    measured[part.name] = measure(part, min(part.seconds, left))
  print(report(parts, measured))
  timing.write_json(str(RESULTS / f'{_gpu_name()}.json'), _record(measured))


def _record(measured: dict[str, Any]) -> dict[str, Any]:
  commit = subprocess.run(
    ['git', 'rev-parse', 'HEAD'],
    cwd=_ROOT,
    capture_output=True,
    text=True,
    check=False,
  )
  return {
    'date': datetime.date.today().isoformat(),
    'commit': commit.stdout.strip(),
    'parts': measured,
  }


def _gpu_name() -> str:
  """Returns the name of the GPU for a file, as nvidia-h200."""
  done = subprocess.run(
    ['nvidia-smi', '--query-gpu=name', '--format=csv,noheader'],
    capture_output=True,
    text=True,
    check=False,
  )
  first = done.stdout.splitlines()[0] if done.stdout else 'unknown gpu'
  return re.sub(r'[^a-z0-9]+', '-', first.lower()).strip('-')


if __name__ == '__main__':
  flags.DEFINE_list('parts', [], 'Names of parts; empty measures all of them.')
  app.run(main)
