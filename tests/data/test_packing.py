"""Row plans: every pair once, no row over its length, known fill rates."""

import hypothesis
from hypothesis import strategies as st
import numpy as np
import pytest

from data import packing, token_store
from storage import derived
from tests.helpers import tiny_models

PLANS = ('concat_then_split', 'first_fit', 'best_fit', 'none')


class Texts:
  """A source of texts of the given lengths."""

  def __init__(self, lengths):
    self._lengths = lengths

  def __len__(self):
    return len(self._lengths)

  def __getitem__(self, index):
    return {'text': 'x' * self._lengths[index], 'id': str(index)}


def _store(lengths, directory, **fields):
  return token_store.open_or_write(
    Texts(lengths), tiny_models.byte_tokenizer(), directory, name='s', **fields
  )


@hypothesis.given(
  lengths=st.lists(st.integers(0, 40), min_size=1, max_size=30),
  row_length=st.integers(1, 20),
)
@hypothesis.settings(
  deadline=None,
  max_examples=25,
  suppress_health_check=[hypothesis.HealthCheck.function_scoped_fixture],
)
@pytest.mark.parametrize('name', PLANS)
def test_every_pair_is_in_one_row_once(tmp_path, name, lengths, row_length):
  hypothesis.assume(any(lengths))
  store = _store(lengths, tmp_path)
  plan = packing.row_plan(store, name, row_length)
  seen = np.zeros(store.num_ids, np.int64)
  most = 1
  for row in range(plan.num_rows):
    starts, counts = plan.pieces(row)
    most = max(most, len(starts))
    assert 0 < counts.sum() <= row_length
    assert (counts > 0).all()
    for start, count in zip(starts, counts, strict=True):
      seen[start : start + count] += 1
  # Every id but the last of each document is an input, once.
  expected = np.ones(store.num_ids, np.int64)
  expected[store.starts_D[1:] + np.arange(store.num_documents)] = 0
  np.testing.assert_array_equal(seen, expected)
  # A document of one id has no piece, and may be counted.
  num_single = int(np.sum(np.diff(store.starts_D) == 0))
  assert most <= plan.max_pieces() <= most + num_single


@pytest.mark.parametrize('size', [1, 3, 1000])
def test_fitting_in_groups_loses_nothing(tmp_path, monkeypatch, size):
  monkeypatch.setattr(packing, '_GROUP', size)
  store = _store([3, 30, 1, 1, 9, 2, 14, 7] * 4, tmp_path)
  plan = packing.row_plan(store, 'best_fit', 12)
  counts = [plan.pieces(row)[1].sum() for row in range(plan.num_rows)]
  assert sum(counts) == store.num_pairs


@hypothesis.given(
  lengths=st.lists(st.integers(1, 9), max_size=60),
  row_length=st.integers(9, 30),
)
def test_fits_are_the_textbook_ones(lengths, row_length):
  """Against the definitions, row by row."""
  lengths_P = np.array(lengths, np.int64)
  used: list[int] = []
  expected = []
  for length in lengths:
    row = next(
      (r for r, u in enumerate(used) if u + length <= row_length), len(used)
    )
    used[row:] = [*used[row:], 0] if row == len(used) else used[row:]
    used[row] += length
    expected.append(row)
  assert packing.first_fit(lengths_P, row_length).tolist() == expected
  best = packing.best_fit(lengths_P, row_length)
  best_used: list[int] = []
  for length in sorted(lengths, reverse=True):
    fitting = [u for u in best_used if u + length <= row_length]
    if fitting:
      best_used.remove(max(fitting))
    best_used.append(max(fitting, default=0) + length)
  loads = np.bincount(best, weights=lengths_P) if lengths else []
  assert sorted(loads) == sorted(best_used)


def test_best_fit_fills_more_than_first_fit_more_than_none(tmp_path):
  rng = np.random.default_rng(0)
  lengths = np.minimum(rng.lognormal(3, 1, 3000).astype(int), 128).tolist()
  store = _store(lengths, tmp_path)
  rates = [
    store.num_pairs / (packing.row_plan(store, name, 128).num_rows * 128)
    for name in ('none', 'first_fit', 'best_fit', 'concat_then_split')
  ]
  assert rates == sorted(rates)
  assert rates[0] < 0.4
  assert rates[1] > 0.95
  assert rates[2] > 0.99
  assert rates[3] > 0.999


def test_a_plan_is_made_once(tmp_path, monkeypatch):
  store = _store([3, 5, 2], tmp_path)
  plan = packing.row_plan(store, 'best_fit', 8)
  monkeypatch.setattr(packing, 'best_fit', None)
  assert packing.row_plan(store, 'best_fit', 8) == plan


@pytest.mark.parametrize('name', ['starts.bin', 'lengths.bin', 'rows.bin'])
def test_a_damaged_plan_is_named(tmp_path, name):
  store = _store([3, 5, 2], tmp_path)
  packing.row_plan(store, 'best_fit', 8)
  path = store.directory / 'best_fit-8' / name
  path.write_bytes(bytes(path.stat().st_size))
  with pytest.raises(derived.DamagedError, match=f'{path}: got .*; delete'):
    packing.row_plan(store, 'best_fit', 8)


def test_a_store_that_may_only_be_read_can_be_planned(tmp_path, monkeypatch):
  store = _store([3, 5, 2], tmp_path)

  def refuse(*args):
    raise PermissionError('read-only')

  monkeypatch.setattr(packing.derived.locks, 'write_once', refuse)
  plan = packing.row_plan(store, 'first_fit', 8)
  assert plan.num_rows == 2
  assert not list(store.directory.glob('first_fit*'))


def test_windows_in_order_are_the_text(tmp_path):
  store = _store([5, 0, 6], tmp_path, joined=True)
  plan = packing.row_plan(store, 'windows', 4)
  pieces = [plan.pieces(row) for row in range(plan.num_rows)]
  assert [(int(s[0]), int(n[0])) for s, n in pieces] == [(0, 4), (4, 4), (8, 2)]
