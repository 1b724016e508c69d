"""A reward model: which of two solutions of a problem is right, from pairs.

    python train.py --config=experiments/problems.py:base --workdir=runs/base
    python train.py --config=experiments/reward.py --workdir=runs/reward
    python -m data.problems --out=pairs.jsonl --kind=pairs --split=test \
      --difficulties=1,2 --families=sums,products,words
    python -m inference.rewards --model=runs/reward/frozen \
      --input=answers.jsonl --out=scored.jsonl

Ouyang et al. 2022 (arXiv:2203.02155), equation 1. The variant is a frozen
directory to start from; without one, runs/base/frozen. A directory with a chat
template keeps it with --config.data.chat_template=. The rejected solution of a
pair has a wrong operation, or a wrong answer without work: difficulties 1 and 2
of data/problems/. Minutes on two CPU cores. `accuracy` is the share of held-out
pairs whose right solution has the larger reward; LOG.md has it, with its error.
"""

import dataclasses

from experiments import presets, problems
from training import experiment
from training.checkpoints import init_from
from training.objectives import reward
from training.optimizer import chain


def get_config(directory: str = '') -> experiment.Experiment:
  """Returns the experiment that starts from a frozen directory."""
  sft = problems.get_config(f'sft:{directory or problems.BASE}')
  return dataclasses.replace(
    sft,
    name='reward',
    model=init_from.model_of(directory) if directory else sft.model,
    data=dataclasses.replace(
      sft.data,
      path=(
        'kind=pairs&count=8000&levels=1,2,3&difficulties=1,2'
        '&families=sums,products,words'
      ),
      examples='pairs',
      chat_template=presets.QUESTION_TEMPLATE,
    ),
    # Keeps rewards near 0, so that a policy need not learn a constant.
    objective=reward.Reward(centring=0.01),
    optimizer=chain.OptimizerConfig(
      peak_lr=3e-4, end_lr=0.0, schedule='linear', warmup_steps=20
    ),
    num_steps=200,
    eval_every_steps=100,
  )
