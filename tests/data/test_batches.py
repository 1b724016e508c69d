"""Batches: rows as literal matrices, every pair once, exact positions.

Each document has two letters of its own, so a pair tells its document.
"""

import collections
import json
from typing import Any

import numpy as np
import pytest

from data import batches as batches_lib, data_config, rows as rows_lib, sources
from tests.helpers import tiny_models
from tests.helpers.training import corpora
from text import tokenizer as tokenizer_lib

BOS, EOS, PAD = 256, 257, 258
PACKINGS = ['concat_then_split', 'first_fit', 'best_fit', 'none']
TOK = tiny_models.byte_tokenizer()


# Lengths around and far beyond a row of 8; empty texts are left out.
LENGTHS = (3, 1, 0, 30, 7, 6, 8, 0, 16, 2, 2, 5) * 3
DOCUMENTS = corpora.Texts(
  *(
    ''.join(chr(33 + 2 * i + j % 2) for j in range(length))
    for i, length in enumerate(LENGTHS)
  )
)


@pytest.fixture(scope='module', autouse=True)
def stores(tmp_path_factory):
  """One directory of tokens for all tests of this file."""
  _config.data_dir = str(tmp_path_factory.mktemp('stores'))


def _config(**fields: Any) -> data_config.DataConfig:
  defaults: dict[str, Any] = {
    'data_dir': _config.data_dir,
    'row_length': 8,
    'batch_size': 2,
    'prefetch_rows': 4,
  }
  return data_config.DataConfig(**(defaults | fields))


def _train(source: sources.Source = DOCUMENTS, seed=0, **fields):
  settings = _config(**fields)
  opened = rows_lib.open_rows(source, TOK, settings, name='s')
  return batches_lib.TrainBatches([opened], settings, seed=seed)


def _eval(source: sources.Source = DOCUMENTS, **fields):
  settings = _config(**fields)
  opened = rows_lib.open_rows(source, TOK, settings, name='s')
  return batches_lib.EvalBatches(opened, settings.batch_size)


def _pairs(batches):
  """Lists the trained (input, target) pairs in the order of rows."""
  rows = corpora.joined(batches)
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


def _eval_row_matrices(texts, packing, row_length):
  batches = _eval(
    corpora.Texts(*texts),
    packing=packing,
    row_length=row_length,
    batch_size=1,
  )
  rows = corpora.joined(list(batches))
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
  batches = _train(packing=packing, batch_size=3)
  evaluated = _eval(packing=packing, batch_size=3)
  for batch in [*corpora.take(batches, 3), *evaluated]:
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
  rows = corpora.joined(corpora.take(_train(packing=packing), 40))
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
  batches = list(_eval(packing=packing, row_length=row_length, batch_size=4))
  assert sorted(_pairs(batches)) == sorted(_expected_pairs())
  total = sum(float(batch['weights'].sum()) for batch in batches)
  assert total == len(_expected_pairs())


def test_eval_of_windows_sees_every_pair_of_the_text_once():
  text = ''.join(DOCUMENTS[i]['text'] for i in range(len(DOCUMENTS)))
  batches = list(_eval(packing='windows'))
  ids = list(text.encode())
  assert _pairs(batches) == list(zip(ids[:-1], ids[1:], strict=True))


def test_eval_can_be_iterated_again():
  batches = _eval()
  first, second = list(batches), list(batches)
  assert len(first) == len(second) > 1
  for batch, other in zip(first, second, strict=True):
    corpora.assert_same(batch, other)


def test_eval_fills_the_last_batch_with_rows_of_weight_0():
  batches = list(_eval(corpora.Texts(*'abcdef'), packing='none', batch_size=5))
  assert len(batches) == 2
  np.testing.assert_array_equal(
    batches[1]['weights'].sum(axis=1), [2, 0, 0, 0, 0]
  )


