"""Parabolas: exact on parabolas, biased on the law by known amounts."""

import dataclasses

import numpy as np
import pytest

from studies.scaling import parabolas, parametric, points as points_lib
from training.planning import scaling_laws

BUDGETS = (1e18, 1e19, 1e20)


def grid(law, spread, center=1.0, count=15, budgets=BUDGETS):
  """Returns sizes from 1/spread to spread times center x the optimum."""
  params = np.concatenate(
    [
      law.optimum(budget)[0] * center * np.geomspace(1 / spread, spread, count)
      for budget in budgets
    ]
  )
  flops = np.repeat(budgets, count)
  points = points_lib.make(params, flops / (6 * params), params, flops)
  return dataclasses.replace(points, losses=parametric.predict(law, points))


def test_a_parabola_is_found_exactly():
  params = np.tile(np.geomspace(1e6, 1e8, 7), 2)
  flops = np.repeat([1e12, 1e17], 7)
  best = 2e-2 * flops**0.55
  losses = 3 + 0.07 * np.log(params / best) ** 2
  found = parabolas.fit(
    points_lib.make(params, flops / (6 * params), losses, flops)
  )
  assert found.exponent == pytest.approx(0.55, rel=1e-9)
  assert found.scale == pytest.approx(2e-2, rel=1e-7)
  assert found.parabolas[0].minimum == pytest.approx(3)
  assert found.parabolas[0].curvature == pytest.approx(0.07)
  assert [each.is_inside for each in found.parabolas] == [False, True]


@pytest.mark.parametrize(
  ('spread', 'percent'), [(2, 0.3), (4, 1.3), (8, 3.0), (16, 5.4)]
)
def test_the_bias_on_a_centred_grid_is_that_of_the_paper(spread, percent):
  """arXiv:2603.22339: N_opt is too high, the exponent is not touched."""
  law = scaling_laws.HOFFMANN
  found = parabolas.bias(law, grid(law, spread))
  for error in found.best_params.values():
    assert 100 * error == pytest.approx(percent, abs=0.05)
  assert found.exponent == pytest.approx(0, abs=1e-12)


def test_a_grid_off_the_centre_by_budget_biases_the_exponent():
  law = scaling_laws.HOFFMANN
  near, far = (
    grid(law, 8, center=center, budgets=(budget,))
    for center, budget in ((0.25, 1e18), (4.0, 1e20))
  )
  points = points_lib.make(
    *(
      np.concatenate([getattr(near, name), getattr(far, name)])
      for name in ('params', 'tokens', 'losses', 'flops')
    )
  )
  # An error that no measurement shows, of the size of published intervals.
  assert parabolas.bias(law, points).exponent > 0.02


def test_the_interval_of_the_exponent_covers_it_and_grows_with_noise():
  """Of 12 intervals at 95 %, fewer than 8 cover with probability 1e-4."""
  law = scaling_laws.BESIROGLU
  points = grid(law, 4)
  covered, errors = 0, {1e-3: [], 4e-3: []}
  for seed in range(6):
    noise = np.random.default_rng(seed).standard_normal(len(points))
    for size, found in errors.items():
      noisy = dataclasses.replace(points, losses=points.losses + size * noise)
      inside = parabolas.bootstrap(noisy, num_resamples=60)
      covered += parametric.quantities(law)['a'] in inside
      found.append(inside.error)
  assert covered >= 8
  assert 2 < np.mean(errors[4e-3]) / np.mean(errors[1e-3]) < 8


def test_points_without_minima_are_refused():
  law = scaling_laws.BESIROGLU
  points = grid(law, 4)
  with pytest.raises(parametric.NoFitError, match='got 1 budget of FLOPs'):
    parabolas.fit(points.at(points.flops == 1e18))
  three = points.at((points.flops == 1e18) | (np.arange(len(points)) < 18))
  with pytest.raises(parametric.NoFitError, match='got 3 sizes at 1e'):
    parabolas.fit(three)
  bent = dataclasses.replace(points, losses=-points.losses)
  with pytest.raises(parametric.NoFitError, match='without a minimum at 1e'):
    parabolas.fit(bent)
