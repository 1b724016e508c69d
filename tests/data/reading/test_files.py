"""The files of a path and a split."""

import pytest

from data.reading import files


@pytest.fixture
def tree(tmp_path):
  for name in (
    'train-0.jsonl',
    'train-1.jsonl',
    'test-0.jsonl',
    'notes.txt',
    '.hidden.jsonl',
    'deep/er/x.jsonl',
    'deep/.cache/y.jsonl',
    'we[ir]d.jsonl',
  ):
    path = tmp_path / name
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text('x')
  return tmp_path


def _names(tree, paths):
  return [path.relative_to(tree).as_posix() for path in paths]


@pytest.mark.parametrize(
  ('path', 'split', 'expected'),
  [
    ('notes.txt', 'all', ['notes.txt']),
    ('we[ir]d.jsonl', 'all', ['we[ir]d.jsonl']),
    ('train-*.jsonl', 'all', ['train-0.jsonl', 'train-1.jsonl']),
    ('deep', 'all', ['deep/er/x.jsonl']),
    ('{split}-*.jsonl', 'train', ['train-0.jsonl', 'train-1.jsonl']),
    ('{split}-0.jsonl', 'test', ['test-0.jsonl']),
  ],
)
def test_resolve(tree, path, split, expected):
  found = files.resolve(f'{tree}/{path}', split, '.jsonl')
  assert _names(tree, found) == expected


def test_directory_without_a_suffix_gives_every_visible_file(tree):
  found = files.resolve(str(tree), 'all', '')
  assert len(found) == 6


def test_home_directory(tree, monkeypatch):
  monkeypatch.setenv('HOME', str(tree))
  assert _names(tree, files.resolve('~/notes.txt', 'all', '')) == ['notes.txt']


@pytest.mark.parametrize('split', ['validation', 'train+test', 'train[:9%]'])
def test_missing_split_lists_those_available(tree, split):
  with pytest.raises(ValueError, match=r'no split .*; available: test, train$'):
    files.resolve(f'{tree}/{{split}}-*.jsonl', split, '.jsonl')


def test_missing_split_where_the_name_occurs_twice(tmp_path):
  for name in ('a/a.txt', 'b/b.txt', 'c/d.txt'):
    (tmp_path / name).parent.mkdir()
    (tmp_path / name).write_text('x')
  with pytest.raises(ValueError, match='available: a, b$'):
    files.resolve(f'{tmp_path}/{{split}}/{{split}}.txt', 'c', '')


def test_missing_split_without_any_files(tmp_path):
  with pytest.raises(ValueError, match='available: none, there are no such'):
    files.resolve(f'{tmp_path}/{{split}}.txt', 'train', '')


def test_a_path_that_cannot_tell_splits_apart(tree):
  with pytest.raises(ValueError, match="has no '{split}', so split 'train'"):
    files.resolve(f'{tree}/notes.txt', 'train', '')


@pytest.mark.parametrize('path', ['nothing.txt', 'nothing*.txt'])
def test_missing_file(tree, path):
  with pytest.raises(FileNotFoundError, match='no files at .*nothing'):
    files.resolve(f'{tree}/{path}', 'all', '')


def test_empty_path():
  with pytest.raises(ValueError, match='path is empty, expected a file'):
    files.resolve('', 'all', '')
