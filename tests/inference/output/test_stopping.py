"""Transcripts: one cursor for text and ids, and no stop string leaks."""

import codecs

import hypothesis
from hypothesis import strategies as st
import pytest

from inference.output import stopping
from inference.sampling import logprobs, settings as settings_lib
from text import tokenizer

_BYTES = tokenizer.ByteTokenizer()
_EOS = _BYTES.eos_id


class _PieceTokenizer:
  """Each id has given bytes; the last id is EOS, the one before it BOS."""

  def __init__(self, pieces):
    self._pieces = (*pieces, b'', b'')
    self.eos_id = len(pieces) + 1

  def token_bytes(self, token_id):
    return self._pieces[token_id]

  def decode(self, ids):
    data = b''.join(map(self.token_bytes, ids))
    return data.decode('utf-8', errors='replace')


def _start(max_tokens=100, tok=_BYTES, **chosen):
  settings = settings_lib.Settings(**chosen)
  return stopping.Transcript(tok, settings, max_tokens=max_tokens)


def _push_all(script, ids):
  return [script.push(token_id) for token_id in ids]


def test_text_passes_with_its_ids_at_once():
  script = _start()
  assert script.push(ord('a')) == stopping.Release('a', (ord('a'),), ())
  assert script.push(ord('b')) == stopping.Release('b', (ord('b'),), ())
  assert script.text == 'ab'
  assert script.finish_reason is None


def test_a_half_character_holds_its_ids_back():
  script = _start()
  ids = list('aé€'.encode())
  releases = [(r.text, r.token_ids) for r in _push_all(script, ids)]
  assert releases == [
    ('a', (ids[0],)),
    ('', ()),
    ('é', tuple(ids[1:3])),
    ('', ()),
    ('', ()),
    ('€', tuple(ids[3:])),
  ]


def test_a_possible_stop_string_holds_its_tokens_back():
  # A part of 'x\n' is safe: the whole token waits, and 'x' with it.
  tok = _PieceTokenizer([b'x\n', b'U', b'se', b'er:'])
  script = _start(tok=tok, stop=('\nUser:',))
  assert _push_all(script, [0, 1]) == [stopping.Release('', (), ())] * 2
  assert script.push(2) == stopping.Release('', (), ())
  assert script.push(1) == stopping.Release('x\nUseU', (0, 1, 2, 1), ())


def test_a_stop_string_ends_text_and_releases_all_ids():
  tok = _PieceTokenizer([b'yes', b' x\n', b'Us', b'er: no'])
  script = _start(tok=tok, stop=('\nUser:',))
  assert script.push(0).text == 'yes'
  assert _push_all(script, [1, 2])[-1] == stopping.Release('', (), ())
  assert script.push(3) == stopping.Release(' x', (1, 2, 3), ())
  assert (script.finish_reason, script.stop_reason) == ('stop', '\nUser:')
  assert (script.text, script.token_ids) == ('yes x', [0, 1, 2, 3])
  # Half of the token ' x\n' is cut: it does not spell the text.
  assert script.num_text_ids == 1


def test_logprobs_travel_with_their_tokens():
  script = _start(stop=('bc',))
  given = [logprobs.TokenLogprobs(-float(i), (i,), (-0.5,)) for i in range(3)]
  releases = [
    script.push(ord(char), entry)
    for char, entry in zip('abx', given, strict=True)
  ]
  assert [r.logprobs for r in releases] == [(given[0],), (), tuple(given[1:])]


@pytest.mark.parametrize(
  ('ids', 'chosen', 'text', 'num_text_ids', 'reasons'),
  [
    ('a<', {}, 'a', 1, ('stop', None)),
    ('ab', {'stop_ids': (98,)}, 'a', 1, ('stop', 98)),
    ('a<b', {'ignore_eos': True, 'stop_ids': (98,)}, 'a', 2, ('stop', 98)),
    # EOS as a stop id ends the sequence whatever `ignore_eos` says.
    ('a<', {'ignore_eos': True, 'stop_ids': (_EOS,)}, 'a', 1, ('stop', _EOS)),
    ('a<', {'stop_ids': (_EOS,)}, 'a', 1, ('stop', None)),
    ('abc', {'max_tokens': 3}, 'abc', 3, ('length', None)),
    # Other reasons come before the length.
    ('ab<', {'max_tokens': 3}, 'ab', 2, ('stop', None)),
    ('abc', {'max_tokens': 3, 'stop': ('c',)}, 'ab', 2, ('stop', 'c')),
    ('ab<', {'max_tokens': 3, 'ignore_eos': True}, 'ab', 3, ('length', None)),
    # Held back until the end.
    ('ab<', {'stop': ('bc',)}, 'ab', 2, ('stop', None)),
    ('abd', {'stop': ('bc',), 'stop_ids': (100,)}, 'ab', 2, ('stop', 100)),
  ],
)
def test_how_a_sequence_ends(ids, chosen, text, num_text_ids, reasons):
  ids = [_EOS if char == '<' else ord(char) for char in ids]
  script = _start(**{'max_tokens': 10, **chosen})
  releases = _push_all(script, ids)
  assert script.text == ''.join(r.text for r in releases) == text
  assert sum((r.token_ids for r in releases), ()) == tuple(ids)
  assert script.num_text_ids == num_text_ids
  assert (script.finish_reason, script.stop_reason) == reasons


def test_a_minimum_of_tokens_ends_nothing_but_the_length():
  # Completed within the minimum, 'bc' is text; begun within it, it counts.
  assert _run_text('abcabc', stop=('bc',), min_tokens=3) == ('abca', 'bc')
  assert _run_text('abcabc', stop=('bc',), min_tokens=2) == ('a', 'bc')
  assert _run_text('abcabc', stop=('bc',), min_tokens=6) == ('abcabc', None)
  # Held for 'abcd', 'bc' was passed over and is not found afterwards.
  stop = ('bc', 'abcd')
  assert _run_text('abcxbc', stop=stop, min_tokens=3) == ('abcx', 'bc')
  assert _run_text('abab', stop_ids=(98,), min_tokens=2) == ('aba', 98)


