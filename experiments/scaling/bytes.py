"""An IsoFLOP grid of tiny byte models: the best model size for each budget.

    python -m studies.scaling.isoflop --config=experiments/scaling/bytes.py \
      --workdir=runs/isoflop --figure=runs/isoflop.svg

Models of three layers and several widths are trained with several budgets of
6 N D FLOPs each (approach 2 of Hoffmann et al., arXiv:2203.15556). N counts all
parameters: embeddings are tied, so that each of them multiplies a token, and
leaving them out would bend the power law of such small models (Pearce and Song,
arXiv:2406.12907). One run of constant learning rate per width is branched at
80 % of each length and decayed (Haegele et al., arXiv:2405.18392). muP gives
all widths one learning rate. One run alone:

    python train.py --config=experiments/scaling/bytes.py:64 --workdir=...

The text is the quickstart's, as bytes, or the text of --path. The evaluated
rows are the same for all models, so that their noise affects all losses
equally.
"""

import dataclasses

from data import data_config, sources
from experiments import presets
from training import experiment
from training.optimizer import chain, update_rules

VOCAB_SIZE = 259  # 256 bytes and three special ids
LENGTH = 128
BATCH_SIZE = 4
HEAD_WIDTH = 8
# The grid. From one width to the next, parameters grow 1.4 to 2 times.
SIZES = (16, 24, 32, 40, 48, 64, 80)
BUDGETS = (1.5e11, 3e11, 6e11, 1.2e12, 2.4e12)  # FLOPs, 6 N D
# Range of tokens per parameter; other runs would be far from the optimum, which
# is near 90 bytes per parameter at 4e10 FLOPs.
RATIOS = (4, 600)
DECAY_SHARE = 0.2  # of the steps, as in arXiv:2405.18392


def get_config(variant: str = '64') -> experiment.Experiment:
  """Returns the run of a width, a multiple of 8, with constant rate."""
  if not variant.isdigit() or not int(variant) or int(variant) % HEAD_WIDTH:
    raise ValueError(
      f'variant: got {variant!r}, expected a width, a multiple of {HEAD_WIDTH},'
      ' as 64'
    )
  width = int(variant)
  return experiment.Experiment(
    name=f'isoflop_bytes_{width}',
    model=dataclasses.replace(
      presets.llama(
        vocab_size=VOCAB_SIZE,
        num_layers=3,
        num_heads=width // HEAD_WIDTH,
        num_kv_heads=width // HEAD_WIDTH,
        width=width,
        mlp_width=width * 8 // 3 // 8 * 8,
        length=LENGTH,
      ),
      tie_embeddings=True,
      mup_base_width=64,
      scan_layers=False,
    ),
    data=data_config.DataConfig(
      open_source=sources.python_stdlib,
      row_length=LENGTH,
      batch_size=BATCH_SIZE,
      tokenizer=data_config.TokenizerConfig(kind='byte'),
      contamination_ngram=0,
    ),
    optimizer=chain.OptimizerConfig(
      rule=update_rules.AdamW(beta1=0.9, beta2=0.95),
      peak_lr=2**-7,
      schedule='constant',
      warmup_steps=30,
      weight_decay=0.0,
    ),
    freeze=experiment.FreezeConfig(enabled=False),
    checkpoint=experiment.CheckpointConfig(every_steps=1000, keep_best=0),
    num_steps=1000,
    log_every_steps=50,
    eval_every_steps=0,
    eval_batches=200,
  )
