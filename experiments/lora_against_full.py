"""LoRA against full fine-tuning of a small model, by learning rate.

    python -m studies.lora_rates --workdir=runs/lora \
      --figure=runs/lora.svg
    python train.py --config=experiments/problems.py:base --workdir=runs/base
    python train.py --config=experiments/lora_against_full.py:rank-8 \
      --workdir=runs/rank-8      # one side alone

Hu et al. 2021 (arXiv:2106.09685) train two thin matrices beside each kernel.
Schulman et al. 2025 (LoRA Without Regret, thinkingmachines.ai/blog/lora) find
that this reaches the loss of full fine-tuning, and that its best learning rate
is about ten times as high. The variants are `full` and `rank-RANK`, adapters in
every linear layer. Another frozen directory than runs/base/frozen may follow a
second colon. The question: is the loss at rank 8 within 2 % of the loss of full
fine-tuning, with less than 3 % of the parameters? Here it is not: it is 6.3 %
higher, and the best rate is 5.4 times as high (LOG.md, one seed), because so
small a model learns much that is new. Cost: ten minutes on two CPU cores.
"""

import dataclasses

from experiments import problems
from models import adapter_config
from training import experiment


def get_config(variant: str = 'rank-8') -> experiment.Experiment:
  """Returns `full` or `rank-RANK`, or one of them with :DIRECTORY."""
  kind, _, directory = variant.partition(':')
  word, _, rank = kind.partition('-')
  if kind != 'full' and not (word == 'rank' and rank.isdigit()):
    raise ValueError(
      f'variant: got {variant!r}, expected full or rank-RANK, or one with a'
      ' frozen directory, as rank-8:runs/base/frozen'
    )
  full = problems.get_config(f'sft:{directory}')
  return dataclasses.replace(
    full,
    name=f'lora_against_full_{kind}',
    adapter=adapter_config.AdapterConfig(rank=int(rank or 0)),
    # Near the best rates; the study varies them.
    optimizer=dataclasses.replace(
      full.optimizer, peak_lr=4e-3 if rank else 5e-4
    ),
    freeze=experiment.FreezeConfig(enabled=False),
    num_steps=80,
    eval_batches=12,
    eval_at_start=False,
  )
