"""Calibration against figures worked out by hand."""

import math

import numpy as np
import pytest

from evals.results import calibration


def test_the_expected_calibration_error_by_hand():
  # (0, 0.5]: two answers, mean confidence 0.35, half of them right;
  # (0.5, 1]: three answers, mean confidence 0.8, one right.
  confidences = [0.3, 0.4, 0.7, 0.8, 0.9]
  is_right = [1, 0, 1, 0, 0]
  expected = 2 / 5 * abs(0.5 - 0.35) + 3 / 5 * abs(1 / 3 - 0.8)
  values = calibration.error_values(confidences, is_right, num_bins=2)
  assert np.mean(values) == pytest.approx(expected)
  low, high = calibration.bins(confidences, is_right, num_bins=2)
  assert low == pytest.approx((0.0, 0.5, 2, 0.35, 0.5))
  assert high == pytest.approx((0.5, 1.0, 3, 0.8, 1 / 3))


def test_bounds_belong_to_the_bin_below():
  found = calibration.bins([0.0, 0.5, 1.0], [0, 1, 1], num_bins=2)
  assert [one.count for one in found] == [2, 1]


def test_a_calibrated_model_has_little_error_and_another_one_much():
  # Fixed seed. The ECE of 20000 calibrated answers in 15 bins is about
  # 15 * 0.8 * sqrt(0.2 / 20000 / 15) = 0.01; the other is wrong by 0.2.
  rng = np.random.default_rng(0)
  confidences = rng.uniform(0.2, 1.0, 20_000)
  is_right = (rng.uniform(size=20_000) < confidences).astype(float)
  assert np.mean(calibration.error_values(confidences, is_right)) < 0.02
  boastful = (rng.uniform(size=20_000) < confidences - 0.2).astype(float)
  assert np.mean(calibration.error_values(confidences, boastful)) > 0.18


def test_probabilities_of_options_add_up_however_small_they_are():
  found = calibration.probabilities([-1000.0, -1000.0 - math.log(3)])
  assert found == pytest.approx([0.75, 0.25])


def test_brier_and_nll_of_one_answer():
  p = np.array([0.7, 0.2, 0.1])
  assert calibration.brier_value(p, 1) == pytest.approx(0.49 + 0.64 + 0.01)
  # Log-probabilities need not be normalised.
  assert calibration.nll_value(np.log(p) - 5.0, 1) == pytest.approx(
    -math.log(0.2)
  )


def test_confidences_are_probabilities():
  with pytest.raises(ValueError, match='expected probabilities from 0 to 1'):
    calibration.bins([1.2], [1])
  with pytest.raises(ValueError, match='one for each'):
    calibration.bins([0.5, 0.5], [1])
