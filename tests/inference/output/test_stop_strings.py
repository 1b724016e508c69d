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


class _Naive:
  """Tests every string on every piece of text; the interface of StopMatcher."""

  def __init__(self, stop):
    self._stop, self._text, self._num_shown = stop, '', 0
    self.matched = None

  def push(self, piece, *, may_match=True):
    if self.matched is not None:
      return ''
    num_before, self._text = len(self._text), self._text + piece
    if may_match:
      for end in range(num_before + 1, len(self._text) + 1):
        ends = [x for x in self._stop if self._text[:end].endswith(x)]
        if ends:
          self.matched = max(ends, key=len)
          return self._show(end - len(self.matched))
    num_held = max(
      (
        size
        for size in range(1, len(self._text) + 1)
        for x in self._stop
        if size < len(x) and x.startswith(self._text[-size:])
      ),
      default=0,
    )
    return self._show(len(self._text) - num_held)

  def finish(self):
    return self._show(len(self._text)) if self.matched is None else ''

  def _show(self, end):
    shown, self._num_shown = self._text[self._num_shown : end], end
    return shown


@hypothesis.given(
  stop=st.lists(st.text('ab\u00e9', min_size=1, max_size=6), max_size=8),
  pieces=st.lists(
    st.tuples(st.text('ab\u00e9', max_size=5), st.booleans()), max_size=12
  ),
)
def test_every_piece_is_passed_as_by_testing_every_string(stop, pieces):
  shared = stop_strings.StopStrings(stop)
  # Two matchers of one request, as of two samples, do not disturb each other.
  ours = [stop_strings.StopMatcher(shared) for _ in range(2)]
  naive = _Naive(stop)
  for piece, may_match in pieces:
    expected = naive.push(piece, may_match=may_match)
    for matcher in ours:
      assert matcher.push(piece, may_match=may_match) == expected
      assert matcher.matched == naive.matched
  expected = naive.finish()
  assert [matcher.finish() for matcher in ours] == [expected] * 2


class _Counted(dict):
  num_lookups = 0

  def get(self, key, default=None):
    self.num_lookups += 1
    return super().get(key, default)


@pytest.mark.parametrize('num_strings', [1, 256])
def test_a_character_costs_the_same_with_one_string_as_with_many(num_strings):
  # Beginnings that all match almost to their end.
  stop = [f'{"a" * 14}{number:03x}!' for number in range(num_strings)]
  matcher = stop_strings.StopMatcher(stop)
  tables = matcher._stop.tables
  edges = _Counted(tables.edges)
  matcher._stop.tables = tables._replace(edges=edges)
  text = ('a' * 17 + '0f0') * 500
  for start in range(0, len(text), 3):
    matcher.push(text[start : start + 3])
  assert matcher.matched is None
  # Each look-up goes on in the text, or to a shorter state.
  assert len(text) <= edges.num_lookups <= 2 * len(text)
