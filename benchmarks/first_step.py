"""Seconds to the first step of a run, with an empty cache and with a full one.

    python -m benchmarks.first_step

Two processes, one after the other, build the learner of
`experiments/shakespeare_char.py:gpu`, initialise it and take one step. They
share a new directory of compiled programs. Seconds are counted from the
learner; the imports of Python are not counted.
"""

import pathlib
import subprocess
import sys
import tempfile
import time
from typing import Any

from absl import app, flags
import numpy as np

from benchmarks.common import entry, timing
from hardware import compilation_cache

_ROOT = pathlib.Path(__file__).parents[1]


def take(directory: pathlib.Path, variant: str = 'gpu') -> float:
  """Returns the seconds to the end of the first step, in this process."""
  import jax

  from experiments import shakespeare_char
  from training import learner as learner_lib
  from training.planning import choices

  compilation_cache.use(directory)
  start = time.perf_counter()
  experiment = shakespeare_char.get_config(variant)
  devices = jax.devices()[:1]
  chosen = choices.make(experiment, devices)
  learner = learner_lib.make(chosen.experiment, devices)
  state = learner.init(jax.random.key(0))
  rows = experiment.data.batch_size, experiment.data.row_length
  batch = {
    name: np.ones(rows, spec.dtype)
    for name, spec in experiment.objective.batch_spec().items()
  }
  step = learner.compile_train_step()
  jax.block_until_ready(step(state, learner.placement.put_batch(batch)))
  return time.perf_counter() - start


def run(variant: str) -> dict[str, Any]:
  """Measures both starts."""
  with tempfile.TemporaryDirectory() as directory:
    cold, cached = (_in_a_process(directory, variant) for _ in range(2))
  return {
    'benchmark': 'first_step',
    'variant': variant,
    'cold_s': cold,
    'cached_s': cached,
  }


def _in_a_process(directory: str, variant: str) -> float:
  code = (
    'import pathlib, sys\n'
    'from benchmarks import first_step\n'
    'print(first_step.take(pathlib.Path(sys.argv[1]), sys.argv[2]))\n'
  )
  done = subprocess.run(
    [sys.executable, '-c', code, directory, variant],
    cwd=_ROOT,
    stdout=subprocess.PIPE,
    text=True,
    check=True,
  )
  return float(done.stdout.split()[-1])


def report(result: dict[str, Any]) -> str:
  """Returns the table."""
  rows = [('', 'seconds')]
  for name in ('cold', 'cached'):
    rows.append((name, f'{result[f"{name}_s"]:.1f}'))
  title = f'First step of shakespeare_char:{result["variant"]}'
  return timing.table(title, rows)


def main(argv: list[str]) -> None:
  """Runs the benchmark."""
  del argv
  entry.run(lambda args: [run(args.variant)], report)


if __name__ == '__main__':
  entry.define_flags(rounds=1)
  flags.DEFINE_enum(
    'variant', 'gpu', ['cpu', 'gpu'], 'Variant of the experiment.'
  )
  app.run(main)
