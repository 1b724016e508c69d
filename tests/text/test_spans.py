"""Ranges of a text that are not text."""

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


def test_encode_puts_special_tokens_between_texts():
  def encode_text(text):
    return spans.Encoded(
      [ord(char) for char in text], [(i, i + 1) for i in range(len(text))]
    )

  ids, offsets = spans.encode(
    '<a><b>xy<a>z',
    [(0, 3), (8, 11)],
    special_tokens={'<a>': 1, '<b>': 2},
    encode_text=encode_text,
  )
  assert ids == [1, *map(ord, '<b>xy'), 1, ord('z')]
  assert offsets[0] == (0, 3)
  assert offsets[6:] == [(8, 11), (11, 12)]
