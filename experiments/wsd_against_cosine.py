"""Warm-up, stable, decay (WSD) against a cosine schedule, at equal tokens.

    E=experiments/wsd_against_cosine.py
    python -m studies.compare $E:cosine $E:wsd \
      --seeds=5 --workdir=runs/compared --figure=runs/wsd.svg
    python train.py --config=$E:wsd --workdir=...   # one side alone

The schedule of MiniCPM (Hu et al., arXiv:2404.06395) keeps the learning rate
constant and decays it over the last fifth. So a run can be made longer without
having been planned longer. The claim: this costs nothing against a cosine over
the same tokens (also Haegele et al., arXiv:2405.18392). Model, data, batches,
initial weights and peak learning rate are the same as in the AdamW side of
`experiments/muon_against_adamw.py`; its runs are reused if they exist. LOG.md
has the measured difference with its interval: WSD is ahead in so short a run.
Cost: about two minutes per run on two CPU cores, ten runs.
"""

import dataclasses

from experiments import muon_against_adamw
from training import experiment as experiment_lib

DECAY_SHARE = 0.2  # of all steps, as in both papers


def get_config(variant: str = 'cosine') -> experiment_lib.Experiment:
  """Returns one side of the comparison, `cosine` or `wsd`."""
  if variant not in ('cosine', 'wsd'):
    raise ValueError(f'variant: got {variant!r}, expected cosine or wsd')
  # These are the runs of AdamW with a cosine that Muon is compared with.
  experiment = muon_against_adamw.get_config('adamw')
  if variant == 'wsd':
    experiment.name = 'equal_steps_wsd'
    experiment.optimizer = dataclasses.replace(
      experiment.optimizer,
      schedule='wsd',
      decay_steps=int(DECAY_SHARE * experiment.num_steps),
    )
  return experiment
