"""Stop strings: found in any cut of the text, and never shown in part."""

import hypothesis
from hypothesis import strategies as st
import pytest

from inference.output import stop_strings


def _run(pieces, stop):
  matcher = stop_strings.StopMatcher(stop)
  shown = [matcher.push(piece) for piece in pieces]
  return [*shown, matcher.finish()], matcher.matched


def test_text_without_a_stop_string_passes_at_once():
  assert _run(['ab', 'c'], ())[0] == ['ab', 'c', '']
  assert _run(['ab', 'c'], ('xyz',))[0] == ['ab', 'c', '']


def test_a_possible_beginning_is_held_until_it_is_known():
  shown, matched = _run(['a\n', '\nU', 'se it'], ('\n\nUser:',))
  assert shown == ['a', '', '\n\nUse it', '']
  assert matched is None


def test_a_stop_string_over_pieces_never_leaks():
  shown, matched = _run(['yes\n', 'Us', 'er', ': no'], ('\nUser:',))
  assert ''.join(shown) == 'yes'
  assert matched == '\nUser:'


def test_what_is_held_at_the_end_is_shown():
  shown, matched = _run(['yes\nUser'], ('\nUser:',))
  assert ''.join(shown) == 'yes\nUser'
  assert matched is None


@pytest.mark.parametrize(
  ('stop', 'text', 'matched'),
  [
    (('abcd', 'bc'), 'a', 'bc'),  # completed first
    (('bc', 'abc'), '', 'abc'),  # completed together: the longer
    (('d', 'cd'), 'ab', 'cd'),
  ],
)
def test_the_stop_string_completed_first_wins(stop, text, matched):
  for pieces in (['abcd'], ['a', 'b', 'c', 'd'], ['ab', 'cd']):
    shown, found = _run(pieces, stop)
    assert (''.join(shown), found) == (text, matched)


def test_a_stop_string_completed_where_none_counts_is_text():
  matcher = stop_strings.StopMatcher(('bc', 'abcd'))
  assert matcher.push('abc', may_match=False) == ''  # 'abcd' may follow
  assert matcher.push('x') == 'abcx'
  assert matcher.push('b', may_match=False) == ''
  assert matcher.push('c') == ''
  assert matcher.matched == 'bc'
  # A whole stop string begins no other, so it is not held back.
  matcher = stop_strings.StopMatcher(('bc', 'wxyz'))
  assert matcher.push('abc', may_match=False) == 'abc'


def _first_stop(text, stop, num_passed=0):
  """Returns the result by definition, character by character."""
  for end in range(num_passed + 1, len(text) + 1):
    for found in sorted(stop, key=len, reverse=True):
      if text[:end].endswith(found):
        return text[: end - len(found)], found
  return text, None


@hypothesis.given(
  text=st.text('abc', max_size=12),
  stop=st.lists(st.text('abc', min_size=1, max_size=4), max_size=3),
  cuts=st.lists(st.integers(0, 12), max_size=4),
  num_unmatched=st.integers(0, 3),
)
def test_however_the_text_is_cut(text, stop, cuts, num_unmatched):
  edges = [0, *sorted(min(cut, len(text)) for cut in cuts), len(text)]
  matcher = stop_strings.StopMatcher(stop)
  shown = ''
  for number, (a, b) in enumerate(zip(edges, edges[1:], strict=False)):
    shown += matcher.push(text[a:b], may_match=number >= num_unmatched)
  shown += matcher.finish()
  num_passed = edges[min(num_unmatched, len(edges) - 1)]
  assert (shown, matcher.matched) == _first_stop(text, stop, num_passed)
