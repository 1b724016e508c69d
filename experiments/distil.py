"""Distillation of two-digit additions: a student a quarter of its teacher.

    python -m studies.distillation --workdir=runs/distil    # all of them
    python train.py --config=experiments/distil.py:teacher \
      --workdir=runs/distil/teacher
    python train.py --config=experiments/distil.py:alone \
      --workdir=runs/distil/alone

The teacher reads 3,000 problems with their solutions (data/problems/), the
student 300 of them. The variants differ in the student's further sources:

    alone       the texts of 300 problems
    forward, reverse, jensen_shannon
                the same texts, and the teacher's distribution of each token
    answers     the teacher's answers to 6,000 questions (Kim & Rush 2016,
                arXiv:1606.07947): no teacher while it trains
    off_policy  these answers, and the teacher's distribution of each token
    on_policy   the student's own answers to these questions, and the teacher's
                distribution of each token (Agarwal et al. 2023,
                arXiv:2306.13649)

The last three continue from `alone`. A directory may follow a variant, as
on_policy:runs/distil; it holds the workdirs teacher/ and alone/, and
answers.jsonl, which `python -m studies.answers` writes. All are measured on
questions of the validation split, which shares no problem with the others.

`answers` closes 96 % of the gap in accuracy between `alone` and the teacher
(seed 0; the goal was half), `off_policy` 31 % and `on_policy` 4 %: LOG.md.
"""

import dataclasses

from data import data_config, sources
from evals.verifiers import texts
from experiments import grpo
from training import experiment
from training.checkpoints import init_from
from training.objectives import distillation
from training.rollouts import rewards, rollout_config

DIRECTORY = 'runs/distil'
TEACHER, ALONE, ANSWERS = 'teacher', 'alone', 'answers'
OFF_POLICY, ON_POLICY = 'off_policy', 'on_policy'
ANSWERS_FILE = 'answers.jsonl'
# In the order in which one needs the other.
VARIANTS = (
  TEACHER,
  ALONE,
  *distillation.DIVERGENCES,
  ANSWERS,
  OFF_POLICY,
  ON_POLICY,
)
MAX_TOKENS = grpo.MAX_TOKENS
_ADDITIONS = 'families=additions&levels=2'
QUESTIONS = f'{_ADDITIONS}&count=6000'  # that the teacher answers
HELD_OUT = f'kind=questions&{_ADDITIONS}'
_STUDENT_READS = f'kind=chat&{_ADDITIONS}&count=300'
_ANSWERS_PER_STEP = 128  # of the policy


def get_config(variant: str = 'forward') -> experiment.Experiment:
  """Returns the experiment VARIANT or VARIANT:DIRECTORY."""
  kind, _, directory = variant.partition(':')
  directory = directory or DIRECTORY
  if kind not in VARIANTS:
    raise ValueError(
      f'variant: got {variant!r}, expected one of {", ".join(VARIANTS)}; the'
      ' directory of their workdirs may follow, as on_policy:runs/distil'
    )
  if kind == TEACHER:
    found = grpo.get_config('sft')
  elif kind in (OFF_POLICY, ANSWERS):
    found = _taught_by_answers(directory)
  elif kind == ON_POLICY:
    found = _on_policy(directory)
  else:
    found = _student()
  teacher = f'{directory}/{TEACHER}/frozen'
  if kind in distillation.DIVERGENCES:
    divergence = kind
  else:
    divergence = {OFF_POLICY: 'forward', ON_POLICY: 'reverse'}.get(kind, '')
  if divergence:
    objective = distillation.Distillation(
      teacher=teacher, divergence=divergence
    )
    found = dataclasses.replace(found, objective=objective)
  return dataclasses.replace(found, name=f'distil_{kind}')


def _student() -> experiment.Experiment:
  """Returns the experiment of a student with random weights."""
  sft = grpo.get_config('sft')
  return dataclasses.replace(
    sft,
    model=grpo.small_model(),
    data=dataclasses.replace(sft.data, path=_STUDENT_READS),
    optimizer=dataclasses.replace(sft.optimizer, peak_lr=4e-3),
    num_steps=400,
    eval_every_steps=0,
  )


def _further(directory: str) -> experiment.Experiment:
  """Returns the experiment of a student that continues from `alone`."""
  student = _student()
  alone = f'{directory}/{ALONE}/frozen'
  return dataclasses.replace(
    student,
    init_from=alone,
    data=dataclasses.replace(
      student.data,
      chat_template='',  # that of the frozen directory
      tokenizer=init_from.tokenizer_of(alone),
    ),
    num_steps=800,
  )


def _taught_by_answers(directory: str) -> experiment.Experiment:
  student = _further(directory)
  return dataclasses.replace(
    student,
    data=dataclasses.replace(
      student.data,
      # `path` is the path of the evaluation only, as for every student.
      sources=(
        data_config.SourceConfig(
          open_source=sources.jsonl,
          path=f'{directory}/{ANSWERS_FILE}',
          split='all',
        ),
      ),
    ),
  )


def _on_policy(directory: str) -> experiment.Experiment:
  student = _further(directory)
  return dataclasses.replace(
    student,
    data=dataclasses.replace(
      student.data,
      path=f'kind=questions&{QUESTIONS}',
      examples='prompts',
      packing='none',
      batch_size=_ANSWERS_PER_STEP,
    ),
    rollouts=rollout_config.RolloutConfig(
      rewards=(
        rollout_config.RewardConfig(
          reward=rewards.Verified(verifier=texts.Number(is_strict=True)),
          name='accuracy',
          weight=0.0,  # measured alone
        ),
      ),
      num_prompts=_ANSWERS_PER_STEP,
      max_tokens=MAX_TOKENS,
    ),
    # As many answers as `off_policy` reads.
    num_steps=300,
    log_every_steps=10,
    eval_every_steps=50,
    eval_at_start=True,
  )
