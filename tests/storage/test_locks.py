"""Locks: one process writes, the others wait or are refused."""

import subprocess
import sys
import textwrap
import threading

import pytest

from storage import locks

_HOLD = textwrap.dedent(
  """
  import pathlib, sys
  from storage import locks
  with locks.held(pathlib.Path(sys.argv[1]), 'PLACE'):
    print('held', flush=True)
    sys.stdin.read()
  """
)


def test_a_held_lock_names_its_holder_and_goes_with_it(tmp_path):
  path = tmp_path / 'new' / '.lock'
  with subprocess.Popen(
    [sys.executable, '-c', _HOLD, str(path)],
    stdin=subprocess.PIPE,
    stdout=subprocess.PIPE,
  ) as process:
    assert process.stdout.readline() == b'held\n'
    with (
      pytest.raises(
        locks.InUseError,
        match=rf'PLACE: got a directory that process {process.pid} of',
      ),
      locks.held(path, 'PLACE'),
    ):
      pass
    process.kill()
  with locks.held(path, 'PLACE'):
    pass


def test_a_lock_on_a_file_that_was_deleted_is_taken_anew(tmp_path, monkeypatch):
  """Its holder deleted it after it was opened here, before it was locked."""
  path = tmp_path / '.lock'
  flock, deleted = locks.fcntl.flock, []

  def deleting(descriptor, operation):
    if not deleted:
      deleted.append(path.unlink())
    flock(descriptor, operation)

  monkeypatch.setattr(locks.fcntl, 'flock', deleting)
  with locks.held(path, 'PLACE', tell=pytest.fail):
    assert path.exists()
    with pytest.raises(locks.InUseError), locks.held(path, 'PLACE'):
      pass


def test_a_directory_is_made_once_by_threads_that_race(tmp_path):
  target, made = tmp_path / 'parent' / 'd', []

  def write(partial):
    made.append(partial)
    (partial / 'file').write_text('whole')

  threads = [
    threading.Thread(target=locks.write_once, args=(target, write))
    for _ in range(4)
  ]
  for thread in threads:
    thread.start()
  for thread in threads:
    thread.join()
  assert len(made) == 1
  assert (target / 'file').read_text() == 'whole'


def test_what_a_killed_writer_left_is_removed_by_the_next(tmp_path):
  left = tmp_path / '.d.partial-0123abcd'
  left.mkdir()
  other = tmp_path / '.other.partial-0123abcd'
  other.mkdir()
  locks.write_once(tmp_path / 'd', lambda partial: None)
  assert not left.exists()
  assert other.exists()  # which may be written right now
