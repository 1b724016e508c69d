"""The whole life of a small model, stage by stage, on two-digit additions.

    make lifecycle
    python train.py --config=experiments/lifecycle.py:base --workdir=runs/base
    python train.py --config=experiments/lifecycle.py:sft:runs/base/frozen ...

A variant is STAGE:DIRECTORY, with the frozen directory of the stage before, see
`PARENTS`. `python -m studies.lifecycle`, which `make lifecycle` runs, trains
all stages and prints one table.

    base    learns the text of additions
    sft     learns to answer questions, from conversations
    reward  learns which of two answers is right
    dpo     prefers right answers to wrong ones, from the pairs of `reward`
    grpo    samples answers, and makes right answers more likely
    distil  a student a quarter of that size learns the answers of grpo's model
            to more questions, which `python -m studies.lifecycle` writes beside
            the frozen directory of grpo

All stages read the training split of data/problems/, and are measured on
questions of its validation split. The two splits share no problem.
"""

import dataclasses
import os
import pathlib

from data import data_config, sources
from experiments import grpo
from training import experiment
from training.checkpoints import init_from
from training.objectives import preference, reward
from training.optimizer import chain

# The stage that each stage continues from; '': it begins with random weights.
PARENTS = {
  'base': '',
  'sft': 'base',
  'reward': 'sft',
  'dpo': 'sft',
  'grpo': 'sft',
  'distil': 'grpo',
}
_ADDITIONS = 'families=additions&levels=2'
QUESTIONS = f'kind=questions&{_ADDITIONS}'
TAUGHT = f'{_ADDITIONS}&count=6000'  # the questions that a teacher answers
MAX_TOKENS = grpo.MAX_TOKENS
_PAIR_LENGTH = 2 * grpo.LENGTH  # a row has both answers


def get_config(variant: str = 'base') -> experiment.Experiment:
  """Returns the experiment `base` or STAGE:DIRECTORY."""
  stage, _, directory = variant.partition(':')
  if stage not in PARENTS or bool(directory) != bool(PARENTS[stage]):
    raise ValueError(
      f'variant: got {variant!r}, expected base, or one of'
      f' {", ".join(list(PARENTS)[1:])} with the frozen directory of the stage'
      ' before, as sft:runs/base/frozen'
    )
  found = {
    'base': _base,
    'sft': _sft,
    'reward': _reward,
    'dpo': _dpo,
    'grpo': _grpo,
    'distil': _distil,
  }[stage](directory)
  return dataclasses.replace(found, name=f'lifecycle_{stage}')


def _started() -> experiment.Experiment:
  """Returns the experiment that all stages but `distil` vary."""
  sft = grpo.get_config('sft')
  return dataclasses.replace(
    sft, model=dataclasses.replace(sft.model, max_length=_PAIR_LENGTH)
  )


def _base(directory: str) -> experiment.Experiment:
  del directory
  sft = _started()
  return dataclasses.replace(
    sft,
    data=dataclasses.replace(
      sft.data,
      path=f'kind=text&{_ADDITIONS}&count=3000',
      examples='text',
      chat_template='',
    ),
    optimizer=chain.OptimizerConfig(peak_lr=2e-3, end_lr=0.0, warmup_steps=20),
    num_steps=400,
  )


def _sft(directory: str) -> experiment.Experiment:
  sft = _started()
  return dataclasses.replace(
    sft,
    init_from=directory,
    data=dataclasses.replace(
      sft.data,
      path=f'kind=chat&{_ADDITIONS}&count=3000',
      tokenizer=init_from.tokenizer_of(directory),
    ),
    num_steps=600,
  )


def _pairs(directory: str) -> experiment.Experiment:
  sft = _sft(directory)
  return dataclasses.replace(
    sft,
    data=dataclasses.replace(
      sft.data,
      path=f'kind=pairs&{_ADDITIONS}&count=3000&seed=1',
      examples='pairs',
      chat_template='',  # the template of the frozen directory
      row_length=_PAIR_LENGTH,
      batch_size=16,
    ),
    num_steps=150,
  )


def _reward(directory: str) -> experiment.Experiment:
  pairs = _pairs(directory)
  return dataclasses.replace(
    pairs,
    # Keeps rewards near 0, so that a policy need not learn a constant.
    objective=reward.Reward(centring=0.01),
    optimizer=dataclasses.replace(pairs.optimizer, peak_lr=5e-4),
    num_steps=300,
  )


def _dpo(directory: str) -> experiment.Experiment:
  pairs = _pairs(directory)
  return dataclasses.replace(
    pairs,
    objective=preference.Preference(loss='dpo'),
    optimizer=dataclasses.replace(pairs.optimizer, peak_lr=1e-5),
  )


def _grpo(directory: str) -> experiment.Experiment:
  found = grpo.get_config(f'grpo:{directory}')
  return dataclasses.replace(
    found,
    model=_started().model,
    optimizer=dataclasses.replace(found.optimizer, peak_lr=1e-4),
    num_steps=120,
    eval_every_steps=40,
  )


def _distil(directory: str) -> experiment.Experiment:
  sft = grpo.get_config('sft')
  return dataclasses.replace(
    sft,
    model=grpo.small_model(),
    data=dataclasses.replace(
      sft.data,
      # `path` is the path of the evaluation only.
      sources=(
        data_config.SourceConfig(
          open_source=sources.jsonl,
          path=str(answers_file(directory)),
          split='all',
        ),
      ),
    ),
    optimizer=dataclasses.replace(sft.optimizer, peak_lr=4e-3),
    num_steps=1200,
  )


def answers_file(directory: str | os.PathLike[str]) -> pathlib.Path:
  """Returns the file of a teacher's answers, from its frozen directory."""
  return pathlib.Path(directory).parent / 'answers.jsonl'
