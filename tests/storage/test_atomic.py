"""Atomic writes: the order of their steps, and a failure or kill at each."""

import os
import pathlib
import subprocess
import sys
import textwrap
import time
from unittest import mock

import pytest

from storage import atomic

# The steps of every write.
STEPS = ((os, 'fsync'), (os, 'replace'), (atomic, '_renameat2'))


@pytest.fixture
def calls(monkeypatch):
  """Every fsync and rename, with the names of their files."""
  made = []
  fsync, replace = os.fsync, os.replace

  def record_fsync(descriptor):
    path = pathlib.Path(os.readlink(f'/proc/self/fd/{descriptor}'))
    made.append(('fsync', _role(path.name)))
    fsync(descriptor)

  def record_replace(source, target):
    made.append(('replace', _role(source.name), _role(target.name)))
    replace(source, target)

  monkeypatch.setattr(atomic.os, 'fsync', record_fsync)
  monkeypatch.setattr(atomic.os, 'replace', record_replace)
  return made


def _role(name):
  """Returns a name without the random digits of an unfinished write."""
  return name.rpartition('-')[0] if '-' in name else name


@pytest.fixture
def parent(tmp_path):
  (tmp_path / 'parent').mkdir()
  return tmp_path / 'parent'


def _fill(partial):
  (partial / 'sub').mkdir()
  (partial / 'sub' / 'b').write_text('new')
  (partial / 'a').write_text('new')


def _write_file(target):
  atomic.write_text(target, 'new')


def _write_directory(target):
  with atomic.new_directory(target) as partial:
    _fill(partial)


def test_a_file_is_on_disk_before_its_name_is(parent, calls):
  atomic.write_text(parent / 'f', 'text: ä')
  assert calls == [
    ('fsync', '.f.partial'),
    ('replace', '.f.partial', 'f'),
    ('fsync', 'parent'),
  ]
  assert (parent / 'f').read_text('utf-8') == 'text: ä'


def test_a_file_that_need_not_survive_a_power_loss_waits_for_no_disk(
  parent, calls
):
  atomic.write_text(parent / 'f', 'text', durable=False)
  assert calls == [('replace', '.f.partial', 'f')]


def test_a_directory_is_on_disk_before_its_name_is(parent, calls):
  _write_directory(parent / 'd')
  assert sorted(calls[:2]) == [('fsync', 'b'), ('fsync', 'sub')]
  assert calls[2:] == [
    ('fsync', 'a'),
    ('fsync', '.d.partial'),
    ('replace', '.d.partial', 'd'),
    ('fsync', 'parent'),
  ]


def _replace_old(parent):
  (parent / 'd').mkdir()
  (parent / 'd' / 'old').touch()
  _write_directory(parent / 'd')
  assert sorted(os.listdir(parent)) == ['d']
  assert sorted(os.listdir(parent / 'd')) == ['a', 'sub']


def test_a_directory_that_exists_is_exchanged_and_deleted_last(parent, calls):
  if not _can_exchange(parent):
    pytest.skip('the file system cannot exchange two names')
  _replace_old(parent)
  assert calls[4:] == [('fsync', 'parent')]  # renameat2 is not of `os`


def test_without_an_exchange_it_is_set_aside(parent, calls, monkeypatch):
  monkeypatch.setattr(atomic, '_renameat2', lambda *_: -1)
  _replace_old(parent)
  assert calls[4:] == [
    ('replace', 'd', '.d.previous'),
    ('replace', '.d.partial', 'd'),
    ('fsync', 'parent'),
  ]


def _can_exchange(parent):
  names = parent / 'one', parent / 'two'
  for name in names:
    name.mkdir()
  try:
    return atomic._exchange(*names)
  finally:
    for name in names:
      name.rmdir()


def test_the_disk_has_the_names_of_new_parents(parent, calls):
  _write_directory(parent / 'x' / 'y' / 'd')
  assert calls[:2] == [('fsync', 'parent'), ('fsync', 'x')]


def _old(target, kind):
  if kind == 'file':
    target.write_text('old')
  else:
    target.mkdir()
    (target / 'old').write_text('old')


def _state(target):
  """Returns old, new or none; anything else is a part."""
  if not target.exists():
    return 'none'
  if target.is_file():
    return target.read_text()
  if sorted(os.listdir(target)) == ['old']:
    return 'old'
  assert sorted(os.listdir(target)) == ['a', 'sub']
  assert (target / 'a').read_text() == 'new'
  return (target / 'sub' / 'b').read_text()


def _write_in_two_steps(target):
  """As on a file system that cannot exchange two names."""
  with mock.patch.object(atomic, '_renameat2', None):
    _write_directory(target)


