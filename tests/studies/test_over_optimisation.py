"""The lab of over-optimisation: a gold reward with a peak, and its proxies."""

import numpy as np
import pytest

from evals import best_of_n
from studies import over_optimisation as lab


def test_the_gold_reward_rises_to_a_peak_and_falls():
  answers = lab.draw((20_000,), 0)
  rewards = lab.gold(answers)
  values_V = np.random.default_rng(0).normal(size=lab.NUM_LETTERS)
  values_V = (values_V - values_V.mean()) / values_V.std()
  sums = values_V[answers].sum(axis=1) / 4
  # 20,000 answers: the error of the variance is 1 %.
  assert np.var(sums) == pytest.approx(1, abs=0.05)
  low, high = sums < 1.25, sums > 1.25
  assert np.all(np.diff(rewards[low][np.argsort(sums[low])]) > -1e-9)
  assert np.all(np.diff(rewards[high][np.argsort(sums[high])]) < 1e-9)
  assert high.mean() > 0.05


def test_labels_follow_the_gold_reward_as_sharply_as_asked():
  shares = []
  for sharpness in (0.0, 1.0, 500.0):
    proxy = lab.Proxy(name='', num_pairs=4096, num_steps=1, sharpness=sharpness)
    pairs, share = lab.labelled_pairs(proxy, 0)
    shares.append(share)
    chosen, rejected = lab.gold(pairs).T
    assert np.mean(chosen > rejected) == pytest.approx(share)
  # Labels at random: 5 standard errors of 1 / 128.
  assert shares[0] == pytest.approx(0.5, abs=5 / 128)
  assert 0.6 < shares[1] < 0.9
  assert shares[2] > 0.98


def test_a_batch_has_pairs_side_by_side():
  pairs = lab.draw((64, 2), 0)
  batch = lab.rows(pairs)
  row, pair = 3, 2
  for side in (0, 1):
    is_own_T = batch['segment_ids'][row] == 2 * pair + side + 1
    own = batch['tokens'][row][is_own_T]
    np.testing.assert_array_equal(own, pairs[4 * row + pair, side])
    np.testing.assert_array_equal(
      batch['positions'][row][is_own_T], np.arange(16)
    )


@pytest.mark.slow
def test_a_proxy_is_trained_and_its_curve_is_fitted():
  proxy = lab.Proxy(name='few', num_pairs=256, num_steps=30)
  found = lab.measure(proxy, num_groups=3, group=256)
  assert found.accuracy.value > 0.7  # random rewards: 0.5 +- 0.008
  assert found.curve.ns == (1, 2, 4, 8, 16, 32, 64, 128)
  assert found.curve.gold_Pn.shape == (3, 8)
  assert found.fit.alpha.value > 0
  best = lab.gold_curve(num_groups=3, group=256)
  # Nothing chooses better than the gold reward, of the same answers.
  assert np.all(best.gold_Pn >= found.curve.gold_Pn - 1e-9)
  (panel,) = lab.panels({'few': found}, best)
  assert list(panel.lines) == ['few', 'few: fit', 'the gold reward itself']
  text = '\n'.join(lab.lines_of('few', found))
  assert f'alpha {found.fit.alpha.value:.3f} +- ' in text
  assert isinstance(found.curve.decline(), best_of_n.Estimate)
