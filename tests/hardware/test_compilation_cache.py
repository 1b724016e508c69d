"""The compilation cache on disk: entries that a kill cut short."""

import os
import zlib

import pytest

from hardware import compilation_cache

_WHOLE = zlib.compress(b'a program' * 100)


def _write(directory, entries):
  for name, data in entries.items():
    (directory / name).write_bytes(data)


def _names(directory):
  return {path.name for path in directory.glob('*-cache')}


@pytest.mark.parametrize('kept', [0, 1, 5, len(_WHOLE) - 1])
def test_an_entry_that_was_cut_short_is_removed(tmp_path, kept):
  _write(tmp_path, {'a-cache': _WHOLE, 'b-cache': _WHOLE[:kept]})
  (tmp_path / 'b-atime').write_bytes(b'')
  compilation_cache.remove_incomplete(tmp_path)
  assert _names(tmp_path) == {'a-cache'}
  assert (tmp_path / 'a-cache').read_bytes() == _WHOLE
  # Also one that a later start leaves.
  _write(tmp_path, {'c-cache': _WHOLE[:kept], 'd-cache': _WHOLE})
  compilation_cache.remove_incomplete(tmp_path)
  assert _names(tmp_path) == {'a-cache', 'd-cache'}


def test_entries_that_were_checked_are_not_read_again(tmp_path, monkeypatch):
  _write(tmp_path, {'a-cache': _WHOLE})
  os.utime(tmp_path / 'a-cache', (0, 0))
  compilation_cache.remove_incomplete(tmp_path)
  monkeypatch.setattr(compilation_cache, 'is_whole', lambda entry: False)
  compilation_cache.remove_incomplete(tmp_path)
  assert _names(tmp_path) == {'a-cache'}


def test_a_cache_that_does_not_exist_yet_is_left_to_jax(tmp_path):
  compilation_cache.remove_incomplete(tmp_path / 'none')
  assert not (tmp_path / 'none').exists()


def test_an_entry_that_is_no_archive_is_not_whole():
  assert compilation_cache.is_whole(_WHOLE)
  for entry in (b'', b'no archive', _WHOLE[:-1]):
    assert not compilation_cache.is_whole(entry)
  assert not compilation_cache.is_whole(b'\x28\xb5\x2f\xfd and nothing')
