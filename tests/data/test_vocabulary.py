"""Each kind of tokenizer, and text that is too small for its vocabulary."""

import pytest

from data import data_config, vocabulary
from tests.helpers.training import corpora
from text import bpe, tokenizer

WORDS = 'the cat sat on the mat, the bat sat on the hat '


def test_byte():
  source = corpora.Texts(WORDS)
  tok = vocabulary.build_tokenizer(
    data_config.TokenizerConfig(kind='byte'), (source, 1)
  )
  assert isinstance(tok, tokenizer.ByteTokenizer)
  assert source.num_read == 0


def test_bpe():
  settings = data_config.TokenizerConfig(kind='bpe', vocab_size=270)
  tok = vocabulary.build_tokenizer(
    settings, (corpora.Texts(WORDS, WORDS * 3), 1)
  )
  assert tok.vocab_size == 270
  assert tok.encode(WORDS) == bpe.train([WORDS * 4], 270).encode(WORDS)


def test_bpe_stops_after_train_bytes():
  settings = data_config.TokenizerConfig(
    kind='bpe', vocab_size=262, train_bytes=len(WORDS) + 4
  )
  # The é lies across the limit and is left out whole.
  source = corpora.Texts(WORDS, 'abcé' * 99, 'never read')
  tok = vocabulary.build_tokenizer(settings, (source, 1))
  assert source.num_read == 2
  assert tok.encode('abc') == bpe.train([WORDS, 'abc'], 262).encode('abc')


def test_bpe_learns_from_each_source_by_its_weight():
  settings = data_config.TokenizerConfig(
    kind='bpe', vocab_size=262, train_bytes=4 * len(WORDS)
  )
  mixed = (
    (corpora.Texts(*[WORDS] * 9), 3),
    (corpora.Texts(*['xyz ' * 12] * 9), 1),
  )
  tok = vocabulary.build_tokenizer(settings, *mixed)
  assert [source.num_read for source, _ in mixed] == [3, 1]
  learnt = bpe.train([WORDS * 3, ('xyz ' * 12)[: len(WORDS)]], 262)
  assert tok.encode(WORDS + 'xyz') == learnt.encode(WORDS + 'xyz')


def test_bpe_with_too_little_text():
  settings = data_config.TokenizerConfig(kind='bpe', vocab_size=5000)
  with pytest.raises(
    ValueError, match=r'the text gives \d+ tokens, .*vocab_size = 5000; ask'
  ):
    vocabulary.build_tokenizer(settings, (corpora.Texts(WORDS), 1))


def test_directory(tmp_path):
  bpe.train([WORDS * 9], 265).save(tmp_path)
  settings = data_config.TokenizerConfig(kind='directory', path=str(tmp_path))
  assert (
    vocabulary.build_tokenizer(settings, (corpora.Texts(), 1)).vocab_size == 265
  )


def test_directory_without_a_tokenizer(tmp_path):
  settings = data_config.TokenizerConfig(kind='directory', path=str(tmp_path))
  with pytest.raises(FileNotFoundError, match='no tokenizer_config.json in'):
    vocabulary.build_tokenizer(settings, (corpora.Texts(), 1))