def _run_text(text, **chosen):
  script = _start(max_tokens=len(text), **chosen)
  for token_id in text.encode():
    if not script.finish_reason:
      script.push(token_id)
  return script.text, script.stop_reason


@pytest.mark.parametrize('last', ['length', 'eos', 'stop id'])
def test_an_unfinished_character_is_shown_at_the_end(last):
  script = _start(max_tokens=3, stop_ids=(98,))
  ids = [ord('a'), 0xE2, {'length': 0x82, 'eos': _EOS, 'stop id': 98}[last]]
  assert [r.text for r in _push_all(script, ids)] == ['a', '', '\ufffd']
  assert script.num_text_ids == (3 if last == 'length' else 2)


def test_a_stop_string_may_be_what_an_unfinished_character_becomes():
  script = _start(stop=('\ufffd',))
  assert [r.text for r in _push_all(script, [97, 0xE2, _EOS])] == ['a', '', '']
  assert (script.stop_reason, script.num_text_ids) == ('\ufffd', 1)


def test_a_token_after_the_end_is_refused():
  script = _start(max_tokens=1)
  script.push(97)
  with pytest.raises(
    ValueError, match=r'token 98: got one after the end \(length\), expected'
  ):
    script.push(98)


def _definition(pieces, settings, max_tokens):
  """Returns the result by definition, character by character."""
  before = ''
  for number, piece in enumerate(pieces, 1):
    is_eos = piece is None and not settings.ignore_eos
    may_stop = number > settings.min_tokens
    is_end = (is_eos and may_stop) or number == max_tokens
    decoder = codecs.getincrementaldecoder('utf-8')(errors='replace')
    data = b''.join(piece or b'' for piece in pieces[:number])
    text = decoder.decode(data, final=is_end)
    for end in range(len(before) + 1, len(text) + 1):
      for stop in sorted(settings.stop, key=len, reverse=True):
        if may_stop and text[:end].endswith(stop):
          return text[: end - len(stop)], number, 'stop', stop
    if is_end:
      return text, number, 'stop' if is_eos and may_stop else 'length', None
    before = text
  raise AssertionError('max_tokens is at most the number of pieces')


# Few characters, so that stop strings are the rule; two and three bytes long,
# one that U+FFFD is mistaken for, and bytes that are no UTF-8.
_CHARS = st.sampled_from(
  [b'a', b'b', 'é'.encode(), '€'.encode(), '\ufffd'.encode(), b'\xe2', b'\x82']
)


@hypothesis.settings(max_examples=400, deadline=None, derandomize=True)
@hypothesis.given(
  data=st.lists(_CHARS, min_size=1, max_size=10).map(b''.join),
  cuts=st.sets(st.integers(0, 20)),
  eos_at=st.sets(st.integers(0, 12), max_size=2),
  stop=st.lists(st.text('abé€\ufffd', min_size=1, max_size=4), max_size=3),
  min_tokens=st.integers(0, 4),
  ignore_eos=st.booleans(),
  spare=st.integers(0, 3),
)
def test_any_stream_cut_in_any_way(
  data, cuts, eos_at, stop, min_tokens, ignore_eos, spare
):
  edges = [0, *sorted(cut for cut in cuts if cut < len(data)), len(data)]
  pieces = [data[a:b] for a, b in zip(edges, edges[1:], strict=False)]
  for index in eos_at:
    pieces.insert(index, None)
  settings = settings_lib.Settings(
    stop=tuple(stop), min_tokens=min_tokens, ignore_eos=ignore_eos
  )
  max_tokens = max(1, len(pieces) - spare)
  text, num_tokens, *reasons = _definition(pieces, settings, max_tokens)

  tok = _PieceTokenizer([piece for piece in pieces if piece is not None])
  numbers = iter(range(len(pieces)))
  ids = [tok.eos_id if p is None else next(numbers) for p in pieces]
  script = stopping.Transcript(tok, settings, max_tokens=max_tokens)
  shown, released = '', []
  for token_id in ids[:num_tokens]:
    assert script.finish_reason is None
    release = script.push(
      token_id, logprobs.TokenLogprobs(float(token_id), (), ())
    )
    shown += release.text
    released += release.token_ids
    # No text that a stop string cuts was ever shown.
    assert text.startswith(shown)
    assert [entry.chosen for entry in release.logprobs] == [
      float(i) for i in release.token_ids
    ]
    if script.finish_reason is None:
      # The one cursor.
      assert tok.decode(released) == shown
      assert script.num_text_ids == len(released)
  assert (shown, script.text) == (text, text)
  assert released == script.token_ids == ids[:num_tokens]
  assert [script.finish_reason, script.stop_reason] == reasons
  spelt = tok.decode(ids[: script.num_text_ids])
  assert text.startswith(spelt) if script.stop_reason else spelt == text


@hypothesis.settings(max_examples=100, deadline=None, derandomize=True)
@hypothesis.given(
  text=st.text('ab', min_size=1, max_size=12),
  stop=st.lists(st.text('ab', min_size=1, max_size=4), max_size=2),
)
def test_nothing_is_held_back_longer_than_a_stop_string(text, stop):
  script = _start(stop=tuple(stop), max_tokens=100)
  longest = max(map(len, stop), default=1)
  for number, token_id in enumerate(text.encode(), 1):
    script.push(token_id)
    if script.finish_reason:
      break
    assert number - len(script.text) < longest
