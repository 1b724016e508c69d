"""BPE: training, and saved tokenizers that are refused."""

import json
import pathlib
import subprocess
import sys

import pytest
import tokenizers
from tokenizers import models, normalizers, pre_tokenizers

from text import bpe, tokenizer

ROOT = pathlib.Path(__file__).parents[2]
TEXTS = ['the cat sat on the mat; the bat sat on the hat. ' * 5, 'thé ' * 5]
NUM_TOKENS = 279  # all that TEXTS can give: every word is one token by then

TRAIN_AND_SAVE = """
import sys
from text import bpe
bpe.train(eval(sys.argv[1]), 275).save(sys.argv[2])
"""


def test_frequent_words_become_one_token():
  tok = bpe.train(TEXTS, 300)
  ids = tok.encode(' the sat')
  assert [tok.token_bytes(i) for i in ids] == [b' the', b' sat']


@pytest.mark.parametrize('asked', [259, 270, NUM_TOKENS, 300])
def test_vocabulary_has_the_size_asked_for_unless_text_runs_out(asked):
  assert bpe.train(TEXTS, asked).vocab_size == min(asked, NUM_TOKENS)


def test_tokens_do_not_cross_the_split():
  # GPT-2's split: at most one leading space, and a word ends at punctuation.
  tok = bpe.train(['a b. ' * 1000], 290)
  pieces = {tok.token_bytes(i) for i in range(tok.vocab_size)}
  assert b' b' in pieces
  assert not any(b'b.' in piece or b'a ' in piece for piece in pieces)


def test_no_texts_give_the_bytes():
  tok = bpe.train([], 259)
  assert tok.vocab_size == 259
  assert len(tok.encode('hé')) == 3


@pytest.mark.parametrize('vocab_size', [0, 258])
def test_vocabulary_too_small(vocab_size):
  with pytest.raises(
    ValueError, match=f'vocab_size: got {vocab_size}, expected at least 259'
  ):
    bpe.train(TEXTS, vocab_size)


def test_training_is_deterministic_across_processes(tmp_path):
  # Hash seeds and thread counts differ between processes.
  bpe.train(TEXTS, 275).save(tmp_path / 'here')
  subprocess.run(
    [sys.executable, '-c', TRAIN_AND_SAVE, repr(TEXTS), tmp_path / 'there'],
    check=True,
    cwd=ROOT,
    env={'RAYON_NUM_THREADS': '1', 'PYTHONHASHSEED': '7'},
  )
  here, there = (
    (tmp_path / name / 'tokenizer.json').read_text()
    for name in ('here', 'there')
  )
  assert here == there


def test_saved_files_and_ids_are_what_they_were(tmp_path):
  """Golden values: saved tokenizers, and token stores, outlive the code."""
  tok = bpe.train(TEXTS, 275)
  tok.save(tmp_path)
  assert (tmp_path / 'tokenizer_config.json').read_text() == (
    '{"kind": "bpe", "special_tokens":'
    ' {"bos": "<|bos|>", "eos": "<|eos|>", "pad": "<|pad|>"}}'
  )
  path = tmp_path / 'tokenizer.json'
  saved = path.read_bytes()
  tokenizers.Tokenizer.from_file(str(path)).save(str(path))
  assert path.read_bytes() == saved
  for same in (tok, tokenizer.load(tmp_path)):
    assert same.kind == 'bpe'
    assert same.encode('the café sat<|eos|>') == [
      260, 71, 223, 69, 67, 72, 271, 266, 30, 94, 71, 81, 85, 94, 32
    ]  # fmt: skip


def test_decodes_like_the_library_that_trained_it(tmp_path):
  tok = bpe.train(TEXTS, 300)
  tok.save(tmp_path)
  oracle = tokenizers.Tokenizer.from_file(str(tmp_path / 'tokenizer.json'))
  text = 'the café sat — 日本 \U0001f600\n  on the hat'
  assert oracle.decode(tok.encode(text)) == text


def test_loaded_file_without_model(tmp_path):
  bpe.train(TEXTS, 275).save(tmp_path)
  (tmp_path / 'tokenizer.json').unlink()
  with pytest.raises(FileNotFoundError, match=r'no tokenizer\.json in'):
    tokenizer.load(tmp_path)


def test_truncated_file(tmp_path):
  bpe.train(TEXTS, 275).save(tmp_path)
  path = tmp_path / 'tokenizer.json'
  path.write_text(path.read_text()[:-100])
  with pytest.raises(ValueError, match=r'tokenizer\.json is not JSON'):
    tokenizer.load(tmp_path)


@pytest.mark.parametrize('special', [{}, {'bos': '<s>'}, None])
def test_missing_special_token(tmp_path, special):
  bpe.train(TEXTS, 275).save(tmp_path)
  config = {'kind': 'bpe', 'special_tokens': special}
  (tmp_path / 'tokenizer_config.json').write_text(json.dumps(config))
  with pytest.raises(
    ValueError, match='got .* for the bos token, expected a spec'
  ):
    tokenizer.load(tmp_path)


def _saved(directory, model):
  """Replaces the saved model by another one, and loads it."""
  model.save(str(directory / 'tokenizer.json'))
  return tokenizer.load(directory)


def _library_model(tmp_path, change):
  bpe.train(TEXTS, 275).save(tmp_path)
  model = tokenizers.Tokenizer.from_file(str(tmp_path / 'tokenizer.json'))
  change(model)
  return model


def _normalize(model):
  model.normalizer = normalizers.NFC()


def _add_prefix_space(model):
  model.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=True)


@pytest.mark.parametrize('change', [_normalize, _add_prefix_space])
def test_a_tokenizer_that_changes_text_is_refused(tmp_path, change):
  model = _library_model(tmp_path, change)
  with pytest.raises(ValueError, match='expected a byte-level BPE without'):
    _saved(tmp_path, model)


def test_a_tokenizer_of_words_is_refused(tmp_path):
  bpe.train(TEXTS, 275).save(tmp_path)
  vocab = {'<|bos|>': 0, '<|eos|>': 1, '<|pad|>': 2, '日本': 3}
  model = tokenizers.Tokenizer(models.WordLevel(vocab, unk_token='<|pad|>'))
  model.add_special_tokens(list(bpe.SPECIAL_TOKENS.values()))
  with pytest.raises(ValueError, match='expected a byte-level BPE without'):
    _saved(tmp_path, model)


def test_added_ordinary_token_keeps_its_text(tmp_path):
  model = _library_model(tmp_path, lambda m: m.add_tokens(['日本']))
  tok = _saved(tmp_path, model)
  token_id = model.token_to_id('日本')
  assert token_id == tok.vocab_size - 1
  assert token_id in tok.encode('a日本b')
  assert tok.decode(tok.encode('a日本b')) == 'a日本b'
