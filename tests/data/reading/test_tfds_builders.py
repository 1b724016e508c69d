"""Preparation with two processes at once, and after a killed process."""

import pathlib
import signal
import subprocess
import sys
import time

from data import sources

ROOT = pathlib.Path(__file__).parents[3]
LEFTOVER = 'python_stdlib/*_*/incomplete.*'

# Prints the number of documents, and whether a heavy library was imported.
OPEN = """
import sys
from data import sources
source = sources.python_stdlib(split='all', data_dir=sys.argv[1])
assert source[0]['text']
print(len(source), sorted({'tensorflow', 'jax', 'grain'} & set(sys.modules)))
"""


def _start(data_dir):
  return subprocess.Popen(
    [sys.executable, '-W', 'error', '-c', OPEN, str(data_dir)],
    cwd=ROOT,
    stdout=subprocess.PIPE,
    stderr=subprocess.PIPE,
    text=True,
  )


def test_two_processes_at_once_without_tensorflow(tmp_path):
  processes = [_start(tmp_path) for _ in range(2)]
  outputs = [process.communicate(timeout=120) for process in processes]
  assert [p.returncode for p in processes] == [0, 0], outputs
  source = sources.python_stdlib(split='all', data_dir=str(tmp_path))
  for out, _ in outputs:  # and nothing else on standard output
    assert out == f'{len(source)} []\n'


def test_a_killed_preparation_is_done_again(tmp_path):
  process = _start(tmp_path)
  deadline = time.monotonic() + 60
  while not list(tmp_path.glob(LEFTOVER)):
    assert time.monotonic() < deadline, 'preparation did not start'
    assert process.poll() is None, process.communicate()
    time.sleep(0.01)
  process.send_signal(signal.SIGKILL)
  process.communicate()
  # Only a preparation that was really cut short proves anything.
  assert list(tmp_path.glob(LEFTOVER))
  assert not list(tmp_path.rglob('dataset_info.json'))
  source = sources.python_stdlib(split='all', data_dir=str(tmp_path))
  assert all(source[i]['text'] is not None for i in range(len(source)))
  assert not list(tmp_path.glob(LEFTOVER))


def test_a_prepared_dataset_needs_no_write_access(data_dir, monkeypatch):
  def refuse(*args, **kwargs):
    raise PermissionError('read-only')

  monkeypatch.setattr(pathlib.Path, 'mkdir', refuse)
  monkeypatch.setattr(pathlib.Path, 'open', refuse)
  assert len(sources.python_stdlib(split='train', data_dir=str(data_dir)))
