"""Predictors fitted to outcomes whose P(correct) is known."""

import json

import numpy as np
import pytest

from evals.results import calibration, recalibration
from frozen import effort_predictor
from tests.helpers import commands
from training.effort import fit as fit_lib, outcomes

TRIES = 64


def _probs(hardness_B: np.ndarray) -> np.ndarray:
  """Returns P(correct) [B, 2]: effort helps at middling hardness."""
  logits_B = 1.5 * hardness_B
  return recalibration.sigmoid(
    np.stack([logits_B, logits_B + 1.5 * np.exp(-(hardness_B**2))], axis=1)
  )


def _table(num: int, seed: int = 0) -> tuple[outcomes.Outcomes, np.ndarray]:
  rng = np.random.default_rng(seed)
  features_BF = rng.normal(size=(num, 4))
  features_BF[:, 3] = 7.0  # a feature that never varies
  probs_BE = _probs(features_BF[:, 0])
  flops_BE = np.array([1e6, 4e6]) * (2 + np.tanh(features_BF[:, 1:2]))
  table = outcomes.Outcomes(
    ids=tuple(f'{seed}:{i}' for i in range(num)),
    efforts=('low', 'high'),
    features_BF=features_BF,
    correct_BE=rng.binomial(TRIES, probs_BE) / TRIES,
    flops_BE=flops_BE,
    tokens_BE=flops_BE / 1e5,
  )
  return table, probs_BE


@pytest.fixture(scope='module')
def fitted() -> effort_predictor.Predictor:
  table, _ = _table(1500)
  config = fit_lib.FitConfig(num_steps=300)
  found = fit_lib.fit(table.split('train'), table.split('calibration'), config)
  return effort_predictor.Predictor(
    params=found.params, efforts=found.efforts, weights_digest='digest'
  )


@pytest.mark.slow
def test_a_predictor_finds_probabilities_and_costs(fitted):
  table, probs_BE = _table(1000, seed=1)
  found_BE, costs_BE = fitted(table.features_BF)
  assert np.mean(np.abs(found_BE - probs_BE)) < 0.03
  # A base rate alone is off by about .25.
  assert np.mean(np.abs(probs_BE.mean(axis=0) - probs_BE)) > 0.2
  assert np.mean(np.abs(costs_BE / table.flops_BE - 1)) < 0.1
  for e in range(2):
    values = calibration.error_values(found_BE[:, e], table.correct_BE[:, e])
    assert np.mean(values) < 0.05


def test_perfect_probabilities_have_the_error_of_perfect_ones():
  """4 spreads: a false alarm in 16,000 for each of the two efforts."""
  table, probs_BE = _table(1000, seed=2)
  for e in range(2):
    mean, spread = calibration.error_of_perfect(probs_BE[:, e], TRIES)
    error = calibration.error_values(probs_BE[:, e], table.correct_BE[:, e])
    assert abs(np.mean(error) - mean) < 4 * spread
    # Confidences that are too high are found.
    high_B = recalibration.sigmoid(
      2 * np.log(probs_BE[:, e] / (1 - probs_BE[:, e]))
    )
    wrong = calibration.error_values(high_B, table.correct_BE[:, e])
    mean, spread = calibration.error_of_perfect(high_B, TRIES)
    assert np.mean(wrong) > mean + 10 * spread


@pytest.mark.parametrize('has_offset', [True, False])
def test_recalibration_finds_the_line_that_distorted_logits(has_offset):
  rng = np.random.default_rng(0)
  true_N = rng.normal(0, 2, 20_000)
  labels_N = rng.random(20_000) < recalibration.sigmoid(true_N)
  offset = 0.7 if has_offset else 0.0
  line = recalibration.fit(
    (true_N - offset) / 0.4, labels_N * 1.0, has_offset=has_offset
  )
  assert line.slope == pytest.approx(0.4, abs=0.02)
  assert line.offset == pytest.approx(offset, abs=0.08)


def test_recalibration_of_separable_outcomes_is_finite():
  line = recalibration.fit(np.array([-3.0, -1.0, 1.0, 3.0]), np.arange(4) > 1.5)
  assert 1 < line.slope < 100


def test_a_table_and_a_predictor_are_read_as_they_were_written(
  fitted, tmp_path
):
  table, _ = _table(30)
  outcomes.save(tmp_path / 'table.jsonl', table)
  back = outcomes.read(tmp_path / 'table.jsonl')
  assert (back.ids, back.efforts) == (table.ids, table.efforts)
  np.testing.assert_array_equal(back.flops_BE, table.flops_BE)
  np.testing.assert_allclose(back.features_BF, table.features_BF, rtol=1e-6)
  assert sum(len(table.split(name)) for name in outcomes.SPLITS) == 30

  effort_predictor.save(tmp_path / 'effort.json', fitted)
  same = effort_predictor.read(tmp_path / 'effort.json', 'digest')
  for one, other in zip(
    same(table.features_BF), fitted(table.features_BF), strict=True
  ):
    np.testing.assert_array_equal(one, other)
  with pytest.raises(ValueError, match="predictor of the model 'digest'"):
    effort_predictor.read(tmp_path / 'effort.json', 'another')
  with pytest.raises(
    ValueError, match=r'got shape \(1, 3\), expected \[B, 4\]'
  ):
    fitted(np.zeros((1, 3)))


@pytest.mark.parametrize(
  ('change', 'error'),
  [
    (lambda row: row | {'features': [1.0]}, 'line 2: got 1 features'),
    (lambda row: {'id': 'a'}, 'expected an object with id, features'),
    (lambda row: row | {'outcomes': {}}, 'got no effort'),
    (
      lambda row: (
        row | {'outcomes': {'low': {'correct': 2, 'flops': 1, 'tokens': 1}}}
      ),
      'low: got correct 2.0, expected a share from 0 to 1',
    ),
    (
      lambda row: (
        row | {'outcomes': {'low': {'correct': 1, 'flops': 0, 'tokens': 1}}}
      ),
      'low: got 0.0 FLOPs',
    ),
    (lambda row: row | {'features': [float('nan')] * 4}, 'not finite'),
  ],
)
def test_damaged_tables_are_refused_with_their_line(change, error, tmp_path):
  path = tmp_path / 'table.jsonl'
  outcomes.save(path, _table(2)[0])
  first, second = path.read_text(encoding='utf-8').splitlines()
  second = json.dumps(change(json.loads(second)))
  path.write_text(f'{first}\n{second}\n', encoding='utf-8')
  with pytest.raises(ValueError, match=error):
    outcomes.read(path)


def test_the_command_fits_a_table_and_refuses_a_short_one(tmp_path):
  table, _ = _table(200)
  outcomes.save(tmp_path / 'table.jsonl', table)
  out = tmp_path / 'effort.json'
  arguments = [
    'training/effort/__main__.py',
    f'--outcomes={tmp_path / "table.jsonl"}',
    f'--out={out}',
  ]
  found = commands.run(*arguments, '--num_steps=50')
  assert found.returncode == 0, found.stderr
  assert 'ECE' in found.stdout
  assert effort_predictor.read(out).efforts == ('low', 'high')
  outcomes.save(tmp_path / 'table.jsonl', table.take(range(8)))
  found = commands.run(*arguments)
  assert found.returncode == 1
  assert 'error: ' in found.stderr
  assert 'log more questions' in found.stderr
