"""Verifiers: does a score of .8 mean that eight of ten answers are right?

    python -m studies.verifier_calibration --workdir=runs/think

Uses the models of `studies.test_time_scaling` in the same --workdir, and makes
them where they are missing; so are their answers drawn, now with their texts.
Scores of an answer that do not know the right one: its likelihood, its weakest
token, the steps that a program finds right, the share of the other samples that
agree; and the rewards of a model that was trained on answers to training
questions (`studies/think/model_verifiers.py`): that of the answer, and the
least after one of its steps. For each: the expected calibration error as it is,
and after a line in the logits that was fitted on the other half of the
questions; that of perfect scores; and the AUC, the probability that a right
answer of a question outscores a wrong one of the same question. Errors are
standard errors over questions.

    python -m studies.verifier_calibration --model=DIR --questions=gsm8k.jsonl \
      --num_questions=10 --samples_per_question=8 --workdir=runs/gsm8k

measures a model that is there, which also says of each of its answers whether
it is right (`inference/search/judging.py:self_verified`).
"""

from collections.abc import Mapping
import json
import pathlib
from typing import Any

from absl import app, flags
import numpy as np

from evals.results import calibration, recalibration, statistics
from experiments import test_time_scaling as experiments
from frozen import manifest as manifest_lib
from inference import generate
from storage import atomic, digests, locks
from studies import test_time_scaling
from studies.common import study_flags
from studies.think import (
  model_verifiers,
  pool as pool_lib,
  real_model,
  strategies,
  texts as texts_lib,
)

AGREEMENT = 'agreement'
RESULTS = 'verifier_calibration.json'
TRAINING = 3  # training questions of the reward model, per held-out question
_TRAINING_SAMPLES = 16  # of each, at most
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


def measured(
  pool: pool_lib.Pool, scores: Mapping[str, np.ndarray] | None = None
) -> dict[str, dict[str, Any]]:
  """Returns the numbers of each score.

  Args:
    pool: of the samples.
    scores: of each sample, [Q, N], from 0 to 1; None: those of the pool.
  """
  found = {}
  for name, scores_QN in (scores or scores_of(pool)).items():
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


def of_size(
  workdir: pathlib.Path,
  size: str,
  *,
  num_per_level: int,
  num_samples: int,
  steps: int = 0,
) -> tuple[pool_lib.Pool, dict[str, np.ndarray]]:
  """Returns the held-out answers of a trained size, and all their scores.

  Makes what is missing: the model, its answers, its reward model.

  Args:
    workdir: of all runs and answers.
    size: of the model.
    num_per_level: held-out questions.
    num_samples: of each.
    steps: of both trainings; 0: their own.

  Raises:
    SystemExit: a signal stopped a run.
    ValueError: a file is damaged, or there is no pair to train on.
  """
  directory = test_time_scaling.trained(workdir, size, 0, steps)
  generator = generate.load(directory, pool_lib.ENGINE)
  asked = {
    'validation': (num_per_level, num_samples),
    'train': (TRAINING * num_per_level, min(num_samples, _TRAINING_SAMPLES)),
  }
  answers = {
    split: texts_lib.draw(
      workdir / f'{size}_0_{split}_{num}x{samples}_texts.npz',
      generator,
      # Other training questions than the first ones, which the model has seen.
      test_time_scaling.problems_of(num, split, seed=int(split == 'train')),
      num_samples=samples,
      max_tokens=experiments.MAX_TOKENS,
    )
    for split, (num, samples) in asked.items()
  }
  judge = model_verifiers.train(
    answers['train'],
    experiments.get_config(size),
    directory,
    workdir / f'{size}_0_reward',
    steps,
  )
  held_out = answers['validation']
  rewards = model_verifiers.rewards(
    generate.load(judge, pool_lib.ENGINE, is_for_rewards=True), held_out
  )
  return held_out.pool, scores_of(held_out.pool) | rewards


def of_model(
  settings: real_model.Settings, workdir: pathlib.Path
) -> tuple[pool_lib.Pool, dict[str, np.ndarray]]:
  """Returns the answers of a model that is there, and their scores.

  Raises:
    FileNotFoundError, ValueError: model or questions are missing or damaged.
  """
  questions = real_model.read_questions(
    settings.questions, settings.num_questions
  )
  digest = manifest_lib.read(pathlib.Path(settings.model)).weights_digest
  how = {
    'num_samples': settings.num_samples,
    'max_tokens': settings.max_tokens,
    'temperature': settings.temperature,
  }
  drawn = how | {'weights': digest, 'ids': [each.id for each in questions]}
  generator = generate.load(settings.model, pool_lib.ENGINE)
  answers = texts_lib.draw(
    workdir / f'texts_{digests.of_json(drawn)[:12]}.npz',
    generator,
    questions,
    read=real_model.reader(settings.max_tokens),
    **how,
  )
  scores = scores_of(answers.pool)
  del scores[pool_lib.STEPS]  # of sums in columns
  verdicts_QN = model_verifiers.self_verified(generator, answers)
  return answers.pool, scores | {model_verifiers.SELF: verdicts_QN}


def main(argv: list[str]) -> None:
  """Makes what is missing; prints a table for each size, or of --model."""
  workdir = study_flags.begin(argv)
  numbers = {}
  try:
    if asked := test_time_scaling.asked_of_flags():
      pool, scores = of_model(asked, workdir)
      numbers[asked.model] = measured(pool, scores)
      title = f'{len(pool.ids)} questions, {pool.is_right_QN.mean():.3f} right'
      print(table(numbers[asked.model], title))
    else:
      for size in [flags.FLAGS.size] if flags.FLAGS.size else experiments.SIZES:
        pool, scores = of_size(
          workdir,
          size,
          num_per_level=study_flags.QUESTIONS_PER_LEVEL.value,
          num_samples=study_flags.SAMPLES_PER_QUESTION.value,
          steps=study_flags.STEPS.value,
        )
        numbers[size] = measured(pool, scores)
        print(table(numbers[size], f'{size} model, {len(pool.ids)} questions'))
      print(model_verifiers.NOTE)
  except (ValueError, FileNotFoundError, locks.InUseError) as error:
    raise SystemExit(f'error: {error}') from None
  atomic.write_text(workdir / RESULTS, json.dumps(numbers, indent=2) + '\n')


if __name__ == '__main__':
  flags.DEFINE_enum(
    'size', None, experiments.SIZES, 'One size alone; none: all sizes.'
  )
  test_time_scaling.define_flags()
  app.run(main)
