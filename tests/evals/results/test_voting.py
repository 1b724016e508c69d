"""Majority votes, against enumeration."""

import itertools

import pytest

from evals.results import voting


@pytest.mark.parametrize('votes', [1, 2, 3, 4, 7])
@pytest.mark.parametrize('probability', [0.0, 0.3, 0.5, 0.85, 1.0])
def test_the_accuracy_is_that_of_all_outcomes(votes, probability):
  expected = 0.0
  for outcome in itertools.product((0, 1), repeat=votes):
    right = sum(outcome)
    chance = probability**right * (1 - probability) ** (votes - right)
    expected += chance * (
      1.0 if 2 * right > votes else 0.5 if 2 * right == votes else 0.0
    )
  assert voting.accuracy(probability, votes) == pytest.approx(expected)


def test_bad_input_is_refused():
  with pytest.raises(ValueError, match='probability'):
    voting.accuracy(1.5, 3)
  with pytest.raises(ValueError, match='votes'):
    voting.accuracy(0.5, 0)
  with pytest.raises(ValueError, match='add up to 1'):
    voting.mixed_accuracy((0.5, 0.6), (0.5, 0.4), 3)
