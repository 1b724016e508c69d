"""The store of compiled programs that test sessions share."""

import os
import time
import zlib

import pytest

from tests.helpers import compiled_programs

ENTRY = zlib.compress(b'a program' * 100)


@pytest.fixture
def store(tmp_path):
  return tmp_path / 'store'


def _process(store):
  return compiled_programs.CompiledPrograms(store)


def _write(process, name, content=ENTRY):
  (process.directory / name).write_bytes(content)


def test_an_entry_of_one_process_reaches_another(store):
  first, second = _process(store), _process(store)
  _write(first, 'f-cache')
  first.publish()
  second.adopt()
  assert (second.directory / 'f-cache').read_bytes() == ENTRY


def test_an_entry_outlives_the_process_that_compiled_it(store):
  first = _process(store)
  _write(first, 'f-cache')
  first.close()
  assert not first.directory.exists()
  later = _process(store)
  later.adopt()
  assert (later.directory / 'f-cache').read_bytes() == ENTRY


def test_half_an_entry_is_published_only_when_it_is_whole(store):
  process = _process(store)
  _write(process, 'f-cache', ENTRY[: len(ENTRY) // 2])
  process.publish()
  assert not list(store.iterdir())
  _write(process, 'f-cache')
  _write(process, 'g-cache')  # a new name changes the directory's time stamp
  process.publish()
  assert {path.name for path in store.iterdir()} == {'f-cache', 'g-cache'}


def test_an_entry_that_exists_is_not_replaced(store):
  first, second = _process(store), _process(store)
  other = zlib.compress(b'the same program, compiled again')
  _write(first, 'f-cache')
  _write(second, 'f-cache', other)
  first.publish()
  second.publish()
  second.adopt()
  assert (store / 'f-cache').read_bytes() == ENTRY
  assert (second.directory / 'f-cache').read_bytes() == other


def test_entries_are_copied_where_there_are_no_hard_links(store, monkeypatch):
  def link(source, target):
    raise OSError('Invalid cross-device link')

  monkeypatch.setattr(os, 'link', link)
  process = _process(store)
  _write(process, 'f-cache')
  process.publish()
  assert [path.name for path in store.iterdir()] == ['f-cache']


def test_entries_that_nobody_has_read_for_long_go(store):
  process = _process(store)
  _write(process, 'old-cache')
  _write(process, 'new-cache')
  process.publish()
  long_ago = time.time() - 100
  os.utime(store / 'old-cache', (long_ago, long_ago))
  compiled_programs.prune(store, max_age_s=50)
  assert [path.name for path in store.iterdir()] == ['new-cache']
