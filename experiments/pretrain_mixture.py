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
weights is evaluated beside them, and frozen. The model is that of
`experiments/pretrain_files.py`.
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
