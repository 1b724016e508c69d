"""Growing batches in closed form, and ramps that are refused."""

import pytest

from data import batch_ramp, data_config

RAMP = ((0, 2), (3, 5), (4, 8))


def test_rows_add_up_to_the_rows_before():
  sizes = [batch_ramp.rows_at(RAMP, step) for step in range(7)]
  assert sizes == [2, 2, 2, 5, 8, 8, 8]
  for step in range(8):
    assert batch_ramp.rows_before(RAMP, step) == sum(sizes[:step])
  assert batch_ramp.rows_before(RAMP, 10**12) == 11 + 8 * (10**12 - 4)


def test_a_config_without_a_ramp_has_one_size():
  data = data_config.DataConfig(batch_size=6)
  assert data.batch_sizes == (6,)
  assert batch_ramp.rows_at(data.ramp, 10**9) == 6
  assert data.rows_before(10) == 60


@pytest.mark.parametrize(
  ('ramp', 'error'),
  [
    (((0, 2, 3),), r'expected pairs of whole numbers \(from_step, rows\)'),
    (5, r'got 5, expected pairs of whole numbers'),
    ((0, 8), r'got \(0, 8\), expected pairs of whole numbers'),
    (((0, 4.0), (2, 6)), 'expected pairs of whole numbers'),
    (((1, 8),), r'got steps \[1\], expected them to increase from 0'),
    (((0, 2), (5, 4), (5, 8)), 'expected them to increase from 0'),
    (((0, 0), (5, 8)), r'got rows \[0, 8\], expected 1 to data.batch_size = 8'),
    (((0, 9), (5, 8)), r'got rows \[9, 8\], expected 1 to data.batch_size = 8'),
    (((0, 2), (5, 4)), 'ends with 4 rows, expected data.batch_size = 8'),
  ],
)
def test_impossible_ramps_are_refused(ramp, error):
  with pytest.raises(ValueError, match=f'data.batch_ramp: .*{error}|{error}'):
    data_config.DataConfig(batch_size=8, batch_ramp=ramp).validate()
