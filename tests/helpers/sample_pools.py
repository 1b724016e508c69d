"""Pools of samples whose probabilities are known, without a model."""

import numpy as np

from studies.think import pool as pool_lib


def of(codes_QN, is_right_QN, scores_QN=None, levels_Q=None):
  """Returns a pool: a prompt costs 10, and a sample 1."""
  codes_QN = np.asarray(codes_QN)
  shape = codes_QN.shape
  scores_QN = np.ones(shape) if scores_QN is None else np.asarray(scores_QN)
  nothing = np.zeros((shape[0], 0))
  return pool_lib.Pool(
    ids=np.arange(shape[0]).astype(str),
    levels_Q=np.zeros(shape[0], int) if levels_Q is None else levels_Q,
    codes_QN=codes_QN,
    is_right_QN=np.asarray(is_right_QN, bool),
    tokens_QN=np.ones(shape, int),
    scores_CQN=np.stack([scores_QN] * 3),
    prompt_flops_Q=np.full(shape[0], 10.0),
    answer_flops_QN=np.ones(shape),
    last_QF=nothing,
    mean_QF=nothing,
  )


def graded(num_per_level=40, num_samples=16, seed=0, factor=1.0):
  """Returns a pool of five levels, from 95 to 15 % right.

  Features tell the level, and little of the question. Wrong answers are spread
  over three values, so that votes help where a third is right.
  """
  rng = np.random.default_rng(seed)
  levels_Q = np.repeat(np.arange(1, 6), num_per_level)
  logits_Q = 4.0 - 1.1 * levels_Q + rng.normal(0, 0.7, len(levels_Q))
  probs_Q1 = 1 / (1 + np.exp(-logits_Q[:, None]))
  right_QN = rng.random((len(levels_Q), num_samples)) < probs_Q1
  wrong_QN = rng.integers(1, 4, right_QN.shape)
  scores_QN = np.where(right_QN, 0.6, 0.4) + rng.uniform(
    -0.4, 0.4, right_QN.shape
  )
  pool = of(np.where(right_QN, 0, wrong_QN), right_QN, scores_QN, levels_Q)
  features_QF = np.stack(
    [
      levels_Q + rng.normal(0, 0.2, len(levels_Q)),
      rng.normal(size=len(levels_Q)),
    ],
    axis=1,
  )
  return pool_lib.Pool(
    **(
      vars(pool)
      | {
        'last_QF': features_QF,
        'mean_QF': features_QF,
        'prompt_flops_Q': pool.prompt_flops_Q * factor,
        'answer_flops_QN': pool.answer_flops_QN
        * factor
        * (2 + levels_Q[:, None]),
      }
    )
  )
