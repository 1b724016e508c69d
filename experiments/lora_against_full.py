"""LoRA against full fine-tuning of a small model, by learning rate.

    E=experiments/lora_against_full.py
    python -m benchmarks.studies.lora_rates --workdir=runs/lora \
      --figure=runs/lora.svg
    python train.py --config=$E:base --workdir=runs/lora/base      # one alone
    python train.py --config=$E:rank-8:runs/lora/base/frozen --workdir=runs/r8

Hu et al. 2021 (arXiv:2106.09685) train two thin matrices beside each kernel.
Schulman et al. 2025 (LoRA Without Regret, thinkingmachines.ai/blog/lora) find
that this reaches the loss of full fine-tuning, and that its best learning rate
is about ten times as high. Here: a base of width 512 learns problems of five
families; all of its weights, or adapters of RANK in every linear layer, then
learn three families that it has not seen. Expected: at rank 8 the loss is
within 2 % of that of full fine-tuning, with 3 % of the parameters. LOG.md has
the measured result. Cost: about half an hour on two CPU cores.
"""

import dataclasses

from data import data_config, sources
from experiments import presets
from models import adapter_config
from training import experiment
from training.optimizer import chain

VOCAB_SIZE = 1024
LENGTH = 256
BASE = 'runs/lora/base/frozen'


def get_config(variant: str = 'rank-8') -> experiment.Experiment:
  """Returns `base`, or `full` or `rank-RANK` with an optional :DIRECTORY."""
  kind, _, directory = variant.partition(':')
  word, _, rank = kind.partition('-')
  if kind not in ('base', 'full') and not (word == 'rank' and rank.isdigit()):
    raise ValueError(
      f'variant: got {variant!r}, expected base, full or rank-RANK, the last'
      ' two with an optional frozen directory, as rank-8:runs/base/frozen'
    )
  if kind == 'base':
    return _base()
  tokenizer = f'{directory or BASE}/tokenizer'
  base = _base()
  return dataclasses.replace(
    base,
    name=f'lora_against_full_{kind}',
    init_from=directory or BASE,
    adapter=adapter_config.AdapterConfig(rank=int(rank or 0)),
    data=dataclasses.replace(
      base.data,
      path='kind=chat&count=8000&levels=1,2,3&families=modular,fractions,logic',
      examples='chat',
      chat_template=presets.QUESTION_TEMPLATE,
      tokenizer=data_config.TokenizerConfig(kind='directory', path=tokenizer),
    ),
    # The learning rate is what the study varies.
    optimizer=chain.OptimizerConfig(
      peak_lr=4e-3 if rank else 4e-4,
      end_lr=0.0,
      schedule='linear',
      warmup_steps=10,
      weight_decay=0.0,
    ),
    freeze=experiment.FreezeConfig(enabled=False),
    num_steps=120,
    eval_batches=24,
  )


def _base() -> experiment.Experiment:
  """Returns the experiment that the others go on from."""
  return experiment.Experiment(
    name='lora_against_full_base',
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
      scan_layers=False,
    ),
    data=data_config.DataConfig(
      open_source=sources.problems,
      path='kind=text&count=20000&levels=1,2,3'
      '&families=sums,products,words,comparisons,sorting',
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
