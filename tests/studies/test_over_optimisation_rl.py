"""Reinforcement against a proxy, where the KL is known exactly."""

import numpy as np
import pytest

from studies import over_optimisation as lab, over_optimisation_rl as study


def _more_is_better(answers):
  """Returns a proxy that never learnt that too much is worse."""
  values_V = np.random.default_rng(0).normal(size=lab.NUM_LETTERS)
  values_V = (values_V - values_V.mean()) / values_V.std()
  return values_V[answers].sum(axis=-1)


def test_the_divergence_is_that_of_independent_letters():
  logits_TV = np.zeros((lab.LENGTH, lab.NUM_LETTERS))
  assert study.kl_of(logits_TV) == pytest.approx(0, abs=1e-12)
  # Half of the letters have almost no probability: log 2 for each place.
  logits_TV[:, ::2] = -100
  expected = lab.LENGTH * np.log(2)
  assert study.kl_of(logits_TV) == pytest.approx(expected, rel=1e-5)


def test_the_fit_finds_its_own_coefficients():
  d_SP = np.array([[0.5, 1.0, 2.0, 4.0], [0.4, 1.1, 2.5, 3.0]])
  path = study.Path(
    distance_SP=d_SP, gold_SP=d_SP * (0.9 - 0.4 * np.log(d_SP)), proxy_SP=d_SP
  )
  found = study.fit(path)
  assert found.alpha.value == pytest.approx(0.9)
  assert found.beta.value == pytest.approx(0.4)
  assert found.r_squared == pytest.approx(1)
  # The derivative of d (alpha - beta log d) is 0 there.
  assert found.peak == pytest.approx(np.exp(0.9 / 0.4 - 1))


@pytest.mark.slow
def test_gold_falls_while_the_proxy_rises_and_a_penalty_stops_before():
  free, held = (
    study.measure(_more_is_better, penalty, num_seeds=2, num_steps=100)
    for penalty in (0.0, 4.0)
  )
  assert np.all(np.diff(free.distance_SP) > 0)
  assert np.all(np.diff(free.proxy_SP) > 0)
  # 2,048 answers of a gold reward with a deviation of about 1: 0.02.
  assert free.decline().value > 0.5
  assert free.peak().value > 0.3
  assert np.all(held.distance_SP[:, -1] < free.distance_SP[:, -1] / 1.5)
  assert held.decline().value < free.decline().value / 2
  assert abs(study.beside(held, free).value) < 0.2
