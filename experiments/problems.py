"""A small model learns to solve problems: pretraining, then fine-tuning.

    python train.py --config=experiments/problems.py:base --workdir=runs/base
    python train.py --config=experiments/problems.py:sft --workdir=runs/sft
    python train.py --config=experiments/problems.py:sft --audit   # what trains
    python serve.py --model=runs/sft/frozen --chat

Both take minutes on two CPU cores. `base` learns the text of problems of five
families, with their worked solutions (data/problems/). `sft` continues from it
with conversations about harder problems: the answers are trained, and the
questions are only read. Another frozen directory may follow a second colon, as
`sft:runs/mine/frozen`. The problems of the validation split are in no training
split. `experiments/preference.py` continues from runs/sft/frozen. LOG.md has
the measured figures.
"""

import dataclasses

from data import data_config, sources
from experiments import presets
from training import experiment
from training.checkpoints import init_from
from training.optimizer import chain

VOCAB_SIZE = 1024
LENGTH = 256
BASE = 'runs/base/frozen'
_FAMILIES = 'families=sums,products,words,comparisons,sorting'
PRETRAINED = f'levels=1,2,3&{_FAMILIES}'
TUNED = f'levels=4&{_FAMILIES}'


def get_config(variant: str = 'base') -> experiment.Experiment:
  """Returns the experiment `base`, `sft` or `sft:DIRECTORY`."""
  kind, _, directory = variant.partition(':')
  if kind not in ('base', 'sft'):
    raise ValueError(
      f'variant: got {variant!r}, expected base, sft, or sft:DIRECTORY with a'
      ' frozen directory'
    )
  base = _base()
  if kind == 'base':
    return base
  return dataclasses.replace(
    base,
    name='problems_sft',
    init_from=directory or BASE,
    data=dataclasses.replace(
      base.data,
      path=f'kind=chat&count=8000&{TUNED}',
      examples='chat',
      chat_template=presets.QUESTION_TEMPLATE,
      tokenizer=init_from.tokenizer_of(directory or BASE),
    ),
    optimizer=chain.OptimizerConfig(
      peak_lr=5e-4,
      end_lr=0.0,
      schedule='linear',
      warmup_steps=10,
      weight_decay=0.0,
    ),
    freeze=experiment.FreezeConfig(temperature=0.0),
    num_steps=200,
    eval_at_start=True,
  )


def _base() -> experiment.Experiment:
  return experiment.Experiment(
    name='problems_base',
    # Wide and shallow, so that the adapters of lora_against_full.py have a
    # small share of the parameters.
    model=dataclasses.replace(
      presets.llama(
        vocab_size=VOCAB_SIZE,
        num_layers=2,
        num_heads=8,
        num_kv_heads=8,
        width=512,
        mlp_width=1376,
        length=LENGTH,
      ),
      tie_embeddings=True,
      scan_layers=False,  # two layers compile quickly, and run faster
    ),
    data=data_config.DataConfig(
      open_source=sources.problems,
      path=f'kind=text&count=20000&{PRETRAINED}',
      row_length=LENGTH,
      batch_size=8,
      packing='first_fit',
      tokenizer=data_config.TokenizerConfig(kind='bpe', vocab_size=VOCAB_SIZE),
    ),
    optimizer=chain.OptimizerConfig(peak_lr=1e-3, end_lr=0.0, warmup_steps=50),
    num_steps=400,
    log_every_steps=20,
    eval_every_steps=0,
  )
