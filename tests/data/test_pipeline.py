"""Rows as literal matrices, no pair lost or doubled, positions exact.

Each document here has two letters of its own, so that a pair says where it
comes from.
"""

import collections
import json
from typing import Any

import numpy as np
import pytest

from data import config, pipeline, sources
from tests import fixtures
from text import tokenizer as tokenizer_lib

BOS, EOS, PAD = 256, 257, 258
PACKINGS = ['concat_then_split', 'first_fit', 'best_fit', 'none']
TOK = fixtures.byte_tokenizer()


class Texts:
  """A source of the given texts."""

  def __init__(self, *texts):
    self._texts = texts

  def __len__(self):
    return len(self._texts)

  def __getitem__(self, index):
    return {'text': self._texts[index], 'id': str(index)}


# Lengths around and far beyond a row of 8; empty ones are no documents. Not
# fewer of them: grain takes milliseconds to shuffle an index below 30.
LENGTHS = (3, 1, 0, 30, 7, 6, 8, 0, 16, 2, 2, 5) * 3
DOCUMENTS = Texts(
  *(
    ''.join(chr(33 + 2 * i + j % 2) for j in range(length))
    for i, length in enumerate(LENGTHS)
  )
)


def _config(**fields: Any) -> config.DataConfig:
  defaults: dict[str, Any] = {
    'row_length': 8,
    'batch_size': 2,
    'shuffle_rows': 0,
    'prefetch_rows': 4,
  }
  return config.DataConfig(**(defaults | fields))


def _train(source: sources.Source = DOCUMENTS, seed=0, **fields):
  return pipeline.train_batches(source, TOK, _config(**fields), seed=seed)


def _take(batches, n):
  taken = [next(batches) for _ in range(n)]
  batches.close()
  return taken


def _rows(batches):
  """Joins batches into one, of all their rows."""
  return {
    name: np.concatenate([batch[name] for batch in batches])
    for name in batches[0]
  }


def _pairs(batches):
  """Lists the trained (input, target) pairs in the order of rows."""
  rows = _rows(batches)
  used_BT = rows['weights'] > 0
  return list(
    zip(
      rows['tokens'][used_BT].tolist(),
      rows['targets'][used_BT].tolist(),
      strict=True,
    )
  )


def _expected_pairs(source=DOCUMENTS):
  pairs = []
  for i in range(len(source)):
    text = source[i]['text']
    ids = [BOS, *text.encode(), EOS] if text else []
    pairs += zip(ids[:-1], ids[1:], strict=True)
  return pairs


def _assert_same(batch, other):
  assert batch.keys() == other.keys()
  for name in batch:
    assert batch[name].dtype == other[name].dtype
    np.testing.assert_array_equal(batch[name], other[name])


def _eval_row_matrices(texts, packing, row_length):
  settings = _config(packing=packing, row_length=row_length, batch_size=1)
  rows = _rows(list(pipeline.eval_batches(Texts(*texts), TOK, settings)))
  return {name: rows[name].tolist() for name in rows}


def test_concat_then_split_cuts_between_rows():
  assert _eval_row_matrices(['ab', '', 'c'], 'concat_then_split', 4) == {
    'tokens': [[BOS, 97, 98, BOS], [99, PAD, PAD, PAD]],
    'targets': [[97, 98, EOS, 99], [EOS, PAD, PAD, PAD]],
    'positions': [[0, 1, 2, 0], [0, 0, 0, 0]],
    'segment_ids': [[1, 1, 1, 2], [1, 0, 0, 0]],
    'weights': [[1, 1, 1, 1], [1, 0, 0, 0]],
  }


def test_concat_then_split_cuts_only_where_a_row_ends():
  rows = _eval_row_matrices(['a', 'bcdefgh'], 'concat_then_split', 4)
  assert rows['segment_ids'] == [[1, 1, 2, 2], [1, 1, 1, 1], [1, 1, 0, 0]]


@pytest.mark.parametrize('packing', PACKINGS)
def test_eval_keeps_the_order_of_documents(packing):
  texts = 'abcdefghijkl'
  rows = _eval_row_matrices(list(texts), packing, 2)
  assert [tokens_T[1] for tokens_T in rows['tokens']] == list(texts.encode())


@pytest.mark.parametrize('packing', ['first_fit', 'best_fit'])
def test_fitting_keeps_documents_whole(packing):
  assert _eval_row_matrices(['ab', '', 'c', 'd'], packing, 6) == {
    'tokens': [[BOS, 97, 98, BOS, 99, PAD], [BOS, 100, PAD, PAD, PAD, PAD]],
    'targets': [[97, 98, EOS, 99, EOS, PAD], [100, EOS, PAD, PAD, PAD, PAD]],
    'positions': [[0, 1, 2, 0, 1, 0], [0, 1, 0, 0, 0, 0]],
    'segment_ids': [[1, 1, 1, 2, 2, 0], [1, 1, 0, 0, 0, 0]],
    'weights': [[1, 1, 1, 1, 1, 0], [1, 1, 0, 0, 0, 0]],
  }


