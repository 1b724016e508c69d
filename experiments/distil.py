"""Distillation of two-digit additions: a student a quarter of its teacher.

    python -m studies.distillation --workdir=runs/distil    # all of them
    python train.py --config=experiments/distil.py:teacher \
      --workdir=runs/distil/teacher
    python train.py --config=experiments/distil.py:alone \
      --workdir=runs/distil/alone

The teacher reads 6,000 problems with their solutions (data/problems/), the
student 300 of them. The variants differ in the student's further sources:

    alone       the texts of 300 problems
    forward, reverse, jensen_shannon
                the same texts, and the teacher's distribution of each token
    answers     the teacher's answers to 6,000 questions (Kim & Rush 2016,
                arXiv:1606.07947): no teacher while it trains
    begun       the same, in 150 steps
    off_policy  these answers, and the teacher's distribution of each token
    on_policy   the student's own answers to these questions, and the teacher's
                distribution of each token (Agarwal et al. 2023,
                arXiv:2306.13649)

`answers` and `begun` continue from `alone`, the last two from `begun`: from the
answers of a student that cannot add yet, it learns little. A directory may
follow a variant, as on_policy:runs/distil; it holds the workdirs teacher/,
alone/ and begun/, and answers.jsonl, which `python -m studies.answers` writes.
All are measured on questions of the validation split, which shares no problem
with the others.

Of the gap in accuracy between `alone` (3 %) and the teacher (98 %), `answers`
closes 100 %, `off_policy` 101 % and `on_policy` 99 % (seed 0; the goal was
half): LOG.md.
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
TEACHER, ALONE, ANSWERS, BEGUN = 'teacher', 'alone', 'answers', 'begun'
OFF_POLICY, ON_POLICY = 'off_policy', 'on_policy'
ANSWERS_FILE = 'answers.jsonl'
# In the order in which one needs the other.
VARIANTS = (
  TEACHER,
  ALONE,
  *distillation.DIVERGENCES,
  ANSWERS,
  BEGUN,
  OFF_POLICY,
  ON_POLICY,
)
MAX_TOKENS = grpo.MAX_TOKENS
_ADDITIONS = 'families=additions&levels=2'
QUESTIONS = f'{_ADDITIONS}&count=6000'  # that the teacher answers
HELD_OUT = f'kind=questions&{_ADDITIONS}'
_STUDENT_READS = f'kind=chat&{_ADDITIONS}&count=300'
_ANSWERS_PER_STEP = 128  # of the policy
_BEGUN_STEPS = 150  # after 300 the student is right in 86 %


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
    found = grpo.get_config('skilled')
  elif kind in (ANSWERS, BEGUN, OFF_POLICY):
    found = _taught_by_answers(kind, directory)
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
  skilled = grpo.get_config('skilled')
  return dataclasses.replace(
    skilled,
    model=grpo.small_model(),
    data=dataclasses.replace(skilled.data, path=_STUDENT_READS),
    num_steps=400,
    eval_every_steps=0,
  )


def _further(start: str, directory: str) -> experiment.Experiment:
  """Returns the experiment of a student that continues from a variant."""
  student = _student()
  frozen = f'{directory}/{start}/frozen'
  return dataclasses.replace(
    student,
    init_from=frozen,
    data=dataclasses.replace(
      student.data,
      chat_template='',  # that of the frozen directory
      tokenizer=init_from.tokenizer_of(frozen),
    ),
    num_steps=800,
  )


def _taught_by_answers(kind: str, directory: str) -> experiment.Experiment:
  student = _further(BEGUN if kind == OFF_POLICY else ALONE, directory)
  if kind == BEGUN:
    student = dataclasses.replace(student, num_steps=_BEGUN_STEPS)
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
  student = _further(BEGUN, directory)
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
