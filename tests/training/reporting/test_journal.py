"""Files that cannot be written for a while: no line is lost, or comes twice."""

import errno
import os
import pathlib
import subprocess
import sys

import pytest

from storage import file_names
from training.reporting import journal, metrics

ROOT = pathlib.Path(__file__).parents[3]


def _fails_after(monkeypatch, num_bytes):
  """Makes the disk full: so many bytes more fit on it."""
  real, left = os.pwrite, [num_bytes]

  def pwrite(descriptor, data, offset):
    if not left[0]:
      raise OSError(errno.ENOSPC, 'No space left on device')
    done = real(descriptor, data[: left[0]], offset)
    left[0] -= done
    return done

  monkeypatch.setattr(os, 'pwrite', pwrite)
  return left


def test_lines_wait_for_room_and_come_once_and_in_order(tmp_path, monkeypatch):
  told = []
  log = journal.Journal(tmp_path / 'log', told.append)
  log.write('one\n')
  left = _fails_after(monkeypatch, 2)
  log.write('two\n')  # half of it fits
  log.write('three\n')
  assert (tmp_path / 'log').read_text() == 'one\ntw'
  with pytest.raises(OSError, match='No space left'):
    log.sync()
  (text,) = told
  assert text.endswith('its lines are kept in memory, and written when that'
                       ' works again')  # fmt: skip
  left[0] = 1000
  log.write('four\n')
  log.sync()
  assert (tmp_path / 'log').read_text() == 'one\ntwo\nthree\nfour\n'
  assert told[1].endswith('can be written again, no line is missing')
  log.close()


def test_what_is_lost_at_the_end_is_told(tmp_path, monkeypatch):
  told = []
  log = journal.Journal(tmp_path / 'log', told.append)
  _fails_after(monkeypatch, 0)
  log.write('one\n')
  log.close()
  assert told[-1].endswith('No space left on device; 1 lines are lost')


def test_a_full_disk_does_not_stop_tensorboard_or_the_run():
  """The writer that is replaced hung here, in its eleventh event."""
  program = (
    'import pathlib, resource, tempfile\n'
    'from training.reporting import journal\n'
    'resource.setrlimit(resource.RLIMIT_FSIZE, (10_000, 10_000))\n'
    'with tempfile.TemporaryDirectory() as name:\n'
    '  board = journal.TensorBoard(pathlib.Path(name), purge_step=1)\n'
    '  for step in range(2000):\n'
    "    board.write(step, {f'train/{i}': 1.0 for i in range(9)})\n"
    '  board.close()\n'
    "print('done')\n"
  )

  done = subprocess.run(
    [sys.executable, '-c', program],
    cwd=ROOT,
    capture_output=True,
    text=True,
    timeout=60,
    check=False,
  )
  assert done.stdout == 'done\n', done.stderr


def test_torch_is_not_imported_for_tensorboard_and_can_be_later(tmp_path):
  (tmp_path / 'torch.py').write_text("print('torch')\n")
  program = (
    "from training.reporting import journal\nprint('journal')\nimport torch\n"
  )
  done = subprocess.run(
    [sys.executable, '-c', program],
    env={**os.environ, 'PYTHONPATH': f'{ROOT}{os.pathsep}{tmp_path}'},
    capture_output=True,
    text=True,
    timeout=60,
    check=False,
  )
  assert done.stdout == 'journal\ntorch\n', done.stderr


def test_a_damaged_metrics_file_is_named(tmp_path):
  (tmp_path / file_names.METRICS).write_text(
    '{"kind": "train", "step": 1}\n{"kind": "tr\x00in", "step": 2}\n'
  )
  with pytest.raises(
    ValueError, match=r'metrics.jsonl, line 2: got .*, expected a record as JSO'
  ):
    metrics.Log(tmp_path, first_step=2)


def test_an_owed_evaluation_is_recorded_once(tmp_path):
  log = metrics.Log(tmp_path, first_step=0)
  for step in (1, 2):
    log.write('train', step, {'loss': 1.0})
    log.write('eval', step, {'loss': 1.0})
  log.close()
  metrics.Log(tmp_path, first_step=2, evaluation_owed=True).close()
  kinds = [(r['kind'], r['step']) for r in metrics.read(tmp_path)]
  assert kinds == [('train', 1), ('eval', 1), ('train', 2)]
