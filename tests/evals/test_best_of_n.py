"""Best of n: the estimator against all subsets, the KL against enumeration."""

import itertools
import math

import numpy as np
import pytest

from evals import best_of_n


def _by_enumeration(proxy_N, gold_N, n):
  """Returns the mean over all sets of n answers; ties are drawn at random."""
  found = []
  for subset in itertools.combinations(range(len(proxy_N)), n):
    best = max(proxy_N[i] for i in subset)
    tied = [gold_N[i] for i in subset if proxy_N[i] == best]
    found.append(np.mean(tied))
  return np.mean(found)


@pytest.mark.parametrize('has_ties', [False, True])
def test_the_estimate_is_the_mean_over_all_sets_of_answers(has_ties):
  rng = np.random.default_rng(0)
  proxy_PN, gold_PN = rng.normal(size=(2, 3, 7))
  if has_ties:
    proxy_PN = np.round(proxy_PN)
    assert any(len(set(row)) < 7 for row in proxy_PN.tolist())
  found = best_of_n.curve(proxy_PN, gold_PN, range(1, 8))
  for p, column in itertools.product(range(3), range(7)):
    expected = _by_enumeration(proxy_PN[p], gold_PN[p], column + 1)
    above = expected - gold_PN[p].mean()
    assert found.gold_Pn[p, column] == pytest.approx(above, abs=1e-12)
  np.testing.assert_allclose(found.gold_Pn[:, 0], 0, atol=1e-12)
  # The proxy sees the best of what it ranks.
  assert np.all(np.diff(found.proxy_Pn, axis=1) >= -1e-12)


def test_weights_of_ranks_are_counts_of_sets():
  for size, n in ((9, 1), (9, 4), (9, 9), (40, 13)):
    expected = [
      math.comb(i - 1, n - 1) / math.comb(size, n) for i in range(1, size + 1)
    ]
    np.testing.assert_allclose(
      best_of_n.rank_weights(size, n), expected, rtol=1e-12
    )
  # Many answers: neither overflow nor a loss of probability.
  assert best_of_n.rank_weights(60_000, 512).sum() == pytest.approx(1, abs=1e-9)


def test_the_kl_is_that_of_the_distribution_of_the_best():
  """Of many equally probable answers, all different."""
  size = 20_000
  ranks = np.arange(1, size + 1)
  for n in (1, 2, 5, 32):
    # Best of n with repetition: P(rank <= i) = (i / N)^n.
    probs = (ranks / size) ** n - ((ranks - 1) / size) ** n
    kept = probs > 0
    exact = np.sum(probs[kept] * np.log(probs[kept] * size))
    assert best_of_n.kl(n) == pytest.approx(exact, abs=1e-3)
    assert exact <= best_of_n.kl(n) + 1e-9
  assert best_of_n.kl(1) == 0.0


def test_a_fit_finds_the_coefficients_of_its_form_and_their_errors():
  rng = np.random.default_rng(1)
  ns = tuple(2**i for i in range(12))
  d_n = np.sqrt([best_of_n.kl(n) for n in ns])
  alphas_P, betas_P = rng.normal(2.0, 0.3, 50), rng.normal(0.6, 0.1, 50)
  gold_Pn = d_n * (alphas_P[:, None] - betas_P[:, None] * d_n)
  found = best_of_n.Curve(ns=ns, gold_Pn=gold_Pn, proxy_Pn=gold_Pn)
  fitted = best_of_n.fit(found)
  for estimate, values in ((fitted.alpha, alphas_P), (fitted.beta, betas_P)):
    assert estimate.value == pytest.approx(values.mean())
    error = np.std(values, ddof=1) / math.sqrt(50)
    assert estimate.error == pytest.approx(error)
  assert fitted.r_squared == pytest.approx(1)
  assert fitted.rms == pytest.approx(0, abs=1e-9)
  assert fitted.peak == pytest.approx(alphas_P.mean() / (2 * betas_P.mean()))
  np.testing.assert_allclose(fitted(d_n), gold_Pn.mean(axis=0), atol=1e-9)
  peak = gold_Pn.mean(axis=0).max()
  assert found.decline().value == pytest.approx(peak - gold_Pn[:, -1].mean())
  assert found.decline().value > 0.3


def test_the_curve_of_a_reward_with_a_peak_is_gaos_form():
  """Gold s - s^2 / 3 of a normal s, chosen by s: it rises, then falls.

  E[best s] is close to sqrt(2) d, so that the curve is close to the form.
  """
  rng = np.random.default_rng(2)
  proxy_PN = rng.normal(size=(64, 4096))
  gold_PN = proxy_PN - proxy_PN**2 / 3
  ns = [2**i for i in range(12)]
  found = best_of_n.curve(proxy_PN, gold_PN, ns)
  fitted = best_of_n.fit(found)
  assert fitted.r_squared > 0.97
  assert fitted.beta.value > 10 * fitted.beta.error
  assert found.decline().value > 10 * found.decline().error
  # Chosen by the gold reward itself, it never falls.
  perfect = best_of_n.curve(gold_PN, gold_PN, ns)
  assert perfect.decline().value == 0


def test_a_reward_that_never_falls_has_no_peak():
  ns = (1, 2, 4)
  d_n = np.sqrt([best_of_n.kl(n) for n in ns])
  gold_Pn = np.stack([d_n, d_n * 1.1])
  fitted = best_of_n.fit(
    best_of_n.Curve(ns=ns, gold_Pn=gold_Pn, proxy_Pn=gold_Pn)
  )
  assert fitted.beta.value == pytest.approx(0, abs=1e-9)
  rising = best_of_n.Fit(
    alpha=fitted.alpha,
    beta=best_of_n.Estimate(-0.1, 0.0),
    rms=0.0,
    r_squared=1.0,
  )
  assert rising.peak == math.inf


@pytest.mark.parametrize(
  ('proxy', 'gold', 'ns', 'message'),
  [
    (
      [[1, 2]],
      [[1, 2, 3]],
      [1],
      r'shapes \(1, 2\) and \(1, 3\), expected both',
    ),
    ([1, 2], [1, 2], [1], r'expected both to be \[prompts, answers\]'),
    ([[1, math.nan]], [[1, 2]], [1], 'a reward that is not finite'),
    ([[1, 2]], [[1, 2]], [3], 'got n = 3, expected numbers from 1 to the 2'),
    ([[1, 2]], [[1, 2]], [], 'got n = none, expected numbers from 1'),
  ],
)
def test_rewards_that_make_no_curve_are_refused(proxy, gold, ns, message):
  with pytest.raises(ValueError, match=message):
    best_of_n.curve(np.array(proxy), np.array(gold), ns)


def test_too_few_points_are_not_fitted():
  found = best_of_n.curve(np.eye(3), np.eye(3), [1, 2])
  with pytest.raises(ValueError, match='expected at least two numbers above 1'):
    best_of_n.fit(found)


def test_the_best_answer_is_chosen_by_its_score():
  def length(answered):
    assert {prompt for prompt, _ in answered} <= {'p'}
    return [len(answer) for _, answer in answered]

  assert best_of_n.choose(length, 'p', ['a', 'ccc', 'bb', 'ddd']) == 1
  with pytest.raises(
    ValueError, match='scores .* of 0 answers, expected a num'
  ):
    best_of_n.choose(length, 'p', [])
  with pytest.raises(ValueError, match='expected a number for each'):
    best_of_n.choose(lambda _: [math.nan], 'p', ['a'])
