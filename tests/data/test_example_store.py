"""Stores of conversations: units stay whole, and say which targets train."""

import pickle

import numpy as np
import pytest

from data import (
  batches as batches_lib,
  data_config,
  example_store,
  packing,
  rows as rows_lib,
)
from data.examples import encoding
from text import tokenizer as tokenizer_lib

T = 12
PER_UNIT = {'chat': 1, 'pairs': 2, 'labelled': 2}


class Numbers:
  """An encoder of records {'lengths': ..., 'value': ...}: counting ids."""

  tokenizer = tokenizer_lib.ByteTokenizer()

  def __init__(self, kind, digest='numbers'):
    self.kind, self._digest = kind, digest

  def digest(self):
    return self._digest

  def unit(self, record, where, other=None):
    if record.get('empty'):
      raise encoding.Empty('with an empty answer')
    documents = []
    for k, length in enumerate(record['lengths']):
      ids = (np.arange(length + 1) + 7 * k + record['value']) % 250
      trained = np.arange(length + 1) >= record.get('prompt', 1)
      documents.append(encoding.Document(ids, trained))
    streams = {}
    if self.kind == 'labelled':
      # The other record is seen, so that a test can tell which it was.
      streams['labels'] = (1.0, float(other['value']))
    elif 'margin' in record:
      streams['margins'] = (record['margin'],) * 2
    return encoding.Unit(tuple(documents), streams)


class Records:
  def __init__(self, records, fingerprint='records'):
    self._records, self._fingerprint = records, fingerprint

  def __len__(self):
    return len(self._records)

  def __getitem__(self, index):
    return {'record': self._records[index], 'id': f'a.jsonl line {index + 1}'}

  def fingerprint(self):
    return self._fingerprint


def _open(tmp_path, records, kind, *, too_long='truncate', **fields):
  return example_store.open_or_write(
    Records(records, **fields),
    Numbers(kind),
    tmp_path,
    name='a',
    row_length=T,
    too_long=too_long,
  )


def _rows(store, kind='first_fit', **fields):
  return rows_lib.Rows(
    store=store,
    plan=packing.row_plan(store, kind, T),
    row_length=T,
    pad_id=258,
    is_random=False,
    **fields,
  )


