"""Frames: whatever the cuts of a stream, its messages are the same."""

import io
import random

from parallel import frames

_LISTS = [[('a', 1)], [('b', (1, 2), 'text'), ('c',)], [], [('d', 'x' * 1000)]]


def test_every_cut_of_a_stream_gives_the_same_messages():
  whole = b''.join(frames.packed(each) for each in _LISTS)
  assert list(frames.read(io.BytesIO(whole))) == _LISTS
  rng = random.Random(0)
  for longest in (1, 7, 50, 5000):
    reader, found, at = frames.Reader(), [], 0
    while at < len(whole):
      size = rng.randint(1, longest)
      found += reader.fed(whole[at : at + size])
      at += size
    assert found == _LISTS


def test_a_frame_that_is_cut_short_is_the_end():
  whole = b''.join(frames.packed(each) for each in _LISTS[:2])
  assert list(frames.read(io.BytesIO(whole[:-1]))) == _LISTS[:1]
