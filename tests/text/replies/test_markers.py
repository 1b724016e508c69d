"""Markers are seen by their ids, and every character goes with its token."""

import pytest

from tests.helpers import tiny_models
from tests.helpers.open_weights import hf_files
from text import hf_tokenizer
from text.replies import markers


@pytest.fixture(scope='module')
def mistral(tmp_path_factory):
  return hf_tokenizer.HuggingFaceTokenizer(
    hf_tokenizer.hf_files.read_source(
      hf_files.mistral(tmp_path_factory.mktemp('mistral'))
    )
  )


def test_a_special_token_is_a_symbol_and_its_string_is_text(mistral):
  found = markers.Markers(('[TOOL_CALLS]', '[ARGS]'), mistral.special_tokens)
  symbol = found.form('[TOOL_CALLS]')
  assert len(symbol) == 1
  assert found.form('[ARGS]') == '[ARGS]'  # this tokenizer has no such token
  special = mistral.special_tokens['[TOOL_CALLS]']
  text = mistral.encode('a [TOOL_CALLS]')
  assert special not in text
  pieces = markers.Pieces(mistral, found)
  ids = [*text, special, *mistral.encode('b')]
  decoded = mistral.decode(ids)
  cut = pieces.cut(f' {decoded}', ids)  # a completion keeps its first space
  assert len(cut) == len(ids)
  joined = ''.join(cut)
  assert joined.replace(symbol, '').replace(' ', '') == 'a[TOOL_CALLS]b'
  assert joined.count(symbol) == 1
  assert found.spelled(joined).count('[TOOL_CALLS]') == 2


def test_markers_behind_the_text_do_not_count(mistral):
  found = markers.Markers(('[TOOL_CALLS]',), mistral.special_tokens)
  special = mistral.special_tokens['[TOOL_CALLS]']
  ids = mistral.encode('the cat')
  pieces = markers.Pieces(mistral, found)
  # A stop string that begins inside the second token, over a marker.
  cut = pieces.cut(text := ' the', [*ids, special], num_text_ids=1)
  assert ''.join(cut) == text
  assert len(cut) == len(ids) + 1


def test_an_unfinished_character_goes_with_the_last_token_of_the_text():
  tokenizer = tiny_models.byte_tokenizer()
  nothing = markers.Markers((), {})
  pieces = markers.Pieces(tokenizer, nothing)
  assert pieces.cut('a', b'a') == ['a']
  assert pieces.cut('\u00e9', '\u00e9'.encode()) == ['', '\u00e9']
  last = [*'\u00e9'.encode()[:1], tokenizer.eos_id]
  assert pieces.cut('\ufffd', last, num_text_ids=4) == ['\ufffd', '']
  alone = markers.Pieces(tokenizer, nothing)
  assert alone.cut('x', [], num_text_ids=0) == ['x']


def test_the_longest_end_that_begins_a_marker():
  for text, expected in (
    ('', 0), ('x', 0), ('a<', 1), ('a<<b', 2), ('a<b>', 0), ('<b>x[', 1)
  ):  # fmt: skip
    assert markers.pending(text, ['<b>', '[C]', '']) == expected
