"""Digests of files, and what differs from a list of them."""

import hashlib

import pytest

from storage import digests

ENTRIES = {
  'a': digests.Entry(1, hashlib.sha256(b'1').hexdigest()),
  'b/c': digests.Entry(2, hashlib.sha256(b'22').hexdigest()),
}


@pytest.fixture
def directory(tmp_path):
  (tmp_path / 'b').mkdir()
  (tmp_path / 'a').write_text('1')
  (tmp_path / 'b' / 'c').write_text('22')
  (tmp_path / 'list').write_text('of the others')
  return tmp_path


def _differences(directory, listed=ENTRIES, **fields):
  found = digests.names(directory, leave_out='list')
  return digests.differences(directory, found, listed, listing='list', **fields)


@pytest.mark.parametrize('num_threads', [1, 3])
def test_entries_have_sizes_and_digests(directory, num_threads):
  names = digests.names(directory, leave_out='list')
  assert names == ['a', 'b/c']
  assert digests.of_files(directory, names, num_threads=num_threads) == ENTRIES
  assert digests.of_file(directory / 'a') == ENTRIES['a'].sha256
  assert not _differences(directory, num_threads=num_threads)


def test_the_digest_of_json_does_not_depend_on_the_order_of_keys():
  assert digests.of_json({'a': 1, 'b': 2}) == digests.of_json({'b': 2, 'a': 1})
  assert digests.of_json({'a': 1}) != digests.of_json({'a': 2})


def test_what_differs_is_named(directory):
  (directory / 'a').unlink()
  (directory / 'b' / 'c').write_text('2')
  (directory / 'new').touch()
  texts = {d.kind: d.text for d in _differences(directory)}
  assert texts.keys() == {'missing', 'unlisted', 'altered'}
  assert texts['missing'].startswith(
    f'{directory}/a: got no such file, expected a file with 1 bytes and SHA-'
  )
  assert texts['unlisted'] == (
    f'{directory}/new: got a file that list does not list, expected none'
  )
  assert texts['altered'].startswith(f'{directory}/b/c: got 1 bytes and SHA-')
  assert 'expected 2 bytes and' in texts['altered']
  assert texts['altered'].endswith(': it was truncated or altered')


def test_a_list_without_sizes_compares_digests_alone(directory):
  listed = {
    name: entry._replace(num_bytes=None) for name, entry in ENTRIES.items()
  }
  assert not _differences(directory, listed)
  (directory / 'a').write_text('2')
  (difference,) = _differences(directory, listed)
  assert 'a: got SHA-256 ' in difference.text
  assert 'bytes' not in difference.text


def test_processes_share_the_reading(directory):
  for name in ('a', 'b/c'):
    (directory / name).write_text('other')
  parts = [_differences(directory, part=(i, 2)) for i in range(2)]
  assert [len(part) for part in parts] == [1, 1]
  assert parts[0] + parts[1] == _differences(directory)


def test_a_file_that_cannot_be_read_is_a_difference(directory):
  names = [*digests.names(directory, leave_out='list'), 'b']
  listed = {**ENTRIES, 'b': digests.Entry(0, '')}
  (difference,) = digests.differences(directory, names, listed, listing='list')
  assert difference.kind == 'altered'
  assert 'b: got [Errno 21] Is a directory' in difference.text