@pytest.mark.parametrize('packing', PACKINGS)
def test_each_epoch_trains_every_pair_once(packing):
  expected = collections.Counter(_expected_pairs())
  batches = _train(packing=packing, batch_size=1)
  size = batches.sources[0].num_rows
  for _ in range(3):
    epoch = [next(batches) for _ in range(size)]
    assert collections.Counter(_pairs(epoch)) == expected
  assert batches.epochs(3 * size) == {'s': 3.0}
  batches.close()


def test_epochs_are_shuffled_anew():
  texts = [chr(97 + i) for i in range(20)]
  batches = _train(corpora.Texts(*texts), packing='none', batch_size=20)
  orders = [tuple(batch['tokens'][:, 1]) for batch in corpora.take(batches, 4)]
  assert all(sorted(order) == sorted(orders[0]) for order in orders)
  assert len({*orders, tuple(sorted(orders[0]))}) == 5


def test_rows_of_a_long_document_are_spread_over_the_epoch():
  source = corpora.Texts(*(chr(97 + i) * 79 for i in range(8)))
  batches = corpora.take(_train(source, packing='none', batch_size=8), 10)
  kinds = [len(np.unique(batch['tokens'])) for batch in batches]
  assert np.mean(kinds) > 5  # in order it would be 2 or 3


@pytest.mark.parametrize('packing', [*PACKINGS, 'windows'])
def test_order_is_a_function_of_the_seed(packing):
  fields = {'packing': packing}
  first = corpora.take(_train(seed=7, **fields), 40)
  again = corpora.take(
    _train(seed=7, num_threads=5, prefetch_rows=0, **fields), 40
  )
  other = corpora.take(_train(seed=8, **fields), 40)
  high_bits = corpora.take(_train(seed=7 + 2**32, **fields), 40)
  for batch, same in zip(first, again, strict=True):
    corpora.assert_same(batch, same)
  for others in (other, high_bits):
    assert any(
      (batch['tokens'] != different['tokens']).any()
      for batch, different in zip(first, others, strict=True)
    )


def test_a_long_seed_is_not_that_of_another_source():
  first = batches_lib.source_seeds(0, 2)
  assert not set(first) & set(batches_lib.source_seeds(2**32, 2))
  assert not set(first) & set(batches_lib.source_seeds(-1, 2))


@pytest.mark.slow
def test_order_does_not_know_of_worker_processes():
  alone = corpora.take(_train(), 9)
  for batch, other in zip(
    alone, corpora.take(_train(num_workers=2), 9), strict=True
  ):
    corpora.assert_same(batch, other)


def test_the_order_is_what_it_was():
  """A golden value: newer code must resume a run at the same row.

  After a change here, older runs would continue in another order.
  """
  batches = corpora.take(_train(seed=3, batch_size=4), 2)
  rows = corpora.joined(batches)
  assert rows['tokens'][:, 0].tolist() == [40, 97, 46, 49, 40, 65, 256, 64]


@pytest.mark.parametrize('packing', [*PACKINGS, 'windows'])
def test_resume_is_bit_identical(packing):
  run = _train(packing=packing)
  states, batches = [], []
  for _ in range(70):  # three epochs
    states.append(json.loads(json.dumps(run.get_state())))
    batches.append(next(run))
  run.close()
  for start in (0, 1, 2, 7, 31, 32, 63):
    resumed = _train(packing=packing)
    resumed.set_state(states[start])
    assert json.loads(json.dumps(resumed.get_state())) == states[start]
    for batch, other in zip(
      batches[start:][:5], corpora.take(resumed, 5), strict=True
    ):
      corpora.assert_same(batch, other)


@pytest.mark.parametrize('packing', [*PACKINGS, 'windows'])
def test_any_step_costs_as_much_as_the_first(packing, monkeypatch):
  made = []
  real = rows_lib.batch_of
  monkeypatch.setattr(
    rows_lib, 'batch_of', lambda *a, **k: (made.append(1), real(*a, **k))[1]
  )
  batches = _train(packing=packing, prefetch_rows=0)
  for step in (0, 70, 10**9, 10**15):
    made.clear()
    batches.seek(step)
    assert next(batches)['tokens'].shape == (2, 8)
    assert len(made) == 1
    assert batches.get_state()['step'] == step + 1
  batches.close()


