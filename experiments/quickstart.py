"""A complete training run in minutes on two CPU cores: a model of Python code.

    make quickstart

It trains on the source code of the interpreter's standard library: real text
that is on every machine. Expected: at most 1.75 bits per byte on its validation
split. LOG.md has the measured figures.
"""

import dataclasses
import sys

from data import data_config, sources
from experiments import presets
from training import experiment
from training.optimizer import chain, update_rules

VOCAB_SIZE = 2048
LENGTH = 256


def get_config() -> experiment.Experiment:
  """Returns the experiment."""
  return experiment.Experiment(
    name='quickstart',
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
      # Four layers still compile quickly unrolled, and then run faster on
      # XLA:CPU.
      scan_layers=False,
    ),
    data=data_config.DataConfig(
      open_source=sources.python_stdlib,
      row_length=LENGTH,
      batch_size=8,
      tokenizer=data_config.TokenizerConfig(kind='bpe', vocab_size=VOCAB_SIZE),
      # The library's text is as old as the interpreter's release.
      knowledge_cutoff=_RELEASE_YEARS.get(sys.version_info[:2], ''),
    ),
    # Muon is ahead of AdamW at equal steps: muon_against_adamw.py.
    optimizer=chain.OptimizerConfig(
      rule=update_rules.Muon(),
      peak_lr=2e-2,
      end_lr=0.0,
      schedule='linear',
      warmup_steps=50,
      weight_decay=0.1,
    ),
    num_steps=600,
    log_every_steps=25,
    eval_every_steps=0,
  )


# Year of the first release, https://devguide.python.org/versions/.
_RELEASE_YEARS = {(3, 11): '2022', (3, 12): '2023', (3, 13): '2024'}
