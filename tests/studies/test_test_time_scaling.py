"""The study of test-time compute: its report, and its whole way when slow."""

import json

import numpy as np
import pytest

from studies import test_time_scaling as study
from studies.think import pool as pool_lib
from tests.helpers import sample_pools


def test_the_report_has_each_level_and_a_paired_comparison(tmp_path):
  pools = [
    {
      'small': sample_pools.graded(seed=seed),
      'large': sample_pools.graded(seed=seed + 9, factor=4.0),
    }
    for seed in range(2)
  ]
  text = study.report(pools, tmp_path, str(tmp_path / 'figure.svg'))
  assert '2 seeds, 200 held-out questions, 16 samples' in text
  assert '| 6 | large |' in text
  page = (tmp_path / study.REPORT).read_text(encoding='utf-8')
  assert page.count('<svg') == 3
  assert (tmp_path / 'figure.svg').exists()
  results = json.loads((tmp_path / study.RESULTS).read_text(encoding='utf-8'))
  once = results['overall']['small']['majority'][0]
  assert once['accuracy'] == pytest.approx(
    np.mean([each['small'].is_right_QN.mean() for each in pools]), abs=0.01
  )
  assert len(results['compared']) > 3
  for row in results['compared']:
    gain = row['optimal']['accuracy'] - row['best_of_n']['accuracy']
    assert row['gain']['accuracy'] == pytest.approx(gain)
    assert row['gain']['low'] <= gain <= row['gain']['high']
    # A level's mean is within the budget on the half that chose it.
    assert row['optimal']['flops'] <= 1.1 * row['budget']


def test_a_pool_is_kept_and_a_damaged_one_is_refused(tmp_path):
  pool = sample_pools.graded(num_per_level=4, num_samples=3)
  path = tmp_path / 'small_0_4x3.npz'
  pool.save(path)
  sizes = {'num_per_level': 4, 'num_samples': 3}
  back = study.pool_of(tmp_path, 'small', 0, **sizes)
  for name, value in vars(pool).items():
    np.testing.assert_array_equal(getattr(back, name), value)
  path.write_bytes(b'damaged')
  with pytest.raises(ValueError, match='got no pool of samples'):
    study.pool_of(tmp_path, 'small', 0, **sizes)


@pytest.mark.slow
def test_a_model_is_trained_and_sampled(tmp_path):
  pool = study.pool_of(
    tmp_path, 'small', 0, num_per_level=4, num_samples=4, steps=2
  )
  assert pool.codes_QN.shape == (20, 4)
  assert pool.last_QF.shape == pool.mean_QF.shape == (20, 64 + 3)
  # The first token of an answer comes with its prompt, at no further cost.
  assert np.all(pool.answer_flops_QN >= 0)
  assert pool.answer_flops_QN.sum() > 0
  (path,) = tmp_path.glob('*.npz')
  assert np.array_equal(pool_lib.load(path).tokens_QN, pool.tokens_QN)
