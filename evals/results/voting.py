"""The accuracy of a majority vote over independent answers.

Reference: Chen et al. 2024 (arXiv:2403.02419): more votes help where an answer
is right more often than not, and harm elsewhere; over a mix of easy and hard
questions the accuracy may rise and then fall.
"""

from collections.abc import Sequence

from scipy import stats


def accuracy(probability: float, votes: int) -> float:
  """Returns the probability that a majority of votes is right.

  Answers are right or wrong; wrong answers agree with each other. A tie is
  right half of the time.

  Args:
    probability: probability that one vote is right.
    votes: independent votes, at least 1.

  Raises:
    ValueError: no votes, or no probability.
  """
  if not 0 <= probability <= 1:
    raise ValueError(
      f'probability: got {probability}, expected a number from 0 to 1'
    )
  if votes < 1:
    raise ValueError(f'votes: got {votes}, expected at least 1')
  half, is_even = votes // 2, votes % 2 == 0
  more = stats.binom.sf(half, votes, probability)
  return float(more + is_even * stats.binom.pmf(half, votes, probability) / 2)


def mixed_accuracy(
  probabilities: Sequence[float], shares: Sequence[float], votes: int
) -> float:
  """Returns the accuracy over questions of several difficulties.

  Args:
    probabilities: probability that one vote is right, by kind of question.
    shares: share of each kind among the questions; they add up to 1.
    votes: independent votes, at least 1.

  Raises:
    ValueError: see `accuracy`; or the shares do not add up to 1.
  """
  if abs(sum(shares) - 1) > 1e-9:
    raise ValueError(f'shares: got {shares}, expected numbers that add up to 1')
  return sum(
    share * accuracy(probability, votes)
    for probability, share in zip(probabilities, shares, strict=True)
  )