WRITE = {
  'file': _write_file,
  'directory': _write_directory,
  'directory in two steps': _write_in_two_steps,
}
# Steps of a write that replaces something, see the tests above.
NUM_STEPS = {'file': 3, 'directory': 6, 'directory in two steps': 7}


@pytest.mark.parametrize('error', [OSError(28, 'No space'), KeyboardInterrupt])
@pytest.mark.parametrize(
  ('kind', 'step'),
  [(kind, step) for kind, most in NUM_STEPS.items() for step in range(most)],
)
def test_a_step_that_fails_leaves_old_or_new(
  parent, monkeypatch, kind, step, error
):
  if kind == 'directory' and not _can_exchange(parent):
    pytest.skip('the file system cannot exchange two names')
  target = parent / 'target'
  _old(target, kind)
  left = step

  def failing(function):
    def call(*args):
      nonlocal left
      left -= 1
      if left == -1:
        raise error
      return function(*args)

    return call

  for module, name in STEPS:
    monkeypatch.setattr(module, name, failing(getattr(module, name)))
  with pytest.raises((OSError, KeyboardInterrupt), match='^$|No space'):
    WRITE[kind](target)
  # The last step waits for the disk: the name is there already.
  is_last = step == NUM_STEPS[kind] - 1
  assert _state(target) == ('new' if is_last else 'old')
  atomic.remove_leftovers(parent)
  assert os.listdir(parent) == ['target']


# A child per step, which dies as a killed process does: nothing is cleaned up.
_KILL = textwrap.dedent(
  """
  import os, pathlib, sys
  from tests.storage import test_atomic

  def dying(function, left=[int(sys.argv[3])]):
    def call(*args):
      left[0] -= 1
      if left[0] == -1:
        os._exit(9)
      return function(*args)
    return call

  for module, name in test_atomic.STEPS:
    setattr(module, name, dying(getattr(module, name)))
  test_atomic.WRITE[sys.argv[2]](pathlib.Path(sys.argv[1]))
  """
)


@pytest.mark.fast_cases(2)
@pytest.mark.parametrize('kind', sorted(WRITE))
def test_a_kill_before_any_step_leaves_old_or_new(tmp_path, kind):
  if kind == 'directory' and not _can_exchange(tmp_path):
    pytest.skip('the file system cannot exchange two names')
  states = []
  children = []
  for step in range(NUM_STEPS[kind] + 1):
    parent = tmp_path / str(step)
    parent.mkdir()
    _old(parent / 'target', kind)
    child = [sys.executable, '-c', _KILL, parent / 'target', kind, str(step)]
    children.append(subprocess.Popen(child))
  for step, child in enumerate(children):
    parent = tmp_path / str(step)
    assert child.wait() == (9 if step < NUM_STEPS[kind] else 0)
    before = _state(parent / 'target')
    # Between the two steps alone there is neither.
    assert before != 'none' or (kind, step) == ('directory in two steps', 5)
    atomic.restore(parent / 'target')
    restored = _state(parent / 'target')
    assert restored == (before if before != 'none' else 'old')
    atomic.remove_leftovers(parent)
    assert os.listdir(parent) == ['target']
    states.append(_state(parent / 'target'))
  num_old = {'file': 2, 'directory': 5, 'directory in two steps': 6}[kind]
  assert states == ['old'] * num_old + ['new'] * (len(states) - num_old)


def test_of_several_old_directories_the_last_is_restored(parent):
  for i in ('2', '0', '1'):
    (parent / f'.f.previous-0000000{i}').mkdir()
    (parent / f'.f.previous-0000000{i}' / i).touch()
    os.rename(parent / f'.f.previous-0000000{i}', parent / 'x')
    time.sleep(0.02)  # more than a tick of the clock of files
    os.rename(parent / 'x', parent / f'.f.previous-0000000{i}')
  atomic.remove_leftovers(parent)
  assert os.listdir(parent) == ['f']
  assert os.listdir(parent / 'f') == ['1']


def test_leftovers_are_of_unfinished_writes_alone(parent):
  for name in ('.f.partial-0123abcd', '.g.previous-0123abcd', '.h.partial-x'):
    (parent / name).touch()
  assert not atomic.is_leftover(parent / '.h.partial-x')
  atomic.remove_leftovers(parent, 'f')
  assert sorted(os.listdir(parent)) == ['.g.previous-0123abcd', '.h.partial-x']
  atomic.remove_leftovers(parent)
  assert sorted(os.listdir(parent)) == ['.h.partial-x', 'g']


def test_a_file_that_cannot_be_written_leaves_nothing(parent):
  with pytest.raises(FileNotFoundError):
    atomic.write_text(parent / 'missing' / 'f', 'text')
  (parent / 'd').mkdir()
  with pytest.raises(IsADirectoryError):
    atomic.write_text(parent / 'd', 'text')
  assert os.listdir(parent) == ['d']
