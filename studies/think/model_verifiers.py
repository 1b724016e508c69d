"""Verifiers that are models: a reward model, and the model itself.

The reward model is trained by life one from pairs of a right and a wrong answer
to one training question, both samples of the model that it will judge (an
outcome reward model: Cobbe et al. 2021, arXiv:2110.14168, section 4.1). It is a
process verifier where it reads the lines so far, after each line, as in a
search over steps (`inference/search/judging.py`); the least of these rewards is
then the answer's (Lightman et al. 2023, arXiv:2305.20050, appendix F.2, compare
such reductions). The reward after the last line is that of the answer.
"""

import dataclasses
import json
import pathlib
from typing import Any

import numpy as np

from data import sources
from evals import judges
from evals.results import recalibration
from inference import generate, model_port, rewards as rewards_lib
from inference.requests import requests as requests_lib
from inference.sampling import settings as settings_lib
from inference.search import (
  budget as budget_lib,
  judging,
  samples as samples_lib,
)
from storage import atomic
from studies.common import quiet_run
from studies.think import texts as texts_lib
from training import experiment as experiment_lib
from training.checkpoints import init_from
from training.objectives import reward
from training.optimizer import chain

OUTCOME, PROCESS = 'reward of the answer', 'least reward of a step'
SELF = 'self-verification'
NOTE = (
  'A reward is shown as its sigmoid, which is no probability that the answer is'
  ' right: Bradley-Terry pairs teach differences between answers to one'
  ' question alone. The line in the logits repairs the scale.'
)
# Six epochs of the pairs of the small model. Neither 4,000 steps nor twice as
# many pairs taught its two layers anything that holds for other questions.
NUM_STEPS = 600
MOST_PAIRS = 4  # of one question
_ROW = 320  # tokens; the longest pair has two answers of six columns
_TOGETHER = 20  # questions of one call


def pairs_of(answers: texts_lib.Answers, seed: int = 0) -> list[dict[str, Any]]:
  """Returns records of a right and a wrong answer to one question.

  A question whose answers are all right, or all wrong, has none. No pair is
  there twice.

  Raises:
    ValueError: no question has both.
  """
  rng, found = np.random.default_rng(seed), []
  for question, row, is_right_N in zip(
    answers.questions, answers.texts, answers.pool.is_right_QN, strict=True
  ):
    right, wrong = (np.flatnonzero(x) for x in (is_right_N, ~is_right_N))
    if not len(right) or not len(wrong):
      continue
    drawn = (rng.choice(x, 2 * MOST_PAIRS) for x in (right, wrong))
    pairs = dict.fromkeys(
      (row[chosen], row[rejected])
      for chosen, rejected in zip(*drawn, strict=True)
    )
    found += [
      {'prompt': question, 'chosen': chosen, 'rejected': rejected}
      for chosen, rejected in list(pairs)[:MOST_PAIRS]
    ]
  if not found:
    raise ValueError(
      f'pairs: got {len(answers.questions)} questions whose answers are all'
      ' right or all wrong, expected some with both; draw more samples, or'
      ' train the model for longer'
    )
  return found


def experiment_of(
  base: experiment_lib.Experiment, directory: pathlib.Path, pairs: pathlib.Path
) -> experiment_lib.Experiment:
  """Returns the experiment of a reward model that begins as a frozen model.

  Args:
    base: has trained the frozen model.
    directory: of that.
    pairs: file of `pairs_of`.
  """
  return dataclasses.replace(
    base,
    name=f'{base.name}_reward',
    init_from=str(directory),
    model=dataclasses.replace(base.model, max_length=_ROW),
    objective=reward.Reward(centring=0.01),
    data=dataclasses.replace(
      base.data,
      open_source=sources.jsonl,
      path=str(pairs),
      train_split='all',
      eval_split='all',
      examples='pairs',
      chat_template='',  # the template of the frozen directory
      row_length=_ROW,
      tokenizer=init_from.tokenizer_of(str(directory)),
    ),
    optimizer=chain.OptimizerConfig(
      peak_lr=5e-4, end_lr=0.0, warmup_steps=20, weight_decay=0.0
    ),
    num_steps=NUM_STEPS,
  )


