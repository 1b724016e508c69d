"""Pretraining on a mix of two sources, with a batch that grows.

    python train.py --config=experiments/pretrain_mixture.py \
      --workdir=runs/mixture --config.data.path='prose/{split}.jsonl' \
      --config.data.sources[0].path='code/{split}.jsonl' \
      --config.data.sources[1].path='prose/{split}.jsonl'

Three of four rows are code, one is prose. The run is evaluated on `data.path`.
If it is resumed with --config.data.sources[0].weight=1, both sources have equal
shares from that step on, and the manifest of the frozen directory records both
phases. The run prints how often each source was trained, and how much of the
evaluation text each source contains. Packing splits as few documents as
possible. The average of the weights is evaluated beside the weights, and is
frozen. The model is the same as in `experiments/pretrain_files.py`.
"""

import dataclasses

from data import data_config, sources
from experiments import pretrain_files
from training import experiment


def get_config() -> experiment.Experiment:
  """Returns the experiment; paths are given by flags."""
  alone = pretrain_files.get_config('jsonl')
  mixed = tuple(
    data_config.SourceConfig(
      open_source=sources.jsonl, name=name, weight=weight
    )
    for name, weight in (('code', 3.0), ('prose', 1.0))
  )
  return dataclasses.replace(
    alone,
    name='pretrain_mixture',
    data=dataclasses.replace(
      alone.data,
      sources=mixed,
      batch_ramp=(
        (0, alone.data.batch_size // 2),
        (100, alone.data.batch_size),
      ),
      packing='best_fit',
    ),
    ema_decay=0.99,
  )
