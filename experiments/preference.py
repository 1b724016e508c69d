"""Direct preference optimisation on pairs of solutions, in minutes on a CPU.

    python train.py --config=experiments/problems.py --workdir=runs/problems
    python train.py --config=experiments/preference.py:dpo --workdir=runs/dpo
    python train.py --config=experiments/preference.py:kto:runs/mine/frozen ...

The variants are dpo, ipo, kto, orpo, simpo and cpo, and a frozen directory
after a second colon; without one, runs/problems/frozen. The chosen solution of a
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

from data import data_config
from experiments import problems
from training import experiment
from training.objectives import preference
from training.optimizer import chain

METHODS = ('dpo', 'ipo', 'kto', 'orpo', 'simpo', 'cpo')
BASE = 'runs/problems/frozen'


def get_config(variant: str = 'dpo') -> experiment.Experiment:
  """Returns the experiment METHOD or METHOD:DIRECTORY."""
  method, _, directory = variant.partition(':')
  if method not in METHODS:
    raise ValueError(
      f'variant: got {variant!r}, expected one of {", ".join(METHODS)}, or one'
      ' with a frozen directory, as dpo:runs/problems/frozen'
    )
  base = problems.get_config()
  kind = 'labelled' if method == 'kto' else 'pairs'
  return dataclasses.replace(
    base,
    name=f'preference_{method}',
    init_from=directory or BASE,
    data=dataclasses.replace(
      base.data,
      path=f'kind={kind}&count=4000&seed=1&{problems.PROBLEMS}',
      examples=kind,
      chat_template='',  # that of the frozen directory
      row_length=problems.LENGTH,
      tokenizer=data_config.TokenizerConfig(
        kind='directory', path=f'{directory or BASE}/tokenizer'
      ),
    ),
    objective=preference.Preference(loss=method),
    optimizer=chain.OptimizerConfig(peak_lr=1e-4, end_lr=1e-5, warmup_steps=10),
    num_steps=150,
    log_every_steps=10,
    eval_at_start=True,
  )
