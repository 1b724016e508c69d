"""Rows of a text: drawn with a seed, apart from those to measure with."""

import hashlib

import numpy as np
import pytest

from frozen.quantize import calibration
from tests.helpers import tiny_models

_TEXT = ''.join(f'line {n} of a text. ' for n in range(400))


def _rows(path='', *, has_bos=True, max_length=64, **fields):
  config = calibration.Config(
    path=str(path), **{'rows': 8, 'length': 32, 'held_out': 4, **fields}
  )
  return calibration.rows(
    config,
    tiny_models.byte_tokenizer(),
    has_bos=has_bos,
    max_length=max_length,
  )


@pytest.fixture
def path(tmp_path):
  path = tmp_path / 'text.txt'
  path.write_text(_TEXT, 'utf-8')
  return path


def _strings(rows_RT):
  tokenizer = tiny_models.byte_tokenizer()
  return [tokenizer.decode(row.tolist()) for row in rows_RT]


@pytest.mark.parametrize('has_bos', [False, True])
def test_rows_are_pieces_of_the_text_and_those_held_out_are_others(
  path, has_bos
):
  rows = _rows(path, has_bos=has_bos)
  assert rows.drawn_RT.shape == (8, 32)
  assert rows.held_out_RT.shape == (4, 32)
  drawn, held_out = _strings(rows.drawn_RT), _strings(rows.held_out_RT)
  assert all(piece in _TEXT for piece in drawn + held_out)
  assert len(set(drawn + held_out)) == 12
  assert max(map(_TEXT.index, drawn)) < min(map(_TEXT.index, held_out))
  assert (rows.drawn_RT[:, 0] == 256).all() == has_bos


def test_a_seed_draws_other_rows_and_measures_on_the_same(path):
  first, again, other = (_rows(path, seed=seed) for seed in (0, 0, 1))
  np.testing.assert_array_equal(first.drawn_RT, again.drawn_RT)
  assert not np.array_equal(first.drawn_RT, other.drawn_RT)
  np.testing.assert_array_equal(first.held_out_RT, other.held_out_RT)


def test_the_record_has_the_digest_of_the_text(path):
  assert _rows(path, seed=3).record == {
    'text': 'text.txt',
    'sha256': hashlib.sha256(_TEXT.encode()).hexdigest(),
    'seed': 3,
    'rows': 8,
    'held_out': 4,
    'length': 32,
    'tokens': 256,
  }


def test_without_a_text_there_is_one():
  rows = _rows()
  assert rows.record['text'] == calibration.SAMPLE
  assert len(set(_strings(rows.drawn_RT))) == 8


def test_rows_are_no_longer_than_the_context(path):
  assert _rows(path, max_length=16).drawn_RT.shape == (8, 16)


def test_a_short_text_is_refused(path):
  with pytest.raises(
    ValueError, match=r'--text: got \d+ tokens, .*expected at'
  ):
    _rows(path, rows=10_000)


def test_a_text_that_is_no_utf8_is_refused(tmp_path):
  path = tmp_path / 'text'
  path.write_bytes(_TEXT.encode() + b'\xff' + _TEXT.encode())
  with pytest.raises(ValueError, match=f'no UTF-8 at byte {len(_TEXT)}'):
    _rows(path)


def test_a_long_text_is_cut_between_two_characters(tmp_path, monkeypatch):
  path = tmp_path / 'text'
  path.write_text('ü' * 2000, 'utf-8')
  monkeypatch.setattr(calibration, '_MOST_BYTES', 1999)
  rows = _rows(path)
  digest = hashlib.sha256(('ü' * 999).encode()).hexdigest()
  assert rows.record['sha256'] == digest


@pytest.mark.parametrize(
  ('fields', 'message'),
  [
    ({'rows': 0}, '--rows: got 0, expected at least 1'),
    ({'length': 1}, '--length: got 1, expected at least 2'),
    ({'held_out': 1}, '--held_out: got 1, expected at least 2'),
  ],
)
def test_numbers_out_of_range_are_refused(path, fields, message):
  with pytest.raises(ValueError, match=message):
    _rows(path, **fields)


def test_a_text_that_is_not_there_is_named(tmp_path):
  for path in (tmp_path / 'nothing', tmp_path):
    with pytest.raises(FileNotFoundError, match='--text: got .* is no file'):
      _rows(path)
