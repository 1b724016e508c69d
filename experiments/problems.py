"""Supervised fine-tuning on worked solutions, in minutes on two CPU cores.

    python train.py --config=experiments/problems.py --workdir=runs/problems
    python serve.py --model=runs/problems/frozen --chat
    python train.py --config=experiments/problems.py --audit    # which tokens train

A small model learns, from random weights, to answer small problems step by step
(data/problems/). The loss is that of the answers: the questions are read, and
not trained. The problems of the validation split are in no training split.
`experiments/preference.py` goes on from the result. LOG.md has the measured
figures.
"""

import dataclasses

from data import data_config, sources
from experiments import presets
from training import experiment
from training.optimizer import chain, update_rules

VOCAB_SIZE = 1024
LENGTH = 256
PROBLEMS = 'levels=1,2&families=sums,words,comparisons,sorting'


def get_config() -> experiment.Experiment:
  """Returns the experiment."""
  return experiment.Experiment(
    name='problems',
    model=dataclasses.replace(
      presets.llama(
        vocab_size=VOCAB_SIZE,
        num_layers=4,
        num_heads=6,
        num_kv_heads=3,
        width=192,
        mlp_width=512,
        length=LENGTH,
      ),
      tie_embeddings=True,
      scan_layers=False,  # four layers compile quickly, and run faster
    ),
    data=data_config.DataConfig(
      open_source=sources.problems,
      path=f'kind=chat&count=20000&{PROBLEMS}',
      examples='chat',
      chat_template=presets.QUESTION_TEMPLATE,
      row_length=LENGTH,
      batch_size=8,
      packing='first_fit',
      tokenizer=data_config.TokenizerConfig(kind='bpe', vocab_size=VOCAB_SIZE),
    ),
    optimizer=chain.OptimizerConfig(
      rule=update_rules.Muon(),
      peak_lr=2e-2,
      end_lr=0.0,
      schedule='linear',
      warmup_steps=50,
      weight_decay=0.1,
    ),
    freeze=experiment.FreezeConfig(temperature=0.0),
    num_steps=500,
    log_every_steps=25,
    eval_every_steps=0,
  )
