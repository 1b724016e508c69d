"""Paths of files that are given away."""

import pytest

from storage import public_paths


@pytest.mark.parametrize(
  ('path', 'expected'),
  [
    ('/data/corpus/{split}/*.txt', 'corpus/{split}/*.txt'),
    ('/data/book.txt', 'book.txt'),
    ('~/book.txt', 'book.txt'),
    ('/*.txt', '*.txt'),
    ('corpus/*.txt', 'corpus/*.txt'),
    ('lm1b', 'lm1b'),
    ('', ''),
  ],
)
def test_a_path_loses_the_directories_of_the_machine(path, expected):
  assert public_paths.public(path) == expected
