"""One run of `train.py` on the tiny experiment, in a process of its own."""

import json
import os
import pathlib
import resource
import signal
import subprocess
import sys
import time

import jax
import numpy as np
import orbax.checkpoint as ocp

from frozen import manifest as manifest_lib, seals
from storage import file_names
from tests.helpers import tiny_models
from training.reporting import metrics

ROOT = pathlib.Path(__file__).parents[2]
TIMEOUT_S = 240
WORDS = ('def', 'return', 'self', 'for', 'in', 'import', 'naïve', '数', 'class')


def write_corpus(directory: pathlib.Path) -> str:
  """Writes two splits of text files; returns the path for `data.path`."""
  rng = np.random.default_rng(0)
  for split, count in (('train', 60), ('validation', 40)):
    (directory / split).mkdir(parents=True)
    for i in range(count):
      text = ' '.join(rng.choice(WORDS, rng.integers(50, 400)))
      (directory / split / f'{i:02d}.txt').write_text(text)
  return str(directory / '{split}' / '*.txt')


def start(
  corpus: str,
  workdir: pathlib.Path,
  cache: pathlib.Path,
  *flags: str,
  max_file_bytes: int | None = None,
) -> subprocess.Popen:
  """Starts a run.

  Args:
    corpus: of `write_corpus`.
    workdir: of the run.
    cache: of compiled programs, shared by all runs: starts are the cost.
    *flags: more of them.
    max_file_bytes: no file may grow larger; can be lifted while it runs.
  """

  env = tiny_models.subprocess_env(
    JAX_PLATFORMS='cpu',
    JAX_COMPILATION_CACHE_DIR=str(cache),
    JAX_PERSISTENT_CACHE_MIN_COMPILE_TIME_SECS='0',
    JAX_PERSISTENT_CACHE_MIN_ENTRY_SIZE_BYTES='-1',
    PYTHONPATH=str(ROOT),  # the experiment is among the tests
  )
  running = subprocess.Popen(
    [
      sys.executable,
      'train.py',
      '--config=tests/survival/tiny.py',
      f'--config.data.path={corpus}',
      f'--workdir={workdir}',
      *flags,
    ],
    cwd=ROOT,
    env=env,
    stdout=subprocess.PIPE,
    stderr=subprocess.STDOUT,
    text=True,
  )
  if max_file_bytes is not None:
    # Long before it is through with its imports.
    hard = resource.prlimit(running.pid, resource.RLIMIT_FSIZE)[1]
    resource.prlimit(running.pid, resource.RLIMIT_FSIZE, (max_file_bytes, hard))
  return running


def lift_limit(pid: int) -> None:
  """Lets files of a running process grow again."""
  hard = resource.prlimit(pid, resource.RLIMIT_FSIZE)[1]
  resource.prlimit(pid, resource.RLIMIT_FSIZE, (hard, hard))


def finish(running: subprocess.Popen) -> tuple[int, str]:
  """Waits; returns the exit code, and what was printed."""
  output, _ = running.communicate(timeout=TIMEOUT_S)
  return running.returncode, output


def run(corpus, workdir, cache, *flags, **options) -> str:
  """Runs to the end, which has to be a good one; returns what was printed."""
  code, output = finish(start(corpus, workdir, cache, *flags, **options))
  if code:
    raise AssertionError(f'{workdir}: exit code {code}: {output}')
  return output


def stop(running: subprocess.Popen, workdir: pathlib.Path, step: int) -> int:
  """Sends SIGTERM after a step; returns the step that was saved."""
  while is_alive(running) and _last_step(workdir) < step:
    time.sleep(0.005)
  running.send_signal(signal.SIGTERM)
  code, output = finish(running)
  saved = seals.steps(workdir / file_names.CHECKPOINTS)[-1]
  words = f'stopped by SIGTERM after step {saved}; saved within'
  if code != 143 or words not in output:
    raise AssertionError(f'got exit code {code}, expected 143: {output}')
  return saved


