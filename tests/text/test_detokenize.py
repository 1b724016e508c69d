"""Streaming: outputs join to the whole text and have whole characters only."""

import hypothesis
from hypothesis import strategies as st
import pytest

from text import bpe, detokenize, tokenizer

TOKENIZERS = {
  'byte': tokenizer.ByteTokenizer(),
  'bpe': bpe.train(['héllo wörld 日本語 \U0001f600 \U0001f601' * 9], 280),
}


def _stream(tok, ids):
  decoder = detokenize.StreamDecoder(tok)
  return [*(decoder.push(i) for i in ids), decoder.finish()]


@pytest.mark.parametrize('kind', sorted(TOKENIZERS))
@hypothesis.given(data=st.data())
@hypothesis.settings(deadline=None)
def test_pieces_of_any_ids_join_to_decode(kind, data):
  tok = TOKENIZERS[kind]
  ids = data.draw(st.lists(st.integers(0, tok.vocab_size - 1)))
  assert ''.join(_stream(tok, ids)) == tok.decode(ids)


@pytest.mark.parametrize('kind', sorted(TOKENIZERS))
@hypothesis.given(text=st.text())
@hypothesis.settings(deadline=None)
def test_pieces_of_text_hold_whole_characters(kind, text):
  tok = TOKENIZERS[kind]
  pieces = _stream(tok, tok.encode(text))
  assert ''.join(pieces) == text
  # Half a character would show as U+FFFD, which the text then lacks.
  assert ''.join(pieces).count('\ufffd') == text.count('\ufffd')
  assert pieces[-1] == ''


def test_a_character_waits_for_its_last_byte():
  ids = list('a\U0001f600b'.encode())
  pieces = _stream(tokenizer.ByteTokenizer(), ids)
  assert pieces == ['a', '', '', '', '\U0001f600', 'b', '']


def test_a_genuine_replacement_character_passes_at_once():
  ids = list('\ufffdx'.encode())
  assert _stream(tokenizer.ByteTokenizer(), ids) == ['', '', '\ufffd', 'x', '']


def test_finish_flushes_an_unfinished_character():
  tok = tokenizer.ByteTokenizer()
  assert _stream(tok, list('é'.encode())[:1]) == ['', '\ufffd']


def test_a_special_id_inside_a_character_changes_nothing():
  tok = tokenizer.ByteTokenizer()
  first, second = 'é'.encode()
  assert _stream(tok, [first, tok.eos_id, second]) == ['', '', 'é', '']


def test_finish_starts_over():
  decoder = detokenize.StreamDecoder(tokenizer.ByteTokenizer())
  decoder.push(0xC3)
  assert decoder.finish() == '\ufffd'
  assert decoder.push(ord('a')) == 'a'
  assert decoder.finish() == ''
