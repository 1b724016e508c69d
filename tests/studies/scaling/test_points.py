"""Points are read with their budgets, and refused by line and column."""

import numpy as np
import pytest

from studies.scaling import points as points_lib


def test_points_are_written_and_read_alike(tmp_path):
  points = points_lib.make([1e6, 2e6], [3e7, 1e7], [3.1, 3.3], [2e14, 2e14])
  path = tmp_path / 'points.csv'
  points_lib.write(path, points)
  again = points_lib.read(path)
  for name in ('params', 'tokens', 'losses', 'flops'):
    assert np.array_equal(getattr(again, name), getattr(points, name))
  assert again.budgets.tolist() == [2e14]


def test_the_columns_of_the_published_points_are_read(tmp_path):
  path = tmp_path / 'published.csv'
  path.write_text('x,Model Size,Training FLOP,loss\n1,2e9,1.2e20,2.5\n')
  points = points_lib.read(path)
  assert points.tokens.tolist() == [1e10]  # C / 6N
  assert points.losses.tolist() == [2.5]


@pytest.mark.parametrize(
  ('text', 'words'),
  [
    ('params,loss\n1,2\n', 'expected also tokens'),
    ('', 'expected also params, tokens, loss'),
    ('params,tokens,loss\n', 'got no rows'),
    ('params,tokens,loss\n1,2,3\n1,2,nan\n', "line 3: got loss = 'nan'"),
    ('params,tokens,loss\n1,-2,3\n', "line 2: got tokens = '-2'"),
    ('params,tokens,loss\n0,2,3\n', "line 2: got params = '0'"),
    ('params,tokens,loss\n1,2\n', 'line 2: got loss = None'),
    ('params,tokens,loss\n1,2,inf\n', "line 2: got loss = 'inf'"),
  ],
)
def test_a_file_that_cannot_be_used_is_refused(tmp_path, text, words):
  path = tmp_path / 'points.csv'
  path.write_text(text)
  with pytest.raises(ValueError, match=words):
    points_lib.read(path)


def test_a_file_that_is_not_there_is_named(tmp_path):
  with pytest.raises(ValueError, match=r'nothing\.csv.*No such file'):
    points_lib.read(tmp_path / 'nothing.csv')


def test_the_models_of_highest_loss_are_left_out_in_order():
  points = points_lib.make([1, 2, 3, 4], [1, 1, 1, 1], [5.0, 2.0, 4.0, 3.0])
  kept = points_lib.without_highest(points, 2)
  assert kept.params.tolist() == [2, 4]
  assert len(points_lib.without_highest(points, 0)) == 4
  with pytest.raises(ValueError, match='--drop_highest: got 4'):
    points_lib.without_highest(points, 4)