def _random_records(kind, number, seed=0, **fields):
  rng = np.random.default_rng(seed)
  return [
    {
      'lengths': rng.integers(1, T // PER_UNIT[kind], PER_UNIT[kind]).tolist(),
      'value': i,
      'prompt': 1,
      **fields,
    }
    for i in range(number)
  ]


@pytest.mark.parametrize('kind', PER_UNIT)
@pytest.mark.parametrize('way', ['first_fit', 'best_fit', 'none'])
def test_units_are_whole_and_alternate_in_their_rows(tmp_path, kind, way):
  records = _random_records(kind, 200)
  store = _open(tmp_path, records, kind)
  plan = packing.row_plan(store, way, T)
  ids_N = store.ids_N
  found = []
  for row in range(plan.num_rows):
    starts, lengths = plan.pieces(row)
    assert lengths.sum() <= T
    assert len(starts) % PER_UNIT[kind] == 0
    for k in range(0, len(starts), PER_UNIT[kind]):
      whose = [int(ids_N[start]) for start in starts[k : k + PER_UNIT[kind]]]
      value = whose[0]
      assert whose == [(value + 7 * i) % 250 for i in range(PER_UNIT[kind])]
      unit = lengths[k : k + PER_UNIT[kind]].tolist()
      assert unit == records[value]['lengths']
      found.append(value)
    if way == 'none':
      assert len(starts) == PER_UNIT[kind]
  assert sorted(found) == list(range(200))


def test_weights_are_those_of_the_targets(tmp_path):
  records = [
    {'lengths': [5], 'value': 0, 'prompt': 3},
    {'lengths': [4], 'value': 100, 'prompt': 1},
  ]
  rows = _rows(_open(tmp_path, records, 'chat'))
  (batch,) = batches_lib.EvalBatches(rows, 2)
  # Targets 1 to 5 of the first, of which those from 3 on are trained.
  assert batch['targets'][0, :9].tolist() == [1, 2, 3, 4, 5, 101, 102, 103, 104]
  assert batch['weights'][0].tolist() == [0, 0, 1, 1, 1, 1, 1, 1, 1, 0, 0, 0]
  assert batch['segment_ids'][0].tolist() == [1] * 5 + [2] * 4 + [0] * 3
  assert not batch['weights'][1].any()
  assert rows.trained_share == 7 / 9


def test_streams_become_arrays_where_they_are_asked_for(tmp_path):
  records = _random_records('pairs', 6, margin=0.5)
  store = _open(tmp_path, records, 'pairs')
  batch = next(iter(batches_lib.EvalBatches(_rows(store), 3)))
  assert 'margins' not in batch
  rows = _rows(store, arrays=('margins',))
  for batch in batches_lib.EvalBatches(rows, 3):
    is_real_BT = batch['segment_ids'] > 0
    assert (batch['margins'] == np.where(is_real_BT, 0.5, 0.0)).all()


def test_a_labelled_unit_has_the_next_completion(tmp_path):
  store = _open(tmp_path, _random_records('labelled', 3), 'labelled')
  rows = _rows(store, 'none', arrays=('labels',))
  (batch,) = batches_lib.EvalBatches(rows, 3)
  others = [
    batch['labels'][b][batch['segment_ids'][b] == 2][0] for b in range(3)
  ]
  assert others == [1, 2, 0]  # the last one takes the first


def test_computed_values_come_back_where_they_were(tmp_path):
  store = _open(tmp_path, _random_records('pairs', 50), 'pairs')
  rows = _rows(store, 'best_fit')
  values = [
    batch['targets'] * 1.5 for batch in batches_lib.EvalBatches(rows, 4)
  ]
  values_N = rows.scattered(values)
  path = tmp_path / 'values.bin'
  path.write_bytes(values_N.data)
  column = rows_lib.Column(path)
  rows = pickle.loads(pickle.dumps(rows.with_array('ref_logprobs', column)))
  config = data_config.DataConfig(
    row_length=T, batch_size=8, packing='best_fit', num_threads=1
  )
  for batches in (
    batches_lib.EvalBatches(rows, 8),
    [next(batches_lib.TrainBatches([rows], config, seed=1)) for _ in range(3)],
  ):
    for batch in batches:
      wanted = np.where(batch['segment_ids'] > 0, batch['targets'] * 1.5, 0.0)
      assert (batch['ref_logprobs'] == wanted).all()
      assert batch['ref_logprobs'].dtype == np.float32


@pytest.mark.parametrize(
  ('lengths', 'kept'),
  [([20], [12]), ([3, 20], [3, 9]), ([20, 3], [9, 3]), ([20, 30], [6, 6])],
)
def test_what_is_too_long_is_truncated_and_counted(tmp_path, lengths, kept):
  kind = 'chat' if len(lengths) == 1 else 'pairs'
  store = _open(tmp_path, [{'lengths': lengths, 'value': 0}], kind)
  assert np.diff(store.starts_D).tolist() == kept
  assert store.counts == {example_store.TRUNCATED: 1}


def test_what_is_too_long_can_be_dropped_or_an_error(tmp_path):
  records = [{'lengths': [20], 'value': 0}, {'lengths': [3], 'value': 1}]
  store = _open(tmp_path, records, 'chat', too_long='drop')
  assert store.num_documents == 1
  assert store.counts == {example_store.TOO_LONG_DROPPED: 1}
  with pytest.raises(ValueError, match='line 1: got an example of 20 tokens'):
    _open(tmp_path, records, 'chat', too_long='error')


def test_examples_that_teach_nothing_are_counted(tmp_path):
  records = [
    {'lengths': [20], 'value': 0, 'prompt': 14},  # truncated before the answer
    {'lengths': [3], 'value': 1, 'empty': True},
    {'lengths': [3], 'value': 2},
  ]
  store = _open(tmp_path, records, 'chat')
  assert store.num_documents == 1
  assert store.counts == {
    'with an empty answer': 1,
    example_store.TRUNCATED: 1,
    example_store.NOTHING_TRAINED: 1,
  }
  with pytest.raises(ValueError, match='of which none is left .*1 with an'):
    _open(tmp_path, records[:2], 'chat', fingerprint='two')


@pytest.mark.parametrize(
  ('without', 'says'),
  [(0, 'got an example with margins, expected no num'), (1, 'with no num')],
)
def test_margins_are_in_every_record_or_in_none(tmp_path, without, says):
  records = _random_records('pairs', 2, margin=1.0)
  del records[without]['margin']
  with pytest.raises(ValueError, match=f'line 2: .*{says}'):
    _open(tmp_path, records, 'pairs')


def test_the_store_belongs_to_records_encoder_and_length(tmp_path):
  records = _random_records('chat', 3)
  first = _open(tmp_path, records, 'chat')
  assert _open(tmp_path, records, 'chat') == first
  other = _open(tmp_path, records, 'chat', fingerprint='others')
  assert other.directory != first.directory
  assert other.digest == first.digest  # the same tokens
  assert _open(tmp_path, records, 'chat', too_long='drop').directory not in (
    first.directory,
    other.directory,
  )
