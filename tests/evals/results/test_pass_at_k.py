"""pass@k against counting every choice of k samples."""

import itertools
import math

import numpy as np
import pytest

from evals.results import pass_at_k


@pytest.mark.parametrize('num_samples', [1, 2, 5, 8])
def test_it_is_the_share_of_choices_with_a_right_one(num_samples):
  for num_correct in range(num_samples + 1):
    samples = [1] * num_correct + [0] * (num_samples - num_correct)
    for k in range(1, num_samples + 1):
      chosen = [any(c) for c in itertools.combinations(samples, k)]
      assert pass_at_k.pass_at_k(num_samples, num_correct, k) == pytest.approx(
        sum(chosen) / len(chosen), abs=1e-15
      )


def test_large_numbers_neither_overflow_nor_vanish():
  # Exact, with Python's integers.
  exact = 1 - math.comb(99_000, 100) / math.comb(100_000, 100)
  assert pass_at_k.pass_at_k(100_000, 1000, 100) == pytest.approx(exact)
  # One right sample of 10^9 gives k / n; 1 - product would keep only 7 digits.
  assert pass_at_k.pass_at_k(10**6, 1, 1) == pytest.approx(1e-6, rel=1e-12)


def test_it_is_unbiased():
  # Samples are right with probability p: on average pass@k is 1 - (1 - p)^k.
  # 20000 problems know it to 0.003; the seed is fixed, three times that.
  rng = np.random.default_rng(0)
  num_correct = rng.binomial(10, 0.3, 20_000).tolist()
  values = pass_at_k.values([10] * 20_000, num_correct, 4)
  assert np.mean(values) == pytest.approx(1 - 0.7**4, abs=0.009)


def test_numbers_that_cannot_be_are_refused():
  with pytest.raises(ValueError, match='num_correct: got 3 of 2'):
    pass_at_k.pass_at_k(2, 3, 1)
  with pytest.raises(ValueError, match='k: got 3 with 2 samples'):
    pass_at_k.pass_at_k(2, 1, 3)


def test_the_ks_that_are_told():
  assert pass_at_k.useful_ks(1) == [1]
  assert pass_at_k.useful_ks(8) == [1, 2, 4, 8]
  assert pass_at_k.useful_ks(10) == [1, 2, 4, 8, 10]