def test_best_fit_prefers_the_fullest_row():
  # Rows of 6: 'abc' leaves 2, 'abcd' leaves 1 and 'x' needs 2, then 'y' 2.
  rows = _eval_row_matrices(['ab', 'abc', 'y'], 'best_fit', 6)
  assert rows['segment_ids'] == [[1, 1, 1, 0, 0, 0], [1, 1, 1, 1, 2, 2]]
  rows = _eval_row_matrices(['ab', 'abc', 'y'], 'first_fit', 6)
  assert rows['segment_ids'] == [[1, 1, 1, 2, 2, 0], [1, 1, 1, 1, 0, 0]]


def test_no_packing_gives_each_chunk_a_row():
  assert _eval_row_matrices(['abc', '', 'd'], 'none', 3) == {
    'tokens': [[BOS, 97, 98], [99, PAD, PAD], [BOS, 100, PAD]],
    'targets': [[97, 98, 99], [EOS, PAD, PAD], [100, EOS, PAD]],
    'positions': [[0, 1, 2], [0, 0, 0], [0, 1, 0]],
    'segment_ids': [[1, 1, 1], [1, 0, 0], [1, 1, 0]],
    'weights': [[1, 1, 1], [1, 0, 0], [1, 1, 0]],
  }


def test_eval_windows_are_consecutive_pieces_of_the_joined_text():
  assert _eval_row_matrices(['abc', '', 'de'], 'windows', 3) == {
    'tokens': [[97, 98, 99], [100, PAD, PAD]],
    'targets': [[98, 99, 100], [101, PAD, PAD]],
    'positions': [[0, 1, 2], [0, 0, 0]],
    'segment_ids': [[1, 1, 1], [1, 0, 0]],
    'weights': [[1, 1, 1], [1, 0, 0]],
  }


@pytest.mark.parametrize('packing', [*PACKINGS, 'windows'])
def test_shapes_and_dtypes(packing):
  settings = _config(packing=packing, batch_size=3)
  batches = pipeline.train_batches(DOCUMENTS, TOK, settings, seed=0)
  evaluated = pipeline.eval_batches(DOCUMENTS, TOK, settings)
  for batch in [*_take(batches, 3), *evaluated]:
    dtypes = {name: array.dtype.name for name, array in batch.items()}
    assert dtypes == {
      'tokens': 'int32',
      'targets': 'int32',
      'positions': 'int32',
      'segment_ids': 'int32',
      'weights': 'float32',
    }
    assert {array.shape for array in batch.values()} == {(3, 8)}
    # Padding looks the same everywhere, and only padding has no weight.
    padding_BT = batch['weights'] == 0
    np.testing.assert_array_equal(padding_BT, batch['segment_ids'] == 0)
    assert (batch['tokens'][padding_BT] == PAD).all()
    assert (batch['targets'][padding_BT] == PAD).all()
    assert (batch['positions'][padding_BT] == 0).all()


