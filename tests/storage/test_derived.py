"""Derived directories: damage is named, whatever the time stamps say."""

import os

import pytest

from storage import derived, remembered


def _write(partial):
  (partial / 'a.bin').write_bytes(b'abcdef')
  (partial / 'sub').mkdir()
  (partial / 'sub' / 'b.bin').write_bytes(b'')


@pytest.fixture
def directory(tmp_path):
  derived.open_or_write(tmp_path / 'd', _write)
  return tmp_path / 'd'


def _reopen(directory):
  derived.open_or_write(directory, lambda _: pytest.fail('written again'))


def test_it_is_written_once(directory):
  _reopen(directory)
  (directory / 'more.json').write_text('not in the list')
  _reopen(directory)


@pytest.mark.parametrize('is_remembered', [False, True])
@pytest.mark.parametrize(
  ('data', 'message'),
  [
    (b'\0' * 6, r'a.bin: got SHA-256 .*, expected .*: its bytes were altered'),
    (b'abc', r'a.bin: got 3 bytes, expected 6: it was truncated or altered'),
    (b'', r'a.bin: got 0 bytes, expected 6: it was truncated'),
    (None, r'a.bin: got .*No such file'),
  ],
)
def test_damage_is_named_with_its_remedy(
  directory, monkeypatch, data, message, is_remembered
):
  if is_remembered:
    monkeypatch.setattr(remembered, '_SETTLED_NS', 0)
    _reopen(directory)
    assert (directory / 'verified.json').is_file()
  path = directory / 'a.bin'
  times = path.stat().st_atime_ns, path.stat().st_mtime_ns
  if data is None:
    path.unlink()
  else:
    path.write_bytes(data)
    os.utime(path, ns=times)
  for _ in range(2):
    with pytest.raises(
      derived.DamagedError, match=f'{message}.*delete {directory}, and start'
    ):
      _reopen(directory)


@pytest.mark.parametrize('text', [None, '', '{', '[1]', '{"a.bin": 3}'])
def test_a_damaged_list_is_named(directory, text):
  path = directory / 'files.json'
  path.unlink()
  if text is not None:
    path.write_text(text)
  with pytest.raises(derived.DamagedError, match=r'files.json: got .*delete'):
    _reopen(directory)


def test_a_read_only_directory_is_verified(directory, monkeypatch):
  def refuse(*_, **__):
    raise PermissionError('read-only')

  monkeypatch.setattr(remembered, '_SETTLED_NS', 0)
  monkeypatch.setattr(remembered.atomic, 'write_text', refuse)
  _reopen(directory)
  (directory / 'a.bin').write_bytes(b'abcdeF')
  with pytest.raises(derived.DamagedError, match='its bytes were altered'):
    _reopen(directory)
