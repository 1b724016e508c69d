"""A disk on which nothing can grow, for a while, or has no room."""

from collections.abc import Iterator
import contextlib
import os
import pathlib
import subprocess
import time

from frozen import seals
from storage import file_names
from tests.survival import process
from training.reporting import metrics

# More than metrics.jsonl and TensorBoard need, less than a file of arrays.
MAX_FILE_BYTES = 60_000
TMPFS_BYTES = 6_000_000


def saves(workdir: pathlib.Path) -> list[dict]:
  """Returns what the metrics say of saves."""
  return [r for r in metrics.read(workdir) if r['kind'] == 'save']


def _wait_for(condition, running: subprocess.Popen) -> None:
  give_up = time.monotonic() + process.TIMEOUT_S
  while not condition():
    if not process.is_alive(running) or time.monotonic() > give_up:
      raise AssertionError(f'ended too early: {process.finish(running)}')
    time.sleep(0.005)


def _has_failed(workdir: pathlib.Path) -> bool:
  records = process.tail(workdir / 'metrics.jsonl')
  return any(r['kind'] == 'save' and not r['saved'] for r in records)


def try_large_files(
  start, workdir: pathlib.Path, expected: pathlib.Path
) -> list[str]:
  """No large file can be written (EFBIG); after the first failure, it can.

  Args:
    start: starts a run in `workdir`, with a largest size of its files.
    workdir: new.
    expected: workdir of an uninterrupted run.
  """
  running = start(workdir, max_file_bytes=MAX_FILE_BYTES)
  _wait_for(lambda: _has_failed(workdir), running)
  process.lift_limit(running.pid)
  code, output = process.finish(running)
  if code:
    return [f'exit code {code}: {output}']
  wrong = process.differences(workdir, expected)
  done = [record['saved'] for record in saves(workdir)]
  if done != sorted(done) or not 0 < sum(done) < len(done):
    wrong.append(f'got saves {done}, expected failures, then none')
  if 'Traceback' in output:
    wrong.append(f'more was said than what is wrong: {output}')
  if 'the checkpoint was not saved: got' not in output:
    wrong.append(f'nothing was said: {output}')
  return wrong


def try_last_save(
  start, workdir: pathlib.Path, expected: pathlib.Path
) -> list[str]:
  """No save works until the end: an error, and older checkpoints as before."""
  process.stop(start(workdir), workdir, 70)
  root = workdir / file_names.CHECKPOINTS
  before = {step: process.arrays(workdir, step) for step in seals.steps(root)}
  code, output = process.finish(start(workdir, max_file_bytes=MAX_FILE_BYTES))
  wrong = []
  if code != 75 or 'error: step 240, the last one: got no checkpoint' not in (
    output
  ):
    wrong.append(f'got exit code {code}, expected 75: {output}')
  after = {step: process.arrays(workdir, step) for step in seals.steps(root)}
  if before.keys() != after.keys() or any(
    before[step][name].tobytes() != after[step][name].tobytes()
    for step in before
    for name in before[step]
  ):
    wrong.append('older checkpoints were changed')
  code, output = process.finish(start(workdir))
  if code:
    return [*wrong, f'exit code {code}: {output}']
  return wrong + process.differences(workdir, expected)


@contextlib.contextmanager
def tmpfs(place: pathlib.Path) -> Iterator[pathlib.Path | None]:
  """A file system of a few megabytes; None where one cannot be mounted."""
  place.mkdir()
  mounted = subprocess.run(
    ['mount', '-t', 'tmpfs', '-o', f'size={TMPFS_BYTES}', 'tmpfs', str(place)],
    capture_output=True,
    check=False,
  )
  try:
    yield None if mounted.returncode else place
  finally:
    if not mounted.returncode:
      subprocess.run(['umount', str(place)], check=True)


def try_full(start, disk: pathlib.Path, expected: pathlib.Path) -> list[str]:
  """Not a byte is left for anything, metrics included (ENOSPC); then there is.

  Args:
    start: starts a run.
    disk: a small file system of its own.
    expected: workdir of an uninterrupted run.
  """
  workdir, ballast = disk / 'run', disk / 'ballast'
  running = start(workdir)
  path = workdir / 'metrics.jsonl'
  _wait_for(lambda: len(process.tail(path)) > 3, running)
  with ballast.open('wb', buffering=0) as file, contextlib.suppress(OSError):
    while True:
      file.write(bytes(4096))
  size = path.stat().st_size
  lines = iter(running.stdout or ())
  seen = ''
  for line in lines:
    seen += line
    if 'the checkpoint was not saved: got' in line:
      break
  is_full = path.stat().st_size <= -(-size // 4096) * 4096
  ballast.unlink()
  code, output = process.finish(running)
  output = seen + output
  if code:
    return [f'exit code {code}: {output}']
  wrong = process.differences(workdir, expected)
  if not is_full or 'No space left' not in output:
    wrong.append(f'the disk was not full: {os.statvfs(disk)}')
  if 'lines are kept in memory' not in output:
    wrong.append(f'nothing was said of the metrics: {output}')
  return wrong