def _last_step(workdir: pathlib.Path) -> int:
  return max((r['step'] for r in tail(workdir / file_names.METRICS)), default=0)


def records(workdir: pathlib.Path) -> list[dict]:
  """Returns the records that do not depend on the machine, in their order."""
  return [r for r in metrics.read(workdir) if r['kind'] in ('train', 'eval')]


def arrays(workdir: pathlib.Path, step: int) -> dict[str, np.ndarray]:
  """Returns every array of a checkpoint, bits as they are."""
  handler = ocp.StandardCheckpointHandler()
  device = jax.sharding.SingleDeviceSharding(jax.devices()[0])
  directory = workdir / file_names.CHECKPOINTS / str(step)
  found = {}
  for item in seals.read(directory).leaves:
    tree = handler.metadata(directory / item).tree
    target = jax.tree.map(
      lambda x: jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=device), tree
    )
    restored = handler.restore(
      directory / item, args=ocp.args.StandardRestore(target)
    )
    for path, leaf in jax.tree_util.tree_leaves_with_path(restored):
      found[item + jax.tree_util.keystr(path)] = np.asarray(leaf)
  return found


def differences(workdir: pathlib.Path, expected: pathlib.Path) -> list[str]:
  """Returns what is not as in the uninterrupted run; empty if nothing."""
  found = []
  steps = [
    seals.steps(w / file_names.CHECKPOINTS)[-1:] for w in (workdir, expected)
  ]
  if steps[0] != steps[1] or not steps[0]:
    return [f'got last checkpoint {steps[0]}, expected {steps[1]}']
  step = steps[0][0]
  got, wanted = arrays(workdir, step), arrays(expected, step)
  if got.keys() != wanted.keys():
    found.append('other arrays')
  found += [
    f'{name} differs'
    for name in got.keys() & wanted.keys()
    if got[name].dtype != wanted[name].dtype
    or got[name].tobytes() != wanted[name].tobytes()
  ]
  # PRNG key, position of the data (the next batch), tokens and FLOPs.
  progress = []
  for place in (workdir, expected):
    path = place / file_names.CHECKPOINTS / str(step) / 'progress.json'
    progress.append(json.loads(path.read_text()))
    del progress[-1]['train_seconds']
  if progress[0] != progress[1]:
    found.append(f'got progress {progress[0]}, expected {progress[1]}')
  if records(workdir) != records(expected):
    found.append('other metrics')
  digests = [
    manifest_lib.read(place / 'frozen').weights_digest
    for place in (workdir, expected)
  ]
  if digests[0] != digests[1]:
    found.append('other frozen weights')
  found += [f'{path} was left behind' for path in leftovers(workdir)]
  return found


def leftovers(workdir: pathlib.Path) -> list[str]:
  """Returns what a complete run should not have."""
  patterns = (
    'checkpoints/*.partial',
    'checkpoints/*.deleted',
    'checkpoints/damaged-*',
    'checkpoints/*/seal.tmp',
    '.frozen.*',
    '*.tmp',
  )
  return [
    path.relative_to(workdir).as_posix()
    for pattern in patterns
    for path in workdir.glob(pattern)
  ]


def is_alive(running: subprocess.Popen) -> bool:
  """Whether a process has not ended yet."""
  return running.poll() is None


def kill(running: subprocess.Popen) -> str:
  """Ends a process as a power cut would; returns what it had printed."""
  running.kill()
  output, _ = running.communicate(timeout=30)
  return output


def tail(path: pathlib.Path, num_bytes: int = 4096) -> list[dict]:
  """Returns the last whole records of a metrics file that is being written."""
  try:
    with path.open('rb') as file:
      file.seek(max(os.fstat(file.fileno()).st_size - num_bytes, 0))
      lines = file.read().split(b'\n')
  except FileNotFoundError:
    return []
  found = []
  for line in lines[:-1]:
    try:
      found.append(json.loads(line))
    except ValueError:
      continue  # the first one, of which the beginning is cut off
  return found
