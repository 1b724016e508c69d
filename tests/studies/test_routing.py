"""The study of routing, on pools whose P(correct) is known."""

import dataclasses
import json
import math

import numpy as np
import pytest

from inference.search.routing import efforts
from studies import routing as study
from studies.think import pool as pool_lib, routing
from tests.helpers import sample_pools
from training.effort import fit as fit_lib

CONFIG = fit_lib.FitConfig(num_steps=150)


@pytest.fixture(scope='module')
def table():
  return routing.outcomes_of(sample_pools.graded(num_per_level=100))


@pytest.fixture(scope='module')
def found(table):
  return routing.folds(table, CONFIG)


@pytest.mark.slow
def test_each_question_is_predicted_by_a_predictor_that_has_not_seen_it(
  table, found
):
  places = np.concatenate([fold.places for fold in found])
  np.testing.assert_array_equal(np.sort(places), np.arange(len(table)))
  for fold in found:
    held_out = {table.ids[i] for i in fold.places}
    assert not held_out & set(fold.calibration.ids)


def test_the_router_lies_between_the_mix_and_the_oracle(table, found):
  for budget in study.budgets_of(table)[1:4]:
    at = routing.at_budget(table, found, budget)
    mix, router, oracle = (
      at.accuracy[name].mean() for name in ('mix', 'router', 'oracle')
    )
    assert mix < router < oracle
    # All three have spent alike, and about the budget.
    spent = [at.flops[name].mean() for name in ('mix', 'router', 'oracle')]
    np.testing.assert_allclose(spent, spent[1], rtol=1e-6)
    assert spent[1] == pytest.approx(budget, rel=0.1)
    low, high = at.share_interval()
    assert low <= at.share <= high
    _, paid = routing.paced(table, found, budget)
    assert paid <= budget * 1.01


def test_calibration_is_near_that_of_perfect_predictions(table, found):
  probs_BE, _ = routing.predicted(table, found)
  ece, error, perfect, spread = routing.calibration_error(
    probs_BE, table.correct_BE, 16
  )
  assert 0 < perfect < ece < 0.1
  assert error > 0
  assert spread > 0
  base_BE = np.full_like(probs_BE, 0.9)
  assert routing.calibration_error(base_BE, table.correct_BE, 16)[0] > 0.2


@pytest.mark.slow
def test_the_report_has_both_halves_and_the_table_of_outcomes(tmp_path):
  pool = sample_pools.graded(num_per_level=20)
  text = study.report(
    pool, tmp_path, config=CONFIG, figure_path=str(tmp_path / 'figure.svg')
  )
  assert '**under shift**' in text
  numbers = json.loads((tmp_path / study.RESULTS).read_text(encoding='utf-8'))
  assert numbers['held out']['questions'] == 100
  assert numbers['under shift']['questions'] == 40
  page = (tmp_path / study.REPORT).read_text(encoding='utf-8')
  assert page.count('<svg') == 4
  lines = (tmp_path / 'outcomes.jsonl').read_text(encoding='utf-8')
  assert lines.count('\n') == 100


def test_a_pool_with_fewer_samples_than_an_effort_is_refused():
  with pytest.raises(ValueError, match='draw more samples'):
    routing.outcomes_of(sample_pools.graded(num_per_level=4, num_samples=8))


def test_an_effort_may_choose_by_steps():
  pool = sample_pools.graded(num_per_level=4)
  scores_CQN = np.array(pool.scores_CQN)
  scores_CQN[pool_lib.SCORES.index(routing.STEPS)] = pool.is_right_QN
  perfect = dataclasses.replace(pool, scores_CQN=scores_CQN)
  table = routing.outcomes_of(perfect, chosen_by=routing.STEPS)
  # A server does what the names say.
  for name, num in routing.EFFORTS[routing.STEPS].items():
    spec = efforts.parsed(name).spec
    assert (spec.n, spec.scorer) == (num, 'column_sum' if num > 1 else '')
  for name, num in routing.EFFORTS[routing.MAJORITY].items():
    assert efforts.parsed(name).spec.n == num
  # Steps that know the right answer find it if one of the samples has it.
  num, wrong_Q = pool.is_right_QN.shape[1], (~pool.is_right_QN).sum(axis=1)
  for effort, k in enumerate((1, 4, 16)):
    expected = [1 - math.comb(int(n), k) / math.comb(num, k) for n in wrong_Q]
    np.testing.assert_allclose(table.correct_BE[:, effort], expected)
  assert table.correct_BE.max() <= 1.0
