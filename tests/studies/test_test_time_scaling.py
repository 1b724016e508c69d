"""The study of test-time compute: its report, and its whole way when slow."""

import json

import numpy as np
import pytest

from experiments import test_time_scaling as experiments
from frozen import format as format_lib
from studies import test_time_scaling as study
from studies.common import quiet_run
from studies.think import graded, pool as pool_lib
from tests.helpers import sample_pools


@pytest.mark.slow
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
def test_a_model_is_trained_and_sampled(tmp_path, monkeypatch):
  monkeypatch.setattr(graded, '_NUM_PER_LEVEL', 1)
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


@pytest.mark.slow
def test_training_ends_at_the_first_look_that_is_good_enough(tmp_path):
  experiment = quiet_run.shortened(experiments.get_config('small'), 3)
  seen = []

  def look(frozen):
    seen.append(format_lib.open_directory(frozen).manifest.step)
    return seen[-1] / 4

  how = {'every': 1, 'look': look}
  for target, expected in ((0.2, [1]), (0.5, [1, 2]), (0.9, [1, 2, 3])):
    frozen = graded.train(experiment, tmp_path, target=target, **how)
    assert format_lib.open_directory(frozen).manifest.step == expected[-1]
    # Resumed, it does not look again.
    assert seen == expected


def test_the_questions_of_a_look_are_none_of_the_test():
  asked = {each.question for each in graded.questions()}
  assert len(asked) > 80
  assert not asked & {each.question for each in study.problems_of(20)}
