"""Spans: ranges of a text that are special tokens."""

import pytest

from text import spans


@pytest.mark.parametrize(
  ('offsets', 'ranges', 'expected'),
  [
    ([], [(0, 3)], []),
    ([(0, 1), (1, 2)], [], [False, False]),
    ([(0, 2), (2, 4), (4, 6)], [(2, 4)], [False, True, False]),
    ([(0, 3), (3, 5), (5, 6)], [(2, 4)], [True, True, False]),
    ([(0, 1), (0, 1), (1, 2)], [(0, 1)], [True, True, False]),
    ([(0, 9)], [(1, 2), (3, 4)], [True]),
    ([(0, 2), (2, 4), (4, 6), (6, 8)], [(1, 3), (7, 8)], [1, 1, 0, 1]),
    ([(0, 2), (2, 2), (2, 4)], [(2, 2)], [False, False, False]),
  ],
)
def test_overlaps(offsets, ranges, expected):
  assert spans.overlaps(offsets, ranges) == list(map(bool, expected))
