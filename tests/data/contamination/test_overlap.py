"""The overlap of two texts, against sets of n-grams, and on real files."""

import json
import subprocess
import sys

import numpy as np
import pytest

from data import example_store, row_order, token_store
from data.contamination import ngrams, overlap as overlap_lib
from data.examples import encoding
from tests.helpers import tiny_models
from tests.helpers.training import corpora

TOK = tiny_models.byte_tokenizer()
WORDS = [f'w{i}' for i in range(6)]


def _random_texts(seed, num):
  rng = np.random.default_rng(seed)
  return [' '.join(rng.choice(WORDS, rng.integers(0, 25))) for _ in range(num)]


def _grams(tokens, n):
  if 0 < len(tokens) < n:
    return [tuple(tokens)]
  return [tuple(tokens[i : i + n]) for i in range(len(tokens) - n + 1)]


def _counted(train, evaluated, n):
  """Counts by sets: (n-grams, found, touched documents, copied documents)."""
  long = {g for t in train if len(t) >= n for g in _grams(t, n)}
  whole = {tuple(t) for t in train if len(t) < n}
  found = [
    [g in (long if len(t) >= n else whole) for g in _grams(t, n)]
    for t in evaluated
  ]
  return (
    sum(map(len, found)),
    sum(map(sum, found)),
    sum(map(any, found)),
    sum(1 for f in found if f and sum(f) >= 0.8 * len(f)),
  )


def _numbers(overlap):
  return (
    overlap.num_ngrams,
    overlap.num_found,
    overlap.num_touched,
    overlap.num_copied,
  )


@pytest.mark.parametrize('n', [1, 2, 5, 13])
def test_words_are_counted_as_by_sets(n, monkeypatch):
  monkeypatch.setattr(overlap_lib, '_PIECE', 8)  # several passes
  train, evaluated = _random_texts(0, 30), _random_texts(1, 20)
  evaluated.append(train[3])
  overlap = overlap_lib.between_texts(train, evaluated, n, 'train')
  assert _numbers(overlap) == _counted(
    [t.split() for t in train], [t.split() for t in evaluated], n
  )
  assert overlap.num_found > 0
  assert overlap.num_documents == sum(1 for t in evaluated if t)


@pytest.mark.parametrize('joined', [False, True])
@pytest.mark.parametrize('n', [1, 4, 30])
def test_tokens_are_counted_as_by_sets(tmp_path, monkeypatch, joined, n):
  monkeypatch.setattr(overlap_lib, '_PIECE', 64)
  texts = _random_texts(2, 20), [*_random_texts(3, 10), 'w1 w2']
  train, evaluated = (
    token_store.open_or_write(
      corpora.Texts(*t), TOK, tmp_path, name=f's{i}', joined=joined
    )
    for i, t in enumerate(texts)
  )
  overlap = overlap_lib.between_stores(train, evaluated, n)
  expected = _counted(*([list(t.encode()) for t in side] for side in texts), n)
  if joined:  # n-grams across two documents are text there
    assert overlap.num_ngrams == expected[0]
    assert overlap.num_found >= expected[1]
  else:
    assert _numbers(overlap) == expected
  # Looked for once.
  monkeypatch.setattr(ngrams, 'Documents', None)
  assert overlap_lib.between_stores(train, evaluated, n) == overlap
  # A file that cannot be read is made again.
  monkeypatch.undo()
  (kept,) = train.directory.glob('overlap-*')
  kept.write_text('\0' * 9)
  assert overlap_lib.between_stores(train, evaluated, n) == overlap


def test_the_words_of_a_template_are_no_copy(tmp_path):
  """Conversations begin alike, and the answers of two are the same."""

  class Chats(corpora.Texts):
    def __getitem__(self, index):
      text = super().__getitem__(index)['text']
      question, answer = text.split('|')
      messages = [
        {'role': 'system', 'content': 'You are a kind and helpful one.'},
        {'role': 'user', 'content': question},
        {'role': 'assistant', 'content': answer},
      ]
      return {'record': {'messages': messages}, 'id': str(index)}

    def fingerprint(self):
      return repr(self.texts)

  train, evaluated = (
    example_store.open_or_write(
      Chats(*texts),
      encoding.Encoder(TOK, '', 'chat'),
      tmp_path,
      name='train',
      row_length=200,
      too_long='error',
    )
    for texts in (
      ('abcdefgh|ijklmnop', 'qrstuvwx|yzabcdef'),
      ('01234567|89xy', 'zyxwvutsr|qponmlkj', 'abcdefgh|ijklmnop'),
    )
  )
  found = overlap_lib.between_stores(train, evaluated, 20)
  # Of each, the end of its question, the next turn's start and its answer.
  assert found.num_documents == 3
  assert (found.num_copied, found.num_touched) == (1, 1)


def test_case_and_punctuation_do_not_hide_a_copy():
  overlap = overlap_lib.between_texts(
    ['It was the best of times, it was the worst of times.'],
    ['it was - THE BEST of times it was the worst of times'],
    8,
    'train',
  )
  assert overlap.share == 1
  assert overlap.num_copied == 1
  assert 'has 100.00% of the 8-grams of words' in str(overlap)


def test_a_hash_is_of_all_symbols_and_their_order():
  rng = np.random.default_rng(0)
  ids = rng.integers(0, 4, 3000)
  for n in (1, 2, 3, 6, 7):
    hashes = ngrams.hashes(row_order.splitmix64(ids), n)
    assert len(hashes) == 3000 - n + 1
    kinds = {tuple(ids[i : i + n]): int(h) for i, h in enumerate(hashes)}
    assert len(set(kinds.values())) == len(kinds) == len(set(hashes.tolist()))
  assert not len(ngrams.hashes(row_order.splitmix64(ids[:3]), 4))


def _command(*args):
  return subprocess.run(
    [sys.executable, '-m', 'data.contamination', *map(str, args)],
    capture_output=True,
    text=True,
    check=False,
  )


def test_files_are_compared_from_the_command_line(tmp_path):
  text = ' '.join(f'word{i}' for i in range(40))
  (tmp_path / 'train.txt').write_text(f'Something else. {text}')
  lines = [{'body': 'nothing ' * 20}, {'body': text}]
  (tmp_path / 'eval.jsonl').write_text('\n'.join(map(json.dumps, lines)))
  result = _command(
    f'--train={tmp_path / "train.txt"}',
    f'--eval={tmp_path / "eval.jsonl"}',
    '--text_key=body',
  )
  assert result.returncode == 0, result.stderr
  assert '1 of its 2 documents are copied' in result.stdout
  assert 'counted from 0: 1' in result.stdout
  result = _command(f'--train={tmp_path}/none.txt', '--eval=x')
  assert result.returncode == 1
  assert result.stderr.startswith('error: no files at')
