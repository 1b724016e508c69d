"""Prompt look-up: the drafts of the longest match, for a bounded price."""

import numpy as np
import pytest

from inference.speculation import ngrams


def _slow(tokens, most, *, least, longest):
  """Returns the draft by comparing every place with the end."""
  end = len(tokens)
  best = 0, -1
  for place in range(end - 1):
    length = 0
    while (
      length < longest
      and length <= place
      and tokens[place - length] == tokens[end - 1 - length]
    ):
      length += 1
    if length >= least:
      best = max(best, (length, place))
  if best[1] < 0:
    return ()
  text = list(tokens)
  for offset in range(most):
    text.append(text[best[1] + 1 + offset])
  return tuple(text[end:])


def test_a_draft_continues_the_longest_match_the_latest_of_equals():
  drafter = ngrams.Ngrams(least=2, most=4)
  text = [1, 2, 3, 7, 7, 2, 3, 8, 1, 2, 3]
  # (1, 2, 3) is longer than the later (2, 3).
  assert drafter.draft('a', text, 3) == (7, 7, 2)
  assert drafter.draft('b', [2, 3, 7, 2, 3, 8, 2, 3], 1) == (8,)
  assert drafter.draft('c', [1, 2, 3, 4], 5) == ()
  assert drafter.draft('d', [5], 5) == ()


def test_a_text_that_repeats_itself_goes_on_in_its_draft():
  drafter = ngrams.Ngrams(least=2, most=8)
  assert drafter.draft('a', [4, 5, 6, 4, 5, 6, 4], 7) == (5, 6, 4, 5, 6, 4, 5)
  assert drafter.draft('b', [9, 9, 9], 4) == (9, 9, 9, 9)


def test_an_index_that_grows_finds_what_a_search_of_the_whole_text_finds():
  rng = np.random.default_rng(0)
  drafter, num_found = ngrams.Ngrams(least=3, most=6), 0
  tokens: list[int] = []
  while len(tokens) < 400:
    tokens += rng.integers(0, 3, rng.integers(1, 4)).tolist()
    # Of so few tokens, more places match than are compared: the length of the
    # match is that of the latest of them.
    expected = _slow(tokens[-40:], 5, least=3, longest=6)
    found = drafter.draft('a', tokens, 5)
    num_found += bool(found)
    assert len(found) == 5 or not expected
    if expected:
      start = next(
        place
        for place in range(len(tokens) - 2, -1, -1)
        if (*tokens, *found)[place + 1 : place + 6] == found
        and tokens[place - 2 : place + 1] == tokens[-3:]
      )
      assert start >= 2
  assert num_found > 100
  rare: list[int] = []
  for _ in range(200):  # few places match: the result is the search's
    rare += rng.integers(0, 12, 3).tolist()
    assert drafter.draft('b', rare, 4) == _slow(rare, 4, least=3, longest=6)


def test_a_long_prompt_is_read_over_several_calls():
  drafter = ngrams.Ngrams()
  text = [*range(5000), *range(100)]
  assert drafter.draft('a', text, 3) == ()
  assert drafter.draft('a', text, 3) == (100, 101, 102)


def test_a_sequence_that_ended_is_forgotten():
  drafter = ngrams.Ngrams()
  assert drafter.draft('a', [1, 2, 3, 4, 1, 2, 3], 1) == (4,)
  drafter.forget('a')
  drafter.forget('a')
  assert drafter.draft('a', [1, 2, 3, 9, 1, 2, 3], 1) == (9,)


def test_lengths_that_cannot_be_are_refused():
  for least, most in ((0, 3), (4, 3)):
    with pytest.raises(ValueError, match='expected 1 <= least <= most'):
      ngrams.Ngrams(least=least, most=most)
