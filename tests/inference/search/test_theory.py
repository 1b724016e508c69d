"""Strategies against exact theory: all that samples can say is enumerated.

A strategy runs once for each tuple of answers, on an engine that says these.
Weighted with their probabilities, the choices are its exact distribution.
"""

import itertools
import math

import hypothesis
from hypothesis import strategies as st
import numpy as np
import pytest
from scipy import stats

from evals import best_of_n
from evals.results import pass_at_k, voting as voting_theory
from inference.search import scorers
from inference.search.strategies import sampling, voting
from tests.helpers.serving import searches

_REWARDS = {'a': -1.0, 'b': 0.5, 'c': 2.0, 'd': 3.0}
_BY_REWARD = scorers.Called(lambda question, text: _REWARDS[text])


def _choice(strategy, answers, **fields) -> str:
  (found,) = searches.run(strategy, searches.saying(*answers, **fields))
  return found.text


def _distribution(strategy, probs: dict[str, float], n: int):
  found = dict.fromkeys(probs, 0.0)
  for answers in itertools.product(probs, repeat=n):
    weight = math.prod(probs[each] for each in answers)
    found[_choice(strategy, answers)] += weight
  return found


@pytest.mark.parametrize('n', [1, 2, 4])
def test_best_of_n_has_the_reward_and_the_divergence_of_theory(n):
  probs = {'a': 0.4, 'b': 0.3, 'c': 0.2, 'd': 0.1}
  strategy = sampling.BestOfN(n=n, scorer=_BY_REWARD)
  found = _distribution(strategy, probs, n)
  cumulative = np.cumsum([0.0, *probs.values()])
  exact = np.diff(cumulative**n)  # of the largest of n
  np.testing.assert_allclose(list(found.values()), exact, rtol=1e-12)
  reward = sum(found[each] * _REWARDS[each] for each in found)
  assert reward == pytest.approx(exact @ list(_REWARDS.values()), rel=1e-12)
  kl = sum(found[x] * math.log(found[x] / probs[x]) for x in probs)
  # Below the bound log n - (n - 1)/n, since answers may be equal.
  assert (kl == 0) if n == 1 else (0 < kl < best_of_n.kl(n))


def test_the_divergence_of_best_of_2_nears_its_bound_with_more_answers():
  gaps = []
  for size in (4, 16, 32):
    letters = [chr(ord('A') + i) for i in range(size)]
    by_letter = scorers.Called(lambda question, text: float(ord(text)))
    found = dict.fromkeys(letters, 0)
    for answers in itertools.product(letters, repeat=2):
      found[_choice(sampling.BestOfN(n=2, scorer=by_letter), answers)] += 1
    shares = np.array(list(found.values())) / size**2
    kl = float(np.sum(shares * np.log(shares * size)))
    gaps.append(best_of_n.kl(2) - kl)
  assert gaps[0] > gaps[1] > gaps[2] > 0
  assert gaps[2] < 1e-3


def test_best_of_k_with_a_verifier_is_right_as_often_as_pass_at_k():
  strategy = sampling.BestOfN(n=3, scorer=_BY_REWARD)
  found = _distribution(strategy, {'a': 0.7, 'd': 0.3}, 3)
  assert found['d'] == pytest.approx(1 - 0.7**3, rel=1e-12)
  # Drawn without replacement from 6 samples, of which 2 are right.
  pools = list(itertools.combinations('aaaadd', 3))
  right = sum(_choice(strategy, pool) == 'd' for pool in pools)
  assert right / len(pools) == pytest.approx(pass_at_k.pass_at_k(6, 2, 3))


@pytest.mark.parametrize(
  ('votes', 'accuracy'),
  [(1, 0.6250), (3, 0.6456), (5, 0.6454), (11, 0.6219), (101, 0.5104)],
)
def test_more_votes_help_and_then_harm(votes, accuracy):
  """Chen et al. 2024: half of the questions at .85, half at .4."""
  rng = np.random.default_rng(0)
  strategy = voting.SelfConsistency(n=votes)
  found = 0.0
  for right in range(votes + 1):
    answers = rng.permutation(['r'] * right + ['w'] * (votes - right))
    if _choice(strategy, answers, max_sequences=4) == 'r':
      for p in (0.85, 0.4):
        found += 0.5 * float(stats.binom.pmf(right, votes, p))
  assert found == pytest.approx(
    voting_theory.mixed_accuracy([0.85, 0.4], [0.5, 0.5], votes), rel=1e-9
  )
  assert round(found, 4) == accuracy


@hypothesis.settings(max_examples=150, deadline=None)
@hypothesis.given(
  answers=st.lists(st.sampled_from('abc'), min_size=1, max_size=25),
  at_once=st.integers(0, 4),
  places=st.integers(1, 5),
  is_weighted=st.booleans(),
)
def test_a_vote_that_stops_early_has_the_winner_of_all_votes(
  answers, at_once, places, is_weighted
):
  weights = {'a': 0.3, 'b': 1.0, 'c': 0.55}
  scorer = scorers.Called(lambda question, text: weights[text])
  strategy = voting.SelfConsistency(
    n=len(answers), at_once=at_once, scorer=scorer if is_weighted else None
  )
  engine = searches.saying(*answers, max_sequences=places)
  (found,) = searches.run(strategy, engine)
  if not is_weighted:
    weights = dict.fromkeys('abc', 1.0)
  # Of equals, the one that was said first.
  order = sorted(set(answers), key=answers.index)
  totals = {x: sum(weights[y] for y in answers if y == x) for x in order}
  assert totals[found.text] == pytest.approx(max(totals.values()))
  if not is_weighted:
    assert found.text == max(order, key=totals.__getitem__)


def test_the_probability_of_a_lead_is_the_integral_of_its_beta():
  for leader, second in ((1, 0), (3, 1), (8, 5), (40, 30)):
    exact = stats.beta.sf(0.5, leader + 1, second + 1)
    assert voting.probability(leader, second) == pytest.approx(exact, rel=1e-9)


def test_a_vote_at_a_confidence_is_wrong_as_seldom_as_it_says():
  """Prior as stated: the share of the right answer is uniform."""
  rng = np.random.default_rng(5)
  strategy = voting.SelfConsistency(n=40, confidence=0.9, at_once=1)
  num, wrong, asked = 300, 0, 0
  for _ in range(num):
    share = rng.uniform()
    answers = rng.choice(['r', 'w'], 40, p=[share, 1 - share])
    (found,) = searches.run(strategy, searches.saying(*answers))
    wrong += (found.text == 'r') != (share > 0.5)
    asked += len(found.samples)
  # One in 10 at most; 4 deviations above: a false alarm in 30,000.
  assert wrong / num <= 0.1 + 4 * math.sqrt(0.1 * 0.9 / num)
  assert asked / num < 15  # of 40


@pytest.mark.parametrize(
  ('fields', 'words'),
  [
    ({'n': 0}, 'n: got 0, expected at least 1'),
    ({'n': 3, 'confidence': 0.5}, 'more than 0.5'),
    ({'n': 3, 'confidence': 0.9, 'scorer': _BY_REWARD}, 'leave out the scorer'),
  ],
)
def test_a_vote_that_makes_no_sense_is_refused(fields, words):
  with pytest.raises(ValueError, match=words):
    voting.SelfConsistency(**fields)


def test_a_weight_outside_0_to_1_is_refused():
  with pytest.raises(ValueError, match='expected 0 to 1'):
    _choice(voting.SelfConsistency(n=2, scorer=_BY_REWARD), 'aa')
