"""Tests of every kind of tokenizer, and of the byte tokenizer alone.

The BPE tokenizer here is trained on this repository's own prose.
"""

import json
import subprocess
import sys

import hypothesis
from hypothesis import strategies as st
import numpy as np
import pytest

from tests.helpers import tiny_models
from tests.helpers.open_weights import hf_files
from text import bpe, tokenizer

CORPUS = [
  'def decode(ids):\n  return tokenizer.decode(ids)\n' * 20,
  'A language model lives twice: it is trained, then it is used. ' * 20,
]
TOKENIZERS = {
  'byte': tokenizer.ByteTokenizer(),
  'bpe': bpe.train(CORPUS, 300),
}
AWKWARD = [
  '',
  ' ',
  ' ' * 10_000,
  'x' + ' ' * 500 + 'y',
  '\x00\x01\x1f\x7f\x80\x9f',
  '\r\n\r\t\v\f\u2028\u00a0',
  'caf\u00e9 cafe\u0301 \ufb01 \u212b',  # must not be normalised
  '\U0001f468\u200d\U0001f469\u200d\U0001f467 \U0001f1e9\U0001f1ea',
  '日本語と한국어 العربية',
  '\ufeffbyte order mark, \ufffd replacement, \U0010ffff last',
  '<|bos|><|eos|><|pad|> <|eos|>',
  "don't I'll 1234567890 3.14 __init__ !!!???",
]


@pytest.fixture(params=sorted(TOKENIZERS))
def tok(request):
  return TOKENIZERS[request.param]


@pytest.mark.parametrize('text', AWKWARD)
def test_round_trip_of_awkward_text(tok, text):
  assert tok.decode(tok.encode(text)) == text


@pytest.mark.parametrize('kind', sorted(TOKENIZERS))
@hypothesis.given(text=st.text())
@hypothesis.settings(deadline=None)
def test_round_trip_of_any_text(kind, text):
  tok = TOKENIZERS[kind]
  ids = tok.encode(text)
  assert tok.decode(ids) == text
  assert b''.join(map(tok.token_bytes, ids)) == text.encode()


def test_text_never_becomes_special_ids(tok):
  ids = tok.encode('a<|bos|>b<|eos|>c<|pad|>')
  assert not {tok.bos_id, tok.eos_id, tok.pad_id} & set(ids)


def test_special_ids_contribute_nothing(tok):
  special = [tok.bos_id, tok.eos_id, tok.pad_id]
  assert len(set(special)) == 3
  assert tok.decode([tok.bos_id, *tok.encode('hi'), tok.eos_id]) == 'hi'
  assert [tok.token_bytes(i) for i in special] == [b''] * 3


def test_marked_text_has_special_ids_where_it_is_marked(tok):
  text = 'h\u00e9<|eos|>b<|eos|>\U0001f600'
  spans = [(2, 9)] if tok.special_tokens else []
  ids, offsets = tok.encode_marked(text, spans)
  assert len(ids) == len(offsets)
  assert ids.count(tok.eos_id) == len(spans)
  assert tok.decode(ids) == (text[:2] + text[9:] if spans else text)
  for token_id, (start, end) in zip(ids, offsets, strict=True):
    # A character of several ids is that of each.
    assert tok.token_bytes(token_id) in (text[start:end].encode() or b'')
    assert start < end
  assert sorted(offsets) == offsets


def test_bytes_refuse_marks():
  with pytest.raises(
    ValueError, match=r'special tokens at \[\(0, 1\)\], expect'
  ):
    tokenizer.ByteTokenizer().encode_marked('ab', [(0, 1)])


def test_names_are_the_strings_of_special_tokens(tok):
  for name, token in tok.names.items():
    if token:
      token_id = getattr(tok, name.replace('_token', '_id'))
      assert tok.special_tokens[token] == token_id


def test_decode_replaces_what_is_not_utf8(tok):
  half = tok.encode('\u00e9')[:1]
  assert len(tok.encode('\u00e9')) == 2
  assert tok.decode([*tok.encode('a'), *half]) == 'a\ufffd'


def test_num_bytes_counts_token_bytes(tok):
  num_bytes_V = tok.num_bytes_V()
  assert num_bytes_V.dtype == np.int32
  assert num_bytes_V.shape == (tok.vocab_size,)
  expected = [len(tok.token_bytes(i)) for i in range(tok.vocab_size)]
  np.testing.assert_array_equal(num_bytes_V, expected)
  text = AWKWARD[-1] + AWKWARD[-4]
  assert num_bytes_V[tok.encode(text)].sum() == len(text.encode())


@pytest.mark.parametrize('token_id', [-1, 10_000])
def test_id_outside_the_vocabulary_is_refused(tok, token_id):
  with pytest.raises(
    ValueError, match=rf'got token id {token_id}, expected 0 <= id < '
  ):
    tok.decode([token_id])


def test_lone_surrogate_is_refused_with_its_place(tok):
  with pytest.raises(ValueError, match=r"surrogate '\\ud800' at index 2"):
    tok.encode('ab\ud800')


def test_save_then_load(tok, tmp_path):
  tok.save(tmp_path / 'new' / 'tokenizer')
  loaded = tokenizer.load(tmp_path / 'new' / 'tokenizer')
  assert loaded.kind == tok.kind
  assert loaded.vocab_size == tok.vocab_size
  for name in ('bos_id', 'eos_id', 'pad_id'):
    assert getattr(loaded, name) == getattr(tok, name)
  for text in AWKWARD:
    assert loaded.encode(text) == tok.encode(text)
  np.testing.assert_array_equal(loaded.num_bytes_V(), tok.num_bytes_V())


def test_byte_ids_are_the_bytes():
  tok = tiny_models.byte_tokenizer()
  assert tok.encode('a\u00e9') == [97, 195, 169]
  assert (tok.bos_id, tok.eos_id, tok.pad_id) == (256, 257, 258)
  assert tok.vocab_size == 259


def test_load_without_a_tokenizer(tmp_path):
  with pytest.raises(FileNotFoundError, match=r'no tokenizer_config\.json in'):
    tokenizer.load(tmp_path)


@pytest.mark.parametrize('config', [{'kind': 'wordpiece'}, {}, []])
def test_load_of_an_unknown_kind(tmp_path, config):
  (tmp_path / 'tokenizer_config.json').write_text(json.dumps(config))
  with pytest.raises(ValueError, match='expected one of byte, bpe, hugging'):
    tokenizer.load(tmp_path)


def test_load_of_a_directory_that_was_not_converted(tmp_path):
  hf_files.gpt2(tmp_path)
  with pytest.raises(
    ValueError, match=r'convert it with text\.hf_tokenizer\.c'
  ):
    tokenizer.load(tmp_path)


def test_load_of_a_damaged_config(tmp_path):
  (tmp_path / 'tokenizer_config.json').write_text('{"kind": "by')
  with pytest.raises(ValueError, match='is not JSON'):
    tokenizer.load(tmp_path)


def test_text_stays_light():
  # A client that only counts tokens must not wait for jax to be imported.
  code = (
    'import sys; from text import chat, detokenize, tokenizer; '
    'print(sorted({"jax", "grain", "tensorflow_datasets"} & set(sys.modules)))'
  )
  result = subprocess.run(
    [sys.executable, '-c', code], capture_output=True, text=True, check=True
  )
  assert result.stdout.strip() == '[]'