@pytest.mark.parametrize('packing', PACKINGS)
def test_segments_hold_consecutive_pairs_of_one_document(packing):
  rows = _rows(_take(_train(packing=packing), 40))
  for b in range(len(rows['tokens'])):
    for segment in range(1, rows['segment_ids'][b].max() + 1):
      at_T = rows['segment_ids'][b] == segment
      tokens_T, targets_T = rows['tokens'][b][at_T], rows['targets'][b][at_T]
      np.testing.assert_array_equal(tokens_T[1:], targets_T[:-1])
      np.testing.assert_array_equal(
        rows['positions'][b][at_T], np.arange(at_T.sum())
      )
      letters = {t for t in tokens_T if t < 256}
      assert len({(t - 33) // 2 for t in letters}) <= 1


@pytest.mark.parametrize('packing', PACKINGS)
@pytest.mark.parametrize('row_length', [1, 3, 8, 64])
def test_eval_sees_every_pair_once(packing, row_length):
  settings = _config(packing=packing, row_length=row_length, batch_size=4)
  batches = list(pipeline.eval_batches(DOCUMENTS, TOK, settings))
  assert sorted(_pairs(batches)) == sorted(_expected_pairs())
  total = sum(float(batch['weights'].sum()) for batch in batches)
  assert total == len(_expected_pairs())


def test_eval_of_windows_sees_every_pair_of_the_text_once():
  text = ''.join(DOCUMENTS[i]['text'] for i in range(len(DOCUMENTS)))
  batches = list(
    pipeline.eval_batches(DOCUMENTS, TOK, _config(packing='windows'))
  )
  ids = list(text.encode())
  assert _pairs(batches) == list(zip(ids[:-1], ids[1:], strict=True))


def test_eval_can_be_iterated_again():
  batches = pipeline.eval_batches(DOCUMENTS, TOK, _config())
  first, second = list(batches), list(batches)
  assert len(first) == len(second) > 1
  for batch, other in zip(first, second, strict=True):
    _assert_same(batch, other)


def test_eval_fills_the_last_batch_with_rows_of_no_weight():
  settings = _config(packing='none', batch_size=5)
  batches = list(
    pipeline.eval_batches(Texts('a', 'b', 'c', 'd', 'e', 'f'), TOK, settings)
  )
  assert len(batches) == 2
  np.testing.assert_array_equal(
    batches[1]['weights'].sum(axis=1), [2, 0, 0, 0, 0]
  )


@pytest.mark.parametrize('packing', ['concat_then_split', 'none'])
def test_each_epoch_trains_every_pair_once(packing):
  expected = collections.Counter(_expected_pairs())
  size = expected.total()
  pairs = _pairs(_take(_train(packing=packing, batch_size=1), 240))
  assert len(pairs) > 4 * size
  for epoch in range(4):
    seen = collections.Counter(pairs[epoch * size : (epoch + 1) * size])
    assert seen == expected


@pytest.mark.parametrize('packing', ['first_fit', 'best_fit'])
def test_fitted_groups_train_every_pair_equally_often(packing):
  # Bins are filled and handed out in groups of 64 rows: a group holds
  # consecutive documents, so after whole groups counts differ by one at most.
  num_groups = 4
  rows = _rows(_take(_train(packing=packing, batch_size=64), num_groups))
  expected = collections.Counter(_expected_pairs())
  seen = collections.Counter(_pairs([rows]))
  assert seen.keys() == expected.keys()
  # Unlike the pairs of one letter, those of bos tell documents apart.
  counts = [n for (token, _), n in seen.items() if token == BOS]
  assert max(counts) - min(counts) <= 1
  assert min(counts) > 3
  epochs = seen.total() / expected.total()
  for pair, n in expected.items():
    assert abs(seen[pair] - n * epochs) <= n + 1e-6


def test_epochs_are_shuffled_anew():
  texts = [chr(97 + i) for i in range(20)]
  batches = _train(Texts(*texts), packing='none', batch_size=20)
  orders = [tuple(batch['tokens'][:, 1]) for batch in _take(batches, 4)]
  assert all(sorted(order) == sorted(orders[0]) for order in orders)
  assert len({*orders, tuple(sorted(orders[0]))}) == 5


def test_rows_are_shuffled_within_their_window():
  # Long documents: without shuffling, a batch is 8 chunks of one of them.
  source = Texts(*(chr(97 + i) * 79 for i in range(8)))
  fields = {'packing': 'none', 'batch_size': 8}
  ordered = _take(_train(source, **fields), 20)
  shuffled = _take(_train(source, shuffle_rows=80, **fields), 20)

  def documents_per_batch(batches):
    return np.mean([len(np.unique(batch['tokens'])) for batch in batches])

  assert documents_per_batch(ordered) < 4
  assert documents_per_batch(shuffled) > 5
  for start in (0, 10):  # 80 rows, the same in another order
    windows = [
      sorted(map(tuple, _rows(batches[start : start + 10])['tokens'].tolist()))
      for batches in (ordered, shuffled)
    ]
    assert windows[0] == windows[1]


@pytest.mark.parametrize('packing', [*PACKINGS, 'windows'])
def test_order_is_a_function_of_the_seed(packing):
  fields = {'packing': packing, 'shuffle_rows': 64}
  first = _take(_train(seed=7, **fields), 40)
  again = _take(_train(seed=7, num_threads=5, prefetch_rows=0, **fields), 40)
  other = _take(_train(seed=8, **fields), 40)
  for batch, same in zip(first, again, strict=True):
    _assert_same(batch, same)
  assert any(
    (batch['tokens'] != different['tokens']).any()
    for batch, different in zip(first, other, strict=True)
  )


@pytest.mark.parametrize('shuffle_rows', [0, 64])
@pytest.mark.parametrize('packing', [*PACKINGS, 'windows'])
def test_resume_is_bit_identical(packing, shuffle_rows):
  fields = {'packing': packing, 'shuffle_rows': shuffle_rows}
  run = _train(**fields)
  states, batches = [], []
  for _ in range(70):  # three epochs, two windows of rows
    states.append(json.loads(json.dumps(run.get_state())))
    batches.append(next(run))
  run.close()
  for start in (0, 1, 2, 7, 31, 32, 33, 63):
    resumed = _train(**fields)
    resumed.set_state(states[start])
    assert json.loads(json.dumps(resumed.get_state())) == states[start]
    for batch, other in zip(
      batches[start:][:5], _take(resumed, 5), strict=True
    ):
      _assert_same(batch, other)


def test_resume_where_a_document_ends_with_its_row():
  # Then concat_then_split has no remainder, which JSON must not turn into one.
  texts = Texts(*('abcdefg' for _ in range(40)))  # 8 pairs each, a row of 8
  run = _train(texts, batch_size=1)
  for _ in range(3):
    next(run)
  state = json.loads(json.dumps(run.get_state()))
  expected = _take(run, 60)
  resumed = _train(texts, batch_size=1)
  resumed.set_state(state)
  for batch, other in zip(expected, _take(resumed, 60), strict=True):
    _assert_same(batch, other)


def test_state_can_be_set_on_an_iterator_in_use():
  batches = _train(shuffle_rows=64)
  next(batches)
  state = batches.get_state()
  expected = [next(batches) for _ in range(3)]
  batches.set_state(state)
  for batch, other in zip(expected, _take(batches, 3), strict=True):
    _assert_same(batch, other)


@pytest.mark.parametrize(
  ('change', 'error'),
  [
    ({'row_length': 4}, 'has row_length 8, this run has 4; continue with'),
    ({'batch_size': 4}, 'has batch_size 2, this run has 4;'),
    ({'packing': 'none'}, "has packing 'concat_then_split', this run has"),
    ({'shuffle_rows': 3}, 'has shuffle_rows 0, this run has 3;'),
    ({'seed': 1}, 'has seed 0, this run has 1;'),
    ({'source': Texts('a')}, 'has num_documents 36, this run has 1;'),
  ],
)
def test_position_of_other_settings_is_refused(change, error):
  state = _train().get_state()
  with pytest.raises(ValueError, match=error):
    _train(**change).set_state(state)


def test_random_windows_reach_both_ends_evenly():
  source = Texts('abcdef', '', 'ghij')
  batches = _take(
    _train(source, packing='windows', row_length=3, batch_size=70), 30
  )
  rows = _rows(batches)
  starts_B = rows['tokens'][:, 0] - ord('a')
  np.testing.assert_array_equal(
    rows['tokens'], ord('a') + starts_B[:, None] + np.arange(3)[None, :]
  )
  np.testing.assert_array_equal(rows['targets'], rows['tokens'] + 1)
  assert (rows['segment_ids'] == 1).all()
  assert (rows['weights'] == 1).all()
  np.testing.assert_array_equal(
    rows['positions'], np.tile(np.arange(3), (2100, 1))
  )
  # 2100 draws of 7 starts: 300 +- 16 each, six sigma (and a fixed seed).
  counts = np.bincount(starts_B, minlength=7)
  assert len(counts) == 7
  assert abs(counts - 300).max() < 96


def test_windows_need_a_text_longer_than_a_row():
  _take(_train(Texts('abcd'), packing='windows', row_length=3), 1)
  with pytest.raises(
    ValueError, match=r'has 3 tokens, expected at least row_length \+ 1 = 4'
  ):
    _train(Texts('abc'), packing='windows', row_length=3)


@pytest.mark.parametrize('source', [Texts(), Texts('', '')])
def test_source_without_text_is_refused(source):
  with pytest.raises(ValueError, match='documents without any text, expected'):
    _train(source)
  with pytest.raises(ValueError, match='documents without any text, expected'):
    pipeline.eval_batches(source, TOK, _config())


def test_settings_are_checked():
  with pytest.raises(ValueError, match='data.batch_size is 0'):
    _train(batch_size=0)
  with pytest.raises(ValueError, match='data.row_length is 0'):
    pipeline.eval_batches(DOCUMENTS, TOK, _config(row_length=0))
  with pytest.raises(ValueError, match='got data seed -1, expected 0 or more'):
    _train(seed=-1)


def test_an_unreadable_document_stops_training_with_its_place(tmp_path):
  path = tmp_path / 'x.jsonl'
  path.write_text('{"text": "good"}\n{"text": \n{"text": "good"}\n')
  batches = _train(sources.jsonl(str(path)))
  with pytest.raises(ValueError, match=r'x\.jsonl:2 is not JSON'):
    _take(batches, 10)
  batches.close()


def test_real_text_through_a_real_source(data_dir):
  source = sources.python_stdlib(split='test', data_dir=str(data_dir))
  settings = _config(row_length=64, batch_size=16, shuffle_rows=100)
  batch = _take(pipeline.train_batches(source, TOK, settings, seed=0), 1)[0]
  assert batch['weights'].sum() == 16 * 64
  segment_T = batch['tokens'][0][batch['segment_ids'][0] == 1]
  text = tokenizer_lib.ByteTokenizer().decode(segment_T.tolist())
  assert any(text in source[i]['text'] for i in range(len(source)))