def test_state_can_be_set_on_an_iterator_in_use():
  batches = _train()
  next(batches)
  state = batches.get_state()
  expected = [next(batches) for _ in range(3)]
  batches.set_state(state)
  for batch, other in zip(expected, corpora.take(batches, 3), strict=True):
    corpora.assert_same(batch, other)


@pytest.mark.parametrize(
  ('change', 'error'),
  [
    ({'row_length': 4}, 'has row_length 8, this run has 4; continue with'),
    ({'packing': 'none'}, "has packing 'concat_then_split', this run has"),
    ({'seed': 1}, 'has seed 0, this run has 1;'),
    ({'batch_size': 4}, 'is after 6 rows in 3 steps, which are 12 rows by'),
    (
      {'source': corpora.Texts('a')},
      's: the saved data position is of tokens with',
    ),
  ],
)
def test_position_of_other_settings_is_refused(change, error):
  batches = _train()
  batches.seek(3)
  with pytest.raises(ValueError, match=error):
    _train(**change).set_state(batches.get_state())


def test_random_windows_reach_both_ends_evenly():
  source = corpora.Texts('abcdef', '', 'ghij')
  batches = corpora.take(
    _train(source, packing='windows', row_length=3, batch_size=70), 30
  )
  rows = corpora.joined(batches)
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
  corpora.take(
    _train(corpora.Texts('abcd'), packing='windows', row_length=3), 1
  )
  with pytest.raises(
    ValueError, match=r'has 3 tokens, expected at least row_length \+ 1 = 4'
  ):
    _train(corpora.Texts('abc'), packing='windows', row_length=3)


@pytest.mark.parametrize('source', [corpora.Texts(), corpora.Texts('', '')])
def test_source_without_text_is_refused(source):
  error = 's: got . documents without any text, expected'
  with pytest.raises(ValueError, match=error):
    _train(source)
  with pytest.raises(ValueError, match=error):
    _eval(source)


def test_an_unreadable_document_stops_training_with_its_place(tmp_path):
  path = tmp_path / 'x.jsonl'
  path.write_text('{"text": "good"}\n{"text": \n{"text": "good"}\n')
  with pytest.raises(ValueError, match=r'x\.jsonl:2 is not JSON'):
    _train(sources.jsonl(str(path)))


def test_a_ramp_of_the_batch_takes_the_same_rows(tmp_path):
  plain = corpora.joined(corpora.take(_train(batch_size=1), 30))['tokens']
  ramp = ((0, 1), (3, 2), (5, 4))
  batches = corpora.take(_train(batch_size=4, batch_ramp=ramp), 9)
  sizes = [len(batch['tokens']) for batch in batches]
  assert sizes == [1] * 3 + [2] * 2 + [4] * 4
  np.testing.assert_array_equal(corpora.joined(batches)['tokens'], plain[:23])


def test_a_ramp_may_change_on_resume_in_what_is_to_come():
  run = _train(batch_size=2)
  corpora.take(run, 3)
  resumed = _train(batch_size=4, batch_ramp=((0, 2), (4, 4)))
  resumed.set_state(run.get_state())
  sizes = [len(batch['tokens']) for batch in corpora.take(resumed, 3)]
  assert sizes == [2, 4, 4]
  with pytest.raises(ValueError, match='is after 6 rows in 3 steps, which are'):
    _train(batch_size=2, batch_ramp=((0, 1), (2, 2))).set_state(run.get_state())


@pytest.mark.slow
def test_real_text_through_a_real_source(data_dir):
  source = sources.python_stdlib(split='test', data_dir=str(data_dir))
  batches = _train(source, row_length=64, batch_size=16)
  batch = corpora.take(batches, 1)[0]
  assert batch['weights'].sum() == 16 * 64
  segment_T = batch['tokens'][0][batch['segment_ids'][0] == 1]
  text = tokenizer_lib.ByteTokenizer().decode(segment_T.tolist())
  assert any(text in source[i]['text'] for i in range(len(source)))
