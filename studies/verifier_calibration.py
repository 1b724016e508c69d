"""Verifiers: does a score of .8 mean that eight of ten answers are right?

    python -m studies.verifier_calibration --workdir=runs/think

Uses models and samples of `studies.test_time_scaling` in the same --workdir,
and makes them where they are missing. Scores of an answer that do not know the
right one: its likelihood, its weakest token, the steps that a program finds
right, and the share of the other samples that agree. For each: the expected
calibration error as it is, and after a line in the logits that was fitted on
the other half of the questions; that of perfect scores; and the AUC, the
probability that a right answer of a question outscores a wrong one of the same
question. Errors are standard errors over questions.
"""

import json
from typing import Any

from absl import app, flags
import numpy as np

from evals.results import calibration, recalibration, statistics
from experiments import test_time_scaling as experiments
from storage import atomic
from studies import test_time_scaling
from studies.common import study_flags
from studies.think import pool as pool_lib, strategies

AGREEMENT = 'agreement'
RESULTS = 'verifier_calibration.json'
_EDGE = 1e-4  # of scores, so that their logits are finite


def scores_of(pool: pool_lib.Pool) -> dict[str, np.ndarray]:
  """Returns each score of each sample, [Q, N], from 0 to 1."""
  found = dict(zip(pool_lib.SCORES, pool.scores_CQN, strict=True))
  return found | {AGREEMENT: agreement(pool.codes_QN)}


def agreement(codes_QN: np.ndarray) -> np.ndarray:
  """Returns the share of the other samples with the same answer; 0 for none."""
  same_QNN = codes_QN[:, :, None] == codes_QN[:, None, :]
  others_QN = same_QNN.sum(axis=2) - 1
  return np.where(codes_QN >= 0, others_QN / (codes_QN.shape[1] - 1), 0.0)


def recalibrated(scores_QN: np.ndarray, pool: pool_lib.Pool) -> np.ndarray:
  """Returns scores by a line in the logits, of the other half of questions."""
  half_Q = strategies.halves(pool.levels_Q)
  clipped_QN = np.clip(scores_QN, _EDGE, 1 - _EDGE)
  logits_QN = np.log(clipped_QN / (1 - clipped_QN))
  found_QN = np.zeros_like(logits_QN)
  for half in (0, 1):
    seen = half_Q == half
    line = recalibration.fit(
      logits_QN[seen].ravel(), pool.is_right_QN[seen].ravel()
    )
    found_QN[~seen] = recalibration.sigmoid(line(logits_QN[~seen]))
  return found_QN


def ece(scores_QN: np.ndarray, is_right_QN: np.ndarray) -> tuple[float, float]:
  """Returns the expected calibration error, and its error over questions."""
  values_QN = calibration.error_values(
    scores_QN.ravel(), is_right_QN.ravel()
  ).reshape(scores_QN.shape)
  values_Q = values_QN.mean(axis=1)
  return float(values_Q.mean()), statistics.standard_error(values_Q)


def auc(scores_QN: np.ndarray, is_right_QN: np.ndarray) -> tuple[float, float]:
  """Returns the mean AUC within questions, and its error.

  Questions whose answers are all right or all wrong have no pair. nan if none
  has one.
  """
  found = []
  for scores_N, is_right_N in zip(scores_QN, is_right_QN, strict=True):
    if 0 < is_right_N.sum() < len(is_right_N):
      gaps = scores_N[is_right_N][:, None] - scores_N[~is_right_N][None]
      found.append(np.mean((gaps > 0) + 0.5 * (gaps == 0)))
  if not found:
    return float('nan'), float('nan')
  return float(np.mean(found)), statistics.standard_error(found)


def measured(pool: pool_lib.Pool) -> dict[str, dict[str, Any]]:
  """Returns the numbers of each score."""
  found = {}
  for name, scores_QN in scores_of(pool).items():
    fitted_QN = recalibrated(scores_QN, pool)
    found[name] = {
      'ece': ece(scores_QN, pool.is_right_QN),
      'ece of a line': ece(fitted_QN, pool.is_right_QN),
      'ece of perfect scores': calibration.error_of_perfect(
        fitted_QN.ravel(), num_draws=50
      ),
      'auc': auc(scores_QN, pool.is_right_QN),
      'reliability': [
        each._asdict()
        for each in calibration.bins(
          scores_QN.ravel(), pool.is_right_QN.ravel()
        )
      ],
    }
  return found


_COLUMNS = 'ece', 'ece of a line', 'ece of perfect scores', 'auc'


def table(numbers: dict[str, dict[str, Any]], title: str) -> str:
  """Returns the numbers as Markdown."""
  rows = [
    [
      name,
      *('{:.3f} +- {:.3f}'.format(*each[column]) for column in _COLUMNS),
    ]
    for name, each in numbers.items()
  ]
  return test_time_scaling.markdown(title, ['score', *_COLUMNS], rows)


def main(argv: list[str]) -> None:
  """Makes what is missing; prints a table for each size."""
  workdir = study_flags.begin(argv)
  numbers = {}
  try:
    for size in [flags.FLAGS.size] if flags.FLAGS.size else experiments.SIZES:
      pool = test_time_scaling.pool_of(
        workdir,
        size,
        0,
        num_per_level=study_flags.QUESTIONS_PER_LEVEL.value,
        num_samples=study_flags.SAMPLES_PER_QUESTION.value,
        steps=study_flags.STEPS.value,
      )
      numbers[size] = measured(pool)
      print(table(numbers[size], f'{size} model, {len(pool.ids)} questions'))
  except ValueError as error:
    raise SystemExit(f'error: {error}') from None
  atomic.write_text(workdir / RESULTS, json.dumps(numbers, indent=2) + '\n')


if __name__ == '__main__':
  flags.DEFINE_enum(
    'size', None, experiments.SIZES, 'One size alone; none: all sizes.'
  )
  app.run(main)
