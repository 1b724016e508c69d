"""Best of n: the answer that a proxy reward prefers, and its true worth.

    found = best_of_n.curve(proxy_PN, gold_PN, ns=(1, 2, 4, 8))
    fitted = best_of_n.fit(found)

Each of P prompts has N answers of one policy. Best of n draws n answers and
takes the answer with the largest proxy reward. It moves away from the policy by
at most KL = log n - (n - 1) / n nats. With d = sqrt(KL), Gao et al. found that
the true (gold) reward rises above the policy's reward by

    R(d) = d (alpha - beta d)

It has its peak at d = alpha / (2 beta) and falls after it: over-optimisation.

References: Gao, Schulman & Hilton 2022 (arXiv:2210.10760), section 3.1. The
estimator: Nakano et al. 2021 (arXiv:2112.09332), appendix I. The KL is an upper
bound, reached where all answers differ: Beirami et al. 2024 (arXiv:2401.01879).
"""

from collections.abc import Sequence
import dataclasses
import math
from typing import NamedTuple

import numpy as np

from evals import judges
from evals.results import statistics


class Estimate(NamedTuple):
  """A number and its standard error over prompts."""

  value: float
  error: float


@dataclasses.dataclass(frozen=True, kw_only=True)
class Curve:
  """Rewards of best of n minus the policy's rewards, [P, len(ns)]."""

  ns: tuple[int, ...]
  gold_Pn: np.ndarray
  proxy_Pn: np.ndarray

  @property
  def distances(self) -> np.ndarray:
    """Returns d, the root of the KL in nats, for each n."""
    return np.sqrt([kl(n) for n in self.ns])

  def gold(self, n: int) -> Estimate:
    """Returns the mean gold reward of best of n above the policy's."""
    return _mean(self.gold_Pn[:, self.ns.index(n)])

  def proxy(self, n: int) -> Estimate:
    """Returns the mean proxy reward of best of n above the policy's."""
    return _mean(self.proxy_Pn[:, self.ns.index(n)])

  def decline(self) -> Estimate:
    """Returns the gold reward lost from its peak to the largest n; 0: none.

    The peak is chosen by the same answers, which makes the loss a little too
    large: by about its own error.
    """
    best = int(np.argmax(self.gold_Pn.mean(axis=0)))
    return _mean(self.gold_Pn[:, best] - self.gold_Pn[:, -1])


@dataclasses.dataclass(frozen=True, kw_only=True)
class Fit:
  """R(d) = d (alpha - beta d), fitted to a curve."""

  alpha: Estimate
  beta: Estimate
  rms: float  # root mean square distance of the curve from the fit
  r_squared: float  # share of the curve's variation that the fit explains

  def __call__(self, distances: np.ndarray) -> np.ndarray:
    """Returns R(d)."""
    return distances * (self.alpha.value - self.beta.value * distances)

  @property
  def peak(self) -> float:
    """Returns the distance of the largest reward; infinity: it never falls."""
    if self.beta.value <= 0:
      return math.inf
    return max(0.0, self.alpha.value / (2 * self.beta.value))


def kl(n: int) -> float:
  """Returns the largest KL from the policy to its best of n, in nats."""
  return math.log(n) - (n - 1) / n


