"""Direct preference optimisation on pairs of solutions, in minutes on a CPU.

    python train.py --config=experiments/problems.py:base --workdir=runs/base
    python train.py --config=experiments/problems.py:sft --workdir=runs/sft
    python train.py --config=experiments/preference.py:dpo --workdir=runs/dpo
    python train.py --config=experiments/preference.py:kto:runs/mine/frozen ...

The variants are dpo, ipo, kto, orpo, simpo and cpo, and a frozen directory
after a second colon; without one, runs/sft/frozen. The chosen solution of a
pair is right. The rejected one has one wrong step, from which its answer
follows. For kto, solutions are labelled one by one. The references:

    dpo    Rafailov et al. 2023, arXiv:2305.18290
    ipo    Azar et al. 2023, arXiv:2310.12036
    kto    Ethayarajh et al. 2024, arXiv:2402.01306
    orpo   Hong et al. 2024, arXiv:2403.07691
    simpo  Meng et al. 2024, arXiv:2405.14734
    cpo    Xu et al. 2024, arXiv:2401.08417

Expected: `accuracy`, the share of pairs whose chosen solution has the higher
reward, rises above its start on validation pairs. LOG.md has the measured
figures.
"""

import dataclasses

from experiments import problems
from training import experiment
from training.objectives import preference

METHODS = ('dpo', 'ipo', 'kto', 'orpo', 'simpo', 'cpo')
BASE = 'runs/sft/frozen'


def get_config(variant: str = 'dpo') -> experiment.Experiment:
  """Returns the experiment METHOD or METHOD:DIRECTORY."""
  method, _, directory = variant.partition(':')
  if method not in METHODS:
    raise ValueError(
      f'variant: got {variant!r}, expected one of {", ".join(METHODS)}, or one'
      ' with a frozen directory, as dpo:runs/sft/frozen'
    )
  sft = problems.get_config(f'sft:{directory or BASE}')
  kind = 'labelled' if method == 'kto' else 'pairs'
  return dataclasses.replace(
    sft,
    name=f'preference_{method}',
    data=dataclasses.replace(
      sft.data,
      path=f'kind={kind}&count=4000&seed=1&{problems.TUNED}',
      examples=kind,
      chat_template='',  # the template of the frozen directory
    ),
    objective=preference.Preference(loss=method),
    optimizer=dataclasses.replace(sft.optimizer, peak_lr=5e-5),
    num_steps=150,
    log_every_steps=10,
  )