def train(
  answers: texts_lib.Answers,
  base: experiment_lib.Experiment,
  directory: pathlib.Path,
  workdir: pathlib.Path,
  steps: int = 0,
) -> pathlib.Path:
  """Trains a reward model, if it is missing; returns its frozen directory.

  Args:
    answers: of the frozen model, to training questions.
    base: has trained the frozen model.
    directory: of that.
    workdir: of the run.
    steps: of training; 0: `NUM_STEPS`.

  Raises:
    SystemExit: a signal stopped the run.
    ValueError: the answers have no pair.
  """
  pairs = workdir.with_name(f'{workdir.name}_pairs.jsonl')
  if not pairs.exists():
    lines = map(json.dumps, pairs_of(answers))
    atomic.write_text(pairs, '\n'.join(lines) + '\n')
  experiment = experiment_of(base, directory, pairs)
  experiment = quiet_run.shortened(experiment, steps)
  if quiet_run.run(experiment, workdir).exit_code:
    raise SystemExit('stopped by a signal; the same command resumes')
  return workdir / 'frozen'


def rewards(
  generator: generate.Generator, answers: texts_lib.Answers
) -> dict[str, np.ndarray]:
  """Returns sigmoids of a reward model, [Q, N], of the answer and by step."""
  last_QN, least_QN = by_step(rewards_lib.scorer_of(generator), answers)
  return {
    OUTCOME: recalibration.sigmoid(last_QN),
    PROCESS: recalibration.sigmoid(least_QN),
  }


def by_step(
  score: judges.ScoreFn, answers: texts_lib.Answers
) -> tuple[np.ndarray, np.ndarray]:
  """Returns the score of each answer, and the least after a line, [Q, N].

  Beginnings that answers have in common are scored once.
  """
  rows: list[list[list[float]]] = []  # of each question, answer and line
  for start in range(0, len(answers.questions), _TOGETHER):
    together = [
      (question, [parts_of(text) for text in row])
      for question, row in zip(
        answers.questions[start : start + _TOGETHER],
        answers.texts[start : start + _TOGETHER],
        strict=True,
      )
    ]
    asked = list(
      dict.fromkeys(
        (question, part)
        for question, row in together
        for parts in row
        for part in parts
      )
    )
    found = dict(zip(asked, score(asked), strict=True))
    rows += [
      [[found[question, part] for part in parts] for parts in row]
      for question, row in together
    ]
  last_QN = np.array([[scores[-1] for scores in row] for row in rows])
  least_QN = np.array([[min(scores) for scores in row] for row in rows])
  return last_QN, least_QN


def parts_of(text: str) -> list[str]:
  """Returns the beginnings of an answer, line by line; the last is all of it.

  Without the newline behind them, as a search over steps has them.
  """
  ends = [place for place, sign in enumerate(text) if sign == '\n']
  begun = [text[:end] for end in ends]
  return [*(part for part in begun if part.strip()), text]


def self_verified(
  generator: generate.Generator, answers: texts_lib.Answers
) -> np.ndarray:
  """Returns P(yes) / (P(yes) + P(no)) of a model about its answers, [Q, N]."""
  costs = budget_lib.of_engine(generator.engine, generator.adapter_digest)
  scorer = judging.self_verified(generator, costs=costs)
  asked = [
    (question, text)
    for question, row in zip(answers.questions, answers.texts, strict=True)
    for text in row
  ]
  completions = model_port.answer_all(
    generator.engine,
    [scorer.request(*_sampled(question, text)) for question, text in asked],
  )
  found = [scorer.read(completion) for (completion,) in completions]
  return np.reshape(found, answers.pool.is_right_QN.shape)


def _sampled(
  question: str, text: str
) -> tuple[samples_lib.Question, samples_lib.Sample]:
  """Returns what a scorer reads of an answer that was sampled before."""
  request = requests_lib.Request(
    prompt_ids=(), settings=settings_lib.Settings()
  )
  return samples_lib.Question(request=request, prompt=question), (
    samples_lib.Sample(
      number=0,
      tag=None,
      parts=(),
      ids=(),
      forced=frozenset(),
      text=text,
      reading=samples_lib.plain(text, (), 0),
      logprobs=None,
    )
  )
