"""Verdicts, which follow from the numbers alone."""

import math

import numpy as np
import pytest

from evals import claims
from studies.papers import port, verdicts

RANGE = claims.Quantity(name='x', published='1', low=0.9, high=1.1, why='w')


def found(value, low=None, high=None, seeds=0):
  return verdicts.Finding(
    value=value,
    low=value if low is None else low,
    high=value if high is None else high,
    seeds=seeds,
  )


@pytest.mark.parametrize(
  ('finding', 'expected'),
  [
    (found(1.0), 'reproduced'),
    (found(0.9), 'reproduced'),
    (found(0.899), 'not reproduced'),
    (found(1.0, 0.91, 1.09), 'reproduced'),
    (found(1.0, 0.89, 1.05), 'inconclusive'),
    (found(1.0, 0.5, 1.5), 'inconclusive'),
    (found(1.2, 1.11, 1.29), 'not reproduced'),
    (found(1.2, 1.09, 1.31), 'inconclusive'),
  ],
)
def test_the_verdict(finding, expected):
  assert verdicts.verdict(RANGE, finding) == expected


def test_an_interval_over_seeds_is_students():
  values = [1.0, 2.0, 4.0]
  finding = verdicts.finding(values)
  # t(.975, 2) = 4.3027
  half = 4.302653 * np.std(values, ddof=1) / math.sqrt(3)
  assert finding.value == pytest.approx(7 / 3)
  assert finding.high - finding.value == pytest.approx(half)
  assert finding.value - finding.low == pytest.approx(half)
  assert finding.seeds == 3
  assert not finding.is_exact
  assert verdicts.finding(0.5).is_exact


def test_one_seed_and_numbers_that_are_none_are_refused():
  with pytest.raises(ValueError, match='at least 2'):
    verdicts.finding([1.0])
  for value in (math.nan, [1.0, math.inf]):
    with pytest.raises(ValueError, match='finite'):
      verdicts.finding(value)
  with pytest.raises(ValueError, match='low <= value <= high'):
    verdicts.finding(port.Interval(value=1.0, low=2.0, high=3.0))


def test_more_seeds_would_decide():
  # The interval must shrink to half its width: four times the seeds.
  undecided = found(1.0, 0.8, 1.2, seeds=5)
  assert verdicts.would_decide(RANGE, undecided) == 'about 20 seeds'
  at_the_end = found(1.1, 1.0, 1.2, seeds=5)
  assert 'no number of seeds' in verdicts.would_decide(RANGE, at_the_end)
  assert 'narrower' in verdicts.would_decide(RANGE, found(1, 0.8, 1.2))
