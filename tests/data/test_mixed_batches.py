"""Source mixes: shares, epochs, and weights that change on resume."""

import json

import pytest

from data import batches as batches_lib, data_config, rows as rows_lib
from tests.helpers import tiny_models
from tests.helpers.training import corpora


def _mixed(tmp_path, weights=(3, 1), texts=None, **fields):
  """Batches of a mix of sources with one letter each: 'a', 'b', ..."""
  texts = texts or [[chr(97 + i) * 5] * 10 for i in range(len(weights))]
  mixed = tuple(
    data_config.SourceConfig(
      open_source=lambda *_, t=t: corpora.Texts(*t),
      weight=w,
      name=f's{i}',
    )
    for i, (t, w) in enumerate(zip(texts, weights, strict=True))
  )
  defaults = {'row_length': 6, 'packing': 'none', 'batch_size': 2}
  settings = data_config.DataConfig(
    sources=mixed, data_dir=str(tmp_path), **(defaults | fields)
  )
  opened = [
    rows_lib.open_rows(
      source.open(''), tiny_models.byte_tokenizer(), settings, name=source.name
    )
    for source in settings.train_sources()
  ]
  return batches_lib.TrainBatches(opened, settings, seed=0)


def _letters(batches):
  """The letter of each row."""
  return ''.join(map(chr, corpora.joined(batches)['tokens'][:, 1]))


def test_a_mix_has_its_shares_in_every_prefix(tmp_path):
  letters = _letters(corpora.take(_mixed(tmp_path), 50))
  for n in range(1, 101):
    assert abs(letters[:n].count('a') - 0.75 * n) < 1
  batches = _mixed(tmp_path)
  assert batches.epochs(50) == {'s0': 7.5, 's1': 2.5}  # 10 rows each


def test_each_source_of_a_mix_is_trained_as_if_alone(tmp_path):
  texts = [[f'{i}{j}' for j in range(9)] for i in range(3)]
  batches = corpora.take(_mixed(tmp_path, (2, 1, 0.5), texts, batch_size=7), 20)
  rows = corpora.joined(batches)['tokens'][:, 1:3]
  for i in range(3):
    mine = [chr(b) for a, b in rows.tolist() if chr(a) == str(i)]
    assert len(mine) >= 18
    for epoch in range(len(mine) // 9):
      assert sorted(mine[9 * epoch :][:9]) == list('012345678')


@pytest.mark.parametrize('change_at', [0, 1, 13])
def test_weights_may_change_on_resume_from_there_on(tmp_path, change_at):
  old = _mixed(tmp_path, (3, 1))
  before = corpora.take(old, change_at) if change_at else []
  state = json.loads(json.dumps(old.get_state()))
  new = _mixed(tmp_path, (1, 9))
  new.set_state(state)
  after = [next(new) for _ in range(40)]
  later = json.loads(json.dumps(new.get_state()))
  more = corpora.take(new, 10)
  assert abs(_letters(after).count('b') - 0.9 * 80) < 2
  # The whole run, from its last state, is what it was: prefix, change, rest.
  again = _mixed(tmp_path, (1, 9))
  again.set_state(later)
  again.seek(0)
  for batch, other in zip(
    [*before, *after, *more],
    corpora.take(again, change_at + 50),
    strict=True,
  ):
    corpora.assert_same(batch, other)
  taken = sum(again.epochs(change_at + 50).values()) * 10
  assert taken == pytest.approx(2 * (change_at + 50))


@pytest.mark.parametrize('weights', [(1,), (1, 1, 1)])
def test_sources_are_not_added_or_removed_on_resume(tmp_path, weights):
  state = _mixed(tmp_path, (1, 1)).get_state()
  with pytest.raises(ValueError, match='of the sources s0, s1, this run has'):
    _mixed(tmp_path, weights).set_state(state)


def test_an_empty_source_of_a_mix_is_named(tmp_path):
  with pytest.raises(ValueError, match='s1: got 2 documents without any text'):
    _mixed(tmp_path, texts=[['a'], ['', '']])
