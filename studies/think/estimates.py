"""Strategies evaluated from a pool of samples, without sampling again.

All take k of the N samples of a question without replacement, so that their
values are unbiased for a strategy that draws k fresh samples (as pass@k by Chen
et al. 2021, arXiv:2107.03374). Once, pass@k and best of n are exact
expectations over all subsets; votes are means over `NUM_DRAWS` random orders of
the pool, the same for every strategy. Costs are in FLOPs: the prompt once, then
each sample that was begun.
"""

from collections.abc import Sequence
import dataclasses

import numpy as np

from evals.results import pass_at_k
from studies.think import pool as pool_lib

NUM_DRAWS = 64  # orders of a pool


@dataclasses.dataclass(frozen=True, kw_only=True)
class Curve:
  """A strategy at several numbers of samples, K."""

  ks: tuple[int, ...]
  accuracy_KQ: np.ndarray  # expected, of each question
  flops_KQ: np.ndarray  # expected


def coverage(pool: pool_lib.Pool, ks: Sequence[int]) -> Curve:
  """Returns pass@k: a verifier that knows the right answer chooses."""
  num = pool.is_right_QN.shape[1]
  right_Q = pool.is_right_QN.sum(axis=1)
  values = [
    pass_at_k.values([num] * len(right_Q), right_Q.tolist(), k) for k in ks
  ]
  return _curve(pool, ks, np.array(values))


def best_of(
  pool: pool_lib.Pool, scores_QN: np.ndarray, ks: Sequence[int]
) -> Curve:
  """Returns best of k by a score, exactly.

  The sample of rank r, from 0, is the best of k with probability
  C(N - 1 - r, k - 1) / C(N, k). Of equal scores, samples share their ranks.
  """
  num = scores_QN.shape[1]
  values = np.stack(
    [
      np.sum(rank_weights(scores_QN, k) * pool.is_right_QN, axis=1)
      for k in _checked(ks, num)
    ]
  )
  # Weights add up to 1 but for rounding.
  return _curve(pool, ks, np.minimum(values, 1.0))


def rank_weights(scores_QN: np.ndarray, k: int) -> np.ndarray:
  """Returns the probability that each sample is the best of k, [Q, N]."""
  num = scores_QN.shape[1]
  # P(all k are among the `below` lowest) = C(below, k) / C(N, k)
  below = np.arange(num + 1)
  within = np.ones(num + 1)
  for i in range(k):
    within *= np.clip(below - i, 0, None) / (num - i)
  found = np.empty_like(scores_QN, dtype=np.float64)
  for q, scores_N in enumerate(scores_QN):
    _, group_N, size_G = np.unique(
      scores_N, return_inverse=True, return_counts=True
    )
    end_G = np.cumsum(size_G)
    probs_G = within[end_G] - within[end_G - size_G]
    found[q] = (probs_G / size_G)[group_N]
  return found


def majority(
  pool: pool_lib.Pool,
  ks: Sequence[int],
  *,
  weights_QN: np.ndarray | None = None,
  stops_early: bool = False,
  seed: int = 0,
) -> Curve:
  """Returns majority votes over k samples.

  Of equals, the answer with the first vote wins, as in
  `inference/search/strategies/voting.py`. No answer has no vote.

  Args:
    pool: of samples.
    ks: votes.
    weights_QN: of votes, from 0 to 1; None: all are equal.
    stops_early: whether samples are drawn one by one, and no more when the
      leader cannot be overtaken: the same winner for fewer FLOPs.
    seed: of the orders.
  """
  num_questions, num = pool.codes_QN.shape
  ks = _checked(ks, num)
  rng = np.random.default_rng(seed)
  accuracy_KQ = np.zeros((len(ks), num_questions))
  flops_KQ = np.zeros((len(ks), num_questions))
  for _ in range(NUM_DRAWS):
    order_N = rng.permutation(num)
    weights = None if weights_QN is None else weights_QN[:, order_N]
    right_TQ, margin_TQ = _tallied(
      pool.codes_QN[:, order_N], pool.is_right_QN[:, order_N], weights
    )
    spent_TQ = np.cumsum(pool.answer_flops_QN[:, order_N].T, axis=0)
    for i, k in enumerate(ks):
      accuracy_KQ[i] += right_TQ[k - 1]
      last_Q = np.full(num_questions, k - 1)
      if stops_early:
        left_T1 = k - 1 - np.arange(k)[:, None]
        is_over_TQ = (margin_TQ[:k] > left_T1) | (left_T1 == 0)
        last_Q = np.argmax(is_over_TQ, axis=0)
      flops_KQ[i] += spent_TQ[last_Q, np.arange(num_questions)]
  return Curve(
    ks=tuple(ks),
    accuracy_KQ=accuracy_KQ / NUM_DRAWS,
    flops_KQ=flops_KQ / NUM_DRAWS + pool.prompt_flops_Q,
  )


