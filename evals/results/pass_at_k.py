"""pass@k: the probability that one of k samples is right.

Reference: Chen et al. 2021 (arXiv:2107.03374), equation 1 and figure 3.
"""

from collections.abc import Sequence
import math

import numpy as np


def pass_at_k(num_samples: int, num_correct: int, k: int) -> float:
  """Returns the unbiased estimate 1 - C(n - c, k) / C(n, k) of one problem.

  It differs from 1 - (1 - c/n)^k, which draws with replacement and is too low.

  Args:
    num_samples: n, the samples that were drawn.
    num_correct: c, the samples that were right.
    k: the samples that a user draws.

  Raises:
    ValueError: not 0 <= c <= n or not 1 <= k <= n.
  """
  if not 0 <= num_correct <= num_samples:
    raise ValueError(
      f'num_correct: got {num_correct} of {num_samples} samples, expected 0 to'
      f' {num_samples}'
    )
  if not 1 <= k <= num_samples:
    raise ValueError(
      f'k: got {k} with {num_samples} samples, expected 1 to {num_samples};'
      ' draw more samples'
    )
  num_wrong = num_samples - num_correct
  if num_wrong < k:
    return 1.0
  if not num_correct:
    return 0.0
  # C(n - c, k) / C(n, k) = prod_{i=n-c+1..n} (1 - k/i): the binomials would
  # overflow, the product does not. Its logarithm is summed, since 1 - product
  # would lose a small pass rate to rounding.
  i = np.arange(num_wrong + 1, num_samples + 1)
  return -math.expm1(math.fsum(np.log1p(-k / i)))


def values(
  num_samples: Sequence[int], num_correct: Sequence[int], k: int
) -> list[float]:
  """Returns the estimate of each problem; their mean is the benchmark's."""
  return [
    pass_at_k(n, c, k) for n, c in zip(num_samples, num_correct, strict=True)
  ]


def useful_ks(num_samples: int) -> list[int]:
  """Returns the powers of two up to the number of samples, and that number."""
  powers = [2**i for i in range(num_samples.bit_length())]
  return sorted({*[k for k in powers if k <= num_samples], num_samples})