def curve(
  proxy_PN: np.ndarray, gold_PN: np.ndarray, ns: Sequence[int]
) -> Curve:
  """Returns the rewards of best of n, without bias, from N answers per prompt.

  The estimate is the mean over all sets of n of the N answers. Its variance is
  large where n is close to N.

  Args:
    proxy_PN: rewards that choose the answer.
    gold_PN: the true rewards of the same answers.
    ns: numbers of answers, each from 1 to N.

  Raises:
    ValueError: shapes differ, a reward is not finite, or an n is not possible.
  """
  proxy_PN, gold_PN = (np.asarray(x, np.float64) for x in (proxy_PN, gold_PN))
  if proxy_PN.ndim != 2 or proxy_PN.shape != gold_PN.shape:
    raise ValueError(
      f'best of n: got rewards of shapes {proxy_PN.shape} and {gold_PN.shape},'
      ' expected both to be [prompts, answers]'
    )
  if not (np.isfinite(proxy_PN).all() and np.isfinite(gold_PN).all()):
    raise ValueError(
      'best of n: got a reward that is not finite, expected numbers'
    )
  size = proxy_PN.shape[1]
  if not ns or not all(1 <= n <= size for n in ns):
    raise ValueError(
      f'best of n: got n = {", ".join(map(str, ns)) or "none"}, expected'
      f' numbers from 1 to the {size} answers of a prompt'
    )
  ns = tuple(sorted(set(map(int, ns))))
  weights_nN = np.stack([rank_weights(size, n) for n in ns])
  found = {}
  for name, rewards_PN in (('gold_Pn', gold_PN), ('proxy_Pn', proxy_PN)):
    ranked_PN = np.stack(
      [_by_rank(*each) for each in zip(proxy_PN, rewards_PN, strict=True)]
    )
    above_PN = ranked_PN - rewards_PN.mean(axis=1, keepdims=True)
    found[name] = above_PN @ weights_nN.T
  return Curve(ns=ns, **found)


def rank_weights(size: int, n: int) -> np.ndarray:
  """Returns the probability that best of n takes the answer of each rank.

  Rank i of 1 to N, the largest last, is the best of C(i - 1, n - 1) of the
  C(N, n) sets (Nakano et al., appendix I).
  """
  # w(N) = n / N, and w(i - 1) = w(i) (i - n) / (i - 1): no large number occurs.
  ranks = np.arange(size, 1, -1)
  ratios = np.maximum(ranks - n, 0) / (ranks - 1)
  return (n / size * np.cumprod([1.0, *ratios]))[::-1]


def _by_rank(proxy_N: np.ndarray, rewards_N: np.ndarray) -> np.ndarray:
  """Returns rewards in the order of the proxy.

  Answers with the same proxy reward get their mean, as a random choice would.
  """
  _, groups_N, counts = np.unique(
    proxy_N, return_inverse=True, return_counts=True
  )
  means = np.bincount(groups_N, rewards_N) / counts
  return np.repeat(means, counts)


def fit(found: Curve) -> Fit:
  """Returns the fit by least squares, with errors over prompts.

  The coefficients are linear in the curve. So they are the means of the
  coefficients of single prompts, whose spread gives the errors. Points of one
  curve depend on each other, and count as one.

  Raises:
    ValueError: the curve has fewer than two points beside n = 1.
  """
  d_n = found.distances
  if np.count_nonzero(d_n) < 2:
    raise ValueError(
      f'best of n: got a curve with n = {found.ns}, expected at least two'
      ' numbers above 1, as many as it has coefficients'
    )
  form_n2 = np.stack([d_n, -(d_n**2)], axis=1)
  alphas_P, betas_P = np.linalg.pinv(form_n2) @ found.gold_Pn.T
  alpha, beta = _mean(alphas_P), _mean(betas_P)
  mean_n = found.gold_Pn.mean(axis=0)
  left_n = mean_n - form_n2 @ [alpha.value, beta.value]
  variation = float(np.sum((mean_n - mean_n.mean()) ** 2))
  return Fit(
    alpha=alpha,
    beta=beta,
    rms=float(np.sqrt(np.mean(left_n**2))),
    r_squared=1 - float(np.sum(left_n**2)) / variation if variation else 0.0,
  )


def choose(
  score: judges.ScoreFn, prompt: judges.Prompt, answers: Sequence[str]
) -> int:
  """Returns the index of the best answer; of equals, the first.

  Raises:
    ValueError: there are no answers, or a score is not a number.
  """
  scores = [float(x) for x in score([(prompt, each) for each in answers])]
  if not scores or len(scores) != len(answers) or any(map(math.isnan, scores)):
    raise ValueError(
      f'best of n: got scores {scores} of {len(answers)} answers, expected a'
      ' number for each of at least one'
    )
  return int(np.argmax(scores))


def _mean(values: np.ndarray) -> Estimate:
  return Estimate(float(np.mean(values)), statistics.standard_error(values))
