"""Kills a sweep again and again; what it finds must not change.

    python -m tests.survival.sweep_kills --sweep_kills=20

Every start is a new process, killed (SIGKILL) after some more records. The last
start is two processes at once. Then the sweep is compared with one that nothing
disturbed: trials, values and metrics. A trial that had finished at a kill must
not have been run again.
"""

from collections.abc import Sequence
import csv
import json
import math
import pathlib
import subprocess
import sys
import tempfile
import time

from absl import app, flags
import numpy as np

from storage import file_names
from tests.helpers import tiny_models
from tests.survival import process
from training.reporting import metrics

SWEEP = """
from training import sweep

def get_sweep():
  return sweep.Sweep(
    name='kills',
    parameters={{
      'optimizer.peak_lr': sweep.LogUniform(1e-3, 1e-2),
      'model.num_layers': sweep.Choice((1, 2)),
    }},
    strategy='random',
    num_trials={num_trials},
    num_seeds=2,
  )
"""
NUM_STEPS, EVAL_EVERY = 60, 20
NUM_SEEDS = 2
TIMEOUT_S = 400


def start(
  corpus: str, workdir: pathlib.Path, cache: pathlib.Path, *flags: str
) -> subprocess.Popen:
  """Starts a process of the sweep whose file lies beside the workdir."""
  file = workdir.parent / 'kills_sweep.py'
  env = tiny_models.subprocess_env(
    JAX_PLATFORMS='cpu',
    JAX_COMPILATION_CACHE_DIR=str(cache),
    JAX_PERSISTENT_CACHE_MIN_COMPILE_TIME_SECS='0',
    JAX_PERSISTENT_CACHE_MIN_ENTRY_SIZE_BYTES='-1',
  )
  path = [str(process.ROOT), env.get('PYTHONPATH', '')]
  return subprocess.Popen(
    [
      sys.executable,
      'sweep.py',
      '--config=tests/survival/tiny.py',
      f'--config.data.path={corpus}',
      f'--config.num_steps={NUM_STEPS}',
      f'--config.eval_every_steps={EVAL_EVERY}',
      '--config.checkpoint.every_steps=10',
      f'--sweep={file}',
      f'--workdir={workdir}',
      *flags,
    ],
    cwd=process.ROOT,
    env=env | {'PYTHONPATH': ':'.join(filter(None, path))},
    stdout=subprocess.PIPE,
    stderr=subprocess.STDOUT,
    text=True,
  )


def num_records(workdir: pathlib.Path) -> int:
  """Returns the number of steps that all runs have recorded."""
  return sum(
    path.read_bytes().count(b'"train"')
    for path in workdir.glob(f'trials/*/seed*/{file_names.METRICS}')
  )


def finish(running: Sequence[subprocess.Popen]) -> None:
  """Waits for processes, which have to end well."""
  for each in running:
    output, _ = each.communicate(timeout=TIMEOUT_S)
    if each.returncode:
      raise AssertionError(f'exit code {each.returncode}: {output}')


def kill_at(running: subprocess.Popen, workdir: pathlib.Path, num: int) -> bool:
  """Kills a process once there are so many records; False: it had ended."""
  while num_records(workdir) < num:
    if not process.is_alive(running):
      return False
    time.sleep(0.01)
  process.kill(running)
  return True


def finished(workdir: pathlib.Path) -> dict[int, str]:
  """Returns when each finished trial ended, by its number."""
  from studies.sweeps import store

  library = store.optuna()
  url = store.default_url(workdir)
  if not (workdir / 'sweep.db').exists():
    return {}
  storage = library.storages.RDBStorage(url)
  names = [study.study_name for study in storage.get_all_studies()]
  if not names:
    return {}
  study = library.load_study(study_name=names[0], storage=storage)
  return {
    trial.number: str(trial.datetime_complete)
    for trial in study.trials
    if trial.state.is_finished()
  }


def table(workdir: pathlib.Path) -> list[dict[str, str]]:
  """Returns results.csv."""
  with (workdir / 'results.csv').open() as file:
    return list(csv.DictReader(file))


def differences(workdir: pathlib.Path, expected: pathlib.Path) -> list[str]:
  """Returns what is not as in the undisturbed sweep; empty if nothing."""
  found = []
  ours, theirs = table(workdir), table(expected)
  if len(ours) != len(theirs):
    return [f'{len(ours)} trials, not {len(theirs)}']
  for one, other in zip(ours, theirs, strict=True):
    for name, value in one.items():
      if not _equal(value, other[name]):
        found.append(f'trial {one["trial"]}: {name} {value}, not {other[name]}')
  for place in sorted(expected.glob('trials/*/seed*')):
    records = [
      [r for r in metrics.read(each) if r['kind'] in ('train', 'eval')]
      for each in (workdir / place.relative_to(expected), place)
    ]
    losses = [[r['loss'] for r in each] for each in records]
    if len(losses[0]) != len(losses[1]) or not np.allclose(
      losses[0], losses[1], rtol=1e-5
    ):
      found.append(f'{place.relative_to(expected)}: other metrics')
  numbers = json.loads((workdir / 'results.json').read_text())['trials']
  if len(numbers) != len({trial['number'] for trial in numbers}):
    found.append('a trial counts twice')
  return found


def _equal(value: str, other: str) -> bool:
  try:
    # Runs that go on beside fewer others: float32 in another order.
    return math.isclose(float(value), float(other), rel_tol=1e-5)
  except ValueError:
    return value == other


def suite(
  root: pathlib.Path, kills: int, *flags: str, num_trials: int = 4
) -> list[str]:
  """Returns what kills have changed, and what was run twice."""
  text = SWEEP.format(num_trials=num_trials)
  (root / 'kills_sweep.py').write_text(text)
  corpus = process.write_corpus(root / 'corpus')
  whole, killed, cache = root / 'whole', root / 'killed', root / 'cache'
  finish([start(corpus, whole, cache, *flags)])
  total, found = num_records(whole), []
  expected = num_trials * NUM_SEEDS * NUM_STEPS
  if total != expected:
    found.append(f'{total} steps, not {expected}')
  ended: dict[int, str] = {}
  for i in range(kills):
    running = start(corpus, killed, cache, *flags)
    if not kill_at(running, killed, total * (i + 1) // (kills + 2)):
      finish([running])
    now = finished(killed)
    again = [n for n, at in ended.items() if now.get(n) != at]
    found += [f'trial {n} was run again after kill {i}' for n in again]
    ended = now
  finish(
    [
      start(corpus, killed, cache, '--trials_at_once=1', *flags)
      for _ in range(2)
    ]
  )
  now = finished(killed)
  found += [f'trial {n} was run again' for n in ended if now[n] != ended[n]]
  return found + differences(killed, whole)


def main(argv: list[str]) -> int:
  """Prints the outcome; exits with 1 if a kill has changed anything."""
  del argv
  wanted = flags.FLAGS.sweep_kills
  with tempfile.TemporaryDirectory() as directory:
    found = suite(pathlib.Path(directory), wanted)
  print('\n'.join(found) or f'{wanted} kills: nothing repeated, nothing lost')
  return int(bool(found))


if __name__ == '__main__':
  flags.DEFINE_integer('sweep_kills', 20, 'Kills of the sweep.')
  app.run(main)
