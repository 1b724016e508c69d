"""Pretraining on a mixture of two sources, with a batch that grows.

    python train.py --config=experiments/pretrain_mixture.py \
      --workdir=runs/mixture --config.data.path='prose/{split}.jsonl' \
      --config.data.sources[0].path='code/{split}.jsonl' \
      --config.data.sources[1].path='prose/{split}.jsonl'

Three rows in four are code, one is prose; `data.path` is what is evaluated on.
Started again with --config.data.sources[0].weight=1, the run goes on with equal
shares from that step, and the manifest of what is frozen tells of both. How
often each source was trained is printed, and so is how much of the evaluation
text they contain. Packing cuts as few documents as it can; the average of the
weights is evaluated beside them, and frozen.
"""

from data import config as data_config, sources
from experiments import presets
from training import config as config_lib, optimizer

VOCAB_SIZE = 4096
LENGTH = 512


def get_config() -> config_lib.Experiment:
  """Returns the experiment; paths are given by flags."""
  return config_lib.Experiment(
    name='pretrain_mixture',
    model=presets.llama(
      vocab_size=VOCAB_SIZE,
      num_layers=6,
      num_heads=4,
      num_kv_heads=2,
      width=256,
      mlp_width=704,
      length=LENGTH,
    ),
    data=data_config.DataConfig(
      open_source=sources.jsonl,
      sources=(
        data_config.SourceConfig(
          open_source=sources.jsonl, name='code', weight=3.0
        ),
        data_config.SourceConfig(
          open_source=sources.jsonl, name='prose', weight=1.0
        ),
      ),
      row_length=LENGTH,
      batch_size=16,
      batch_ramp=((0, 8), (100, 16)),
      packing='best_fit',
      tokenizer=data_config.TokenizerConfig(kind='bpe', vocab_size=VOCAB_SIZE),
    ),
    optimizer=optimizer.OptimizerConfig(
      peak_lr=2e-3, end_lr=0.0, schedule='wsd', decay_steps=100
    ),
    ema_decay=0.99,
    num_steps=500,
  )
