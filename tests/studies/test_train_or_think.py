"""Bills of thinking and of training, and the calibration of verifiers."""

import math

import numpy as np
import pytest

from evals.results import calibration
from studies import train_or_think as study, verifier_calibration
from studies.think import strategies
from tests.helpers import sample_pools


def _bill(training, answer):
  return study.Bill(name='x', training=training, answer=answer, accuracy=0.5)


@pytest.mark.parametrize(
  ('small', 'large', 'expected'),
  [
    ((10, 4), (40, 1), 10.0),
    ((10, 1), (40, 4), math.inf),
    ((10, 4), (10, 4), 0.0),
    ((10, 4), (5, 4), 0.0),
  ],
)
def test_the_crossing_is_where_bills_are_equal(small, large, expected):
  first, second = _bill(*small), _bill(*large)
  found = study.crossing(first, second)
  assert found == expected
  if 0 < found < math.inf:
    assert first.total(found) == second.total(found)
    assert first.total(found + 1) > second.total(found + 1)


def test_the_cheapest_option_reaches_its_target_on_questions_of_its_own():
  levels_Q = np.zeros(8, int)
  half_Q = strategies.halves(levels_Q)

  def option(k, accuracy, other, flops):
    return strategies.Option(
      size='small',
      strategy='majority',
      k=k,
      accuracy_Q=np.where(half_Q == 0, accuracy, other),
      flops_Q=np.full(8, flops),
    )

  among = [option(1, 0.4, 0.4, 1.0), option(4, 0.6, 0.5, 3.0)]
  among.append(option(16, 0.6, 0.9, 9.0))
  found = study.cheapest(among, levels_Q, 100.0, target=0.55)
  assert found == study.Bill(
    name='small, majority, 4', training=100.0, answer=3.0, accuracy=0.5
  )
  assert study.cheapest(among, levels_Q, 100.0, target=0.7) is None
  rows = study.rows_of({0.55: {'small': found, 'large': None}})
  assert rows[0][0] == '0.55'
  assert rows[0][2:] == ['not reached', 'only small']


def test_scores_of_verifiers_are_calibrated_by_the_other_half():
  pool = sample_pools.graded(num_per_level=40)
  numbers = verifier_calibration.measured(pool)
  assert set(numbers) == {
    'likelihood', 'weakest token', 'steps', verifier_calibration.AGREEMENT
  }  # fmt: skip
  for name, each in numbers.items():
    assert each['auc'][0] > 0.6, name
    assert each['ece of a line'][0] <= each['ece'][0] + 0.01, name
    assert name in verifier_calibration.table(numbers, 'title')


def test_scores_that_a_line_distorts_become_perfect():
  """Within 5 spreads of the ECE of perfect scores."""
  rng = np.random.default_rng(0)
  logits_QN = rng.normal(0, 1.5, (200, 16))
  right_QN = rng.random((200, 16)) < 1 / (1 + np.exp(-logits_QN))
  pool = sample_pools.of(~right_QN * 1, right_QN)
  scores_QN = 1 / (1 + np.exp(-2 * logits_QN - 1))
  before, _ = verifier_calibration.ece(scores_QN, right_QN)
  fitted_QN = verifier_calibration.recalibrated(scores_QN, pool)
  after, _ = verifier_calibration.ece(fitted_QN, right_QN)
  mean, spread = calibration.error_of_perfect(fitted_QN.ravel(), num_draws=100)
  assert abs(after - mean) < 5 * spread
  assert before > mean + 20 * spread


def test_agreement_is_with_the_other_samples():
  found_QN = verifier_calibration.agreement(np.array([[0, 0, 1, -1, -1]]))
  np.testing.assert_allclose(found_QN, [[0.25, 0.25, 0, 0, 0]])


def test_the_auc_of_questions_without_a_pair_is_unknown():
  scores_QN, right_QN = np.array([[0.1, 0.9]]), np.array([[True, True]])
  assert math.isnan(verifier_calibration.auc(scores_QN, right_QN)[0])
  found, _ = verifier_calibration.auc(scores_QN, np.array([[False, True]]))
  assert found == 1.0


@pytest.mark.parametrize('values', [['x'], ['0.5', '1.5'], []])
def test_wrong_targets_are_refused(values):
  with pytest.raises(ValueError, match='--targets: got'):
    study._targets(values)
