"""A sweep in one program against the same sweep one run after the other.

    taskset -c 0,1 python -m benchmarks.sweep_together   # 16 trials x 3 seeds

Trains a tiny byte model at several learning rates with several seeds, first
together, then one by one (`sweep.py --notogether`), each in a process of its
own, compilation included. Prints wall time, CPU time and their ratios, and the
largest relative difference of the losses of all steps. Goal on two cores: at
least 4 times faster, equal to 1e-6. CPU time says the same on a machine that is
busy with other work. The largest rate is 3e-3. At 1e-2 the rounding of step 30
grew tenfold every ten steps, to differences of 1e-2, in a training that looks
stable (LOG.md, 2026-11-29).
"""

import pathlib
import resource
import subprocess
import sys
import tempfile
import time

from absl import app, flags
import numpy as np

from training.reporting import metrics

_TRIALS = flags.DEFINE_integer('trials', 16, 'Learning rates.', lower_bound=1)
_SEEDS = flags.DEFINE_integer('seeds', 3, 'Seeds of each.', lower_bound=1)
_STEPS = flags.DEFINE_integer('steps', 100, 'Steps of a run.', lower_bound=4)

EXPERIMENT = """
import dataclasses

from data import data_config, sources
from experiments import presets
from training import experiment
from training.optimizer import chain

def get_config():
  return experiment.Experiment(
    name='together',
    model=presets.llama(
      vocab_size=264, num_layers=2, num_heads=2, num_kv_heads=1, width=32,
      mlp_width=64, length=64,
    ),
    data=data_config.DataConfig(
      open_source=sources.python_stdlib,
      row_length=64,
      batch_size=4,
      tokenizer=data_config.TokenizerConfig(kind='byte'),
      data_dir={data!r},
    ),
    optimizer=chain.OptimizerConfig(warmup_steps={warmup}),
    num_steps={steps},
    log_every_steps=25,
    eval_every_steps=0,
    eval_batches=8,
  )
"""
SWEEP = """
from training import sweep

def get_sweep():
  return sweep.Sweep(
    name='together',
    parameters={{
      'optimizer.peak_lr': sweep.LogUniform(1e-4, 3e-3, points={trials}),
    }},
    num_seeds={seeds},
  )
"""


def _seconds(place: pathlib.Path, flag: str) -> tuple[float, float]:
  """Runs the sweep in a process; returns its wall time and CPU time."""
  before, start = _cpu_seconds(), time.perf_counter()
  subprocess.run(
    [
      sys.executable,
      'sweep.py',
      f'--config={place}/tiny.py',
      f'--sweep={place}/rates.py',
      f'--workdir={place}/{flag.strip("-")}',
      '--compilation_cache=',
      flag,
    ],
    check=True,
    stdout=subprocess.DEVNULL,
  )
  return time.perf_counter() - start, _cpu_seconds() - before


def _cpu_seconds() -> float:
  used = resource.getrusage(resource.RUSAGE_CHILDREN)
  return used.ru_utime + used.ru_stime


def _losses(place: pathlib.Path) -> np.ndarray:
  """Returns the losses of all runs and steps, the evaluations among them."""
  return np.array(
    [
      [r['loss'] for r in metrics.read(run) if r['kind'] in ('train', 'eval')]
      for run in sorted(place.glob('trials/*/seed*'))
    ]
  )


def main(argv: list[str]) -> None:
  """Measures both ways and prints the comparison."""
  if len(argv) > 1:
    raise app.UsageError(f'got unknown arguments {argv[1:]}, expected flags')
  with tempfile.TemporaryDirectory() as directory:
    place = pathlib.Path(directory)
    values = {
      'data': f'{place}/data',
      'steps': _STEPS.value,
      'warmup': _STEPS.value // 4,
      'trials': _TRIALS.value,
      'seeds': _SEEDS.value,
    }
    (place / 'tiny.py').write_text(EXPERIMENT.format(**values))
    (place / 'rates.py').write_text(SWEEP.format(**values))
    measured = {}
    for flag, name in (('--together', 'together'), ('--notogether', 'apart')):
      measured[name] = _seconds(place, flag)
      wall, cpu = measured[name]
      print(f'{name:9} {wall:7.1f} s, {cpu:7.1f} s of CPU time', flush=True)
    ours, theirs = _losses(place / 'together'), _losses(place / 'notogether')
    difference = np.max(np.abs(ours - theirs) / theirs)
    ratios = np.divide(measured['apart'], measured['together'])
    print(
      f'ratio     {ratios[0]:.2f} x in time, {ratios[1]:.2f} x in CPU time'
      f' (goal: 4); losses of {ours.size} records differ by at most'
      f' {difference:.1e} (goal: 1e-6)'
    )


if __name__ == '__main__':
  app.run(main)
