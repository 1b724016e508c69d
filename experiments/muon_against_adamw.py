"""Muon against AdamW at equal steps, on the data and model of the quickstart.

    E=experiments/muon_against_adamw.py
    python -m studies.compare $E:adamw $E:muon \
      --seeds=5 --workdir=runs/compared --figure=runs/muon.svg
    python train.py --config=$E:muon --workdir=...   # one side alone

Muon (Jordan et al. 2024, https://kellerjordan.github.io/posts/muon;
at scale: Liu et al., arXiv:2502.16982) orthogonalises the update of every
matrix of the layers; AdamW updates embeddings and norms. Both sides train on
the same batches from the same initial weights. LOG.md says how the learning
rates were chosen, and the measured difference with its interval. Expected: Muon
is ahead at equal steps, as in its papers. Cost: about two minutes per run on
two CPU cores, ten runs.
"""

import dataclasses

from experiments import quickstart
from training import experiment
from training.optimizer import chain, update_rules

NUM_STEPS = 250  # of 2,048 tokens


def get_config(variant: str = 'adamw') -> experiment.Experiment:
  """Returns one side of the comparison, `adamw` or `muon`."""
  if variant == 'adamw':
    chosen = chain.OptimizerConfig(peak_lr=2e-3)
  elif variant == 'muon':
    chosen = chain.OptimizerConfig(
      rule=update_rules.Muon(adam_peak_lr=2e-3), peak_lr=2e-2
    )
  else:
    raise ValueError(f'variant: got {variant!r}, expected adamw or muon')
  return dataclasses.replace(
    quickstart.get_config(),
    name=f'equal_steps_{variant}',
    optimizer=dataclasses.replace(chosen, end_lr=0.0, warmup_steps=50),
    checkpoint=experiment.CheckpointConfig(every_steps=NUM_STEPS),
    freeze=experiment.FreezeConfig(enabled=False),
    num_steps=NUM_STEPS,
    eval_batches=64,
  )