def _tallied(codes_QN, is_right_QN, weights_QN):
  """Returns after each vote, [T, Q]: is the leader right, and its lead."""
  num_questions, num = codes_QN.shape
  rows = np.arange(num_questions)
  votes_QA = np.zeros((num_questions, num))
  # Of equals the first wins: the time of its first vote is taken off.
  first_QA = np.full((num_questions, num), num)
  is_right_QA = np.zeros((num_questions, num), bool)
  right_TQ = np.zeros((num, num_questions))
  margin_TQ = np.zeros((num, num_questions))
  for t in range(num):
    code_Q = codes_QN[:, t]
    has = code_Q >= 0
    at = rows[has], code_Q[has]
    votes_QA[at] += 1.0 if weights_QN is None else weights_QN[has, t]
    first_QA[at] = np.minimum(first_QA[at], t)
    is_right_QA[at] = is_right_QN[has, t]
    leader_Q = np.argmax(votes_QA - first_QA * 1e-9, axis=1)
    right_TQ[t] = is_right_QA[rows, leader_Q]
    lead_Q = votes_QA[rows, leader_Q].copy()
    others_QA = votes_QA.copy()
    others_QA[rows, leader_Q] = -1.0
    margin_TQ[t] = lead_Q - np.maximum(others_QA.max(axis=1), 0.0)
  return right_TQ, margin_TQ


def _curve(pool: pool_lib.Pool, ks: Sequence[int], accuracy_KQ) -> Curve:
  mean_Q = pool.answer_flops_QN.mean(axis=1)
  flops_KQ = pool.prompt_flops_Q + np.array(ks)[:, None] * mean_Q
  return Curve(ks=tuple(ks), accuracy_KQ=accuracy_KQ, flops_KQ=flops_KQ)


def _checked(ks: Sequence[int], num: int) -> Sequence[int]:
  if not all(1 <= k <= num for k in ks):
    raise ValueError(
      f'ks: got {list(ks)} with {num} samples of a question, expected numbers'
      f' from 1 to {num}; draw more samples'
    )
  return ks


def interval(
  values_SQ: np.ndarray, *, num_resamples: int = 2000, seed: int = 0
) -> tuple[float, float]:
  """Returns the 95 % interval of the mean, by the bootstrap.

  Questions are drawn again, the same ones for all seeds, and so are the seeds
  (the models) if there are several. The same `seed` draws the same questions,
  so that intervals of differences of two strategies are paired.

  Args:
    values_SQ: of each model and question.
    num_resamples: of the bootstrap.
    seed: of the resampling.
  """
  values_SQ = np.atleast_2d(values_SQ)
  num_seeds, num_questions = values_SQ.shape
  rng = np.random.default_rng(seed)
  which_RQ = rng.integers(0, num_questions, (num_resamples, num_questions))
  which_RS = rng.integers(0, num_seeds, (num_resamples, num_seeds))
  means_SR = np.stack([row[which_RQ].mean(axis=1) for row in values_SQ])
  means_R = np.take_along_axis(means_SR.T, which_RS, axis=1).mean(axis=1)
  low, high = np.quantile(means_R, [0.025, 0.975])
  return float(low), float(high)
