"""Fits find a known law; their intervals cover it; the gradient is exact."""

import dataclasses

import numpy as np
import pytest
from scipy import optimize

from studies.scaling import (
  fit,
  held_out,
  parametric,
  points as points_lib,
  report,
)
from training.planning import scaling_laws

LAW = scaling_laws.BESIROGLU
METHODS = [parametric.project, parametric.huber]


def grid(law=LAW, noise=0.0, seed=0, budgets=(1e18, 1e19, 1e20, 1e21)):
  """Returns nine sizes around the optimum of each budget."""
  rng = np.random.default_rng(seed)
  params, flops = [], []
  for budget in budgets:
    sizes = law.optimum(budget)[0] * np.geomspace(0.2, 5, 9)
    params.extend(sizes)
    flops.extend([budget] * 9)
  params, flops = np.array(params), np.array(flops)
  points = points_lib.make(params, flops / (6 * params), params, flops)
  losses = parametric.predict(law, points)
  losses = losses * np.exp(noise * rng.standard_normal(len(losses)))
  return dataclasses.replace(points, losses=losses)


@pytest.mark.slow
@pytest.mark.parametrize('method', METHODS)
@pytest.mark.parametrize('law', scaling_laws.FITS)
def test_a_law_without_noise_is_found_exactly(method, law):
  found = parametric.quantities(method(grid(law)))
  expected = parametric.quantities(law)
  for name, value in expected.items():
    # G is a power of a ratio of the others, with an exponent of 1.4 to 1.6.
    assert found[name] == pytest.approx(value, rel=1e-6), name


def test_both_methods_agree_on_little_noise():
  points = grid(noise=1e-4)
  a, b = (parametric.quantities(method(points)) for method in METHODS)
  # Least squares and the Huber loss, quadratic below 1e-3, weigh residuals of
  # 1e-4 alike, but for the curvature of the logarithm.
  for name in ('E', 'alpha', 'beta', 'a'):
    assert a[name] == pytest.approx(b[name], rel=1e-3), name


@pytest.mark.slow
def test_one_outlier_moves_the_huber_fit_less():
  points = grid(noise=1e-4)
  losses = points.losses.copy()
  losses[3] *= 1.2
  damaged = dataclasses.replace(points, losses=losses)
  shifts = [
    abs(parametric.quantities(method(damaged))['alpha'] - LAW.params_exponent)
    for method in METHODS
  ]
  assert shifts[1] < 0.1 * shifts[0]


def test_intervals_cover_the_law():
  """Of 24 intervals at 95 %, fewer than 17 cover with probability 1e-4."""
  covered = 0
  for seed in range(8):
    estimate = parametric.bootstrap(
      grid(noise=3e-3, seed=seed), parametric.project, num_resamples=40
    )
    assert not estimate.num_failed
    for name in ('alpha', 'beta', 'a'):
      value = parametric.quantities(LAW)[name]
      covered += value in estimate.intervals[name]
  assert covered >= 17


def test_an_interval_grows_with_the_noise():
  widths = []
  for noise in (1e-3, 4e-3):
    estimate = parametric.bootstrap(
      grid(noise=noise), parametric.project, num_resamples=40
    )
    a = estimate.intervals['a']
    assert a.low < a.high
    widths.append(a.error)
  assert 2 < widths[1] / widths[0] < 8


def test_the_gradient_of_the_huber_objective_is_exact():
  points = grid(noise=0.02)
  logs = np.log([points.params, points.tokens, points.losses])
  # Residuals on both sides of delta, and of both signs.
  for x in ([0.6, 6.2, 7.6, 0.35, 0.366], [0.5, 5.0, 9.0, 0.3, 0.4]):
    _, gradient = parametric.huber_objective(np.array(x), *logs)
    numeric = optimize.approx_fprime(
      np.array(x), lambda x: parametric.huber_objective(x, *logs)[0], 1e-8
    )
    assert gradient == pytest.approx(numeric, rel=1e-4, abs=1e-6)


def test_the_law_of_the_points_has_the_least_misfit():
  points = grid()
  assert parametric.misfit(LAW, points) < 1e-20
  assert parametric.misfit(scaling_laws.HOFFMANN, points) > 1e-4


@pytest.mark.parametrize('method', METHODS)
def test_points_that_do_not_determine_a_law_are_refused(method):
  points = grid()
  with pytest.raises(parametric.NoFitError, match='got 4 different models'):
    method(points.at(np.arange(4)))
  one_size = dataclasses.replace(points, params=np.full(len(points), 1e8))
  with pytest.raises(parametric.NoFitError, match='got 1 different sizes'):
    method(one_size)


def test_losses_that_rise_with_size_have_no_law():
  points = grid()
  risen = dataclasses.replace(points, losses=2 + 0.1 * np.log(points.params))
  with pytest.raises(parametric.NoFitError, match='at the edge of the search'):
    parametric.project(risen)


@pytest.mark.slow
@pytest.mark.parametrize('method', METHODS)
def test_the_largest_budget_is_predicted(method):
  found = held_out.predict_largest(grid(), method)
  assert found.budget == 1e21
  assert found.times_larger == pytest.approx(10)
  assert found.error < 1e-6
  # A law that changes at the largest budget is noticed.
  points = grid()
  losses = np.where(points.flops == 1e21, points.losses + 0.1, points.losses)
  changed = dataclasses.replace(points, losses=losses)
  found = held_out.predict_largest(changed, method)
  assert found.error == pytest.approx(0.1, abs=1e-5)
  assert found.bias == pytest.approx(-0.1, abs=1e-5)


def test_two_budgets_are_too_few_to_predict_one():
  points = grid(budgets=(1e18, 1e19))
  with pytest.raises(parametric.NoFitError, match='at least 3 to predict'):
    held_out.predict_largest(points, parametric.project)
  assert 'at least 3' in report.held_out_lines(points)


@pytest.mark.slow
def test_the_tables_have_every_quantity_and_law():
  points = grid(noise=1e-3)
  found, failed = report.estimates(points, 3)
  assert not failed
  table = report.fits_table(found)
  for name in parametric.quantities(LAW):
    assert f'| {name} |' in table
  misfits = report.misfit_table(points, {'own': LAW})
  assert '| own |' in misfits
  isoflop = report.isoflop_table(points, LAW, 4)
  assert isoflop.count('\n| 1e+') == 4
  assert 'exponent a: parabolas' in isoflop


@pytest.mark.slow
def test_the_analysis_prints_all_parts_or_says_why_there_is_no_fit(capsys):
  points = grid(noise=1e-3)
  found, failed = report.estimates(points.at(np.arange(3)), 3)
  assert not found
  assert set(failed) == set(report.METHODS)
  with pytest.raises(parametric.NoFitError, match='got 3 different models'):
    fit.analyse(points.at(np.arange(3)), 3, [])
  fit.analyse(points, 3, ['hoffmann'])
  said = capsys.readouterr().out
  for words in ('| hoffmann |', 'exponent a: parabolas', 'held out, Huber'):
    assert words in said
