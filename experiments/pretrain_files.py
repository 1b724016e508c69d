"""Pretraining on your own files: plain text, JSONL, Parquet, or TFDS.

    python train.py --config=experiments/pretrain_files.py:jsonl \
      --workdir=runs/mine --config.data.path='corpus/{split}.jsonl'

`{split}` in the path becomes `train` and `validation`. Variants: text (one
document per file), jsonl, parquet, tfds (the directory of a prepared data set).
`data.text_key` names the field with a document's text. The model is small and
Llama-like; change it with flags. The run prints its parameters and FLOPs before
it starts.
"""

from data import data_config, sources
from experiments import presets
from training import experiment
from training.optimizer import chain

_SOURCES = {
  'text': sources.text_files,
  'jsonl': sources.jsonl,
  'parquet': sources.parquet,
  'tfds': sources.tfds_directory,
}
VOCAB_SIZE = 4096
LENGTH = 512


def get_config(variant: str = 'text') -> experiment.Experiment:
  """Returns the experiment for one kind of file."""
  if variant not in _SOURCES:
    raise ValueError(
      f'variant: got {variant!r}, expected one of {", ".join(_SOURCES)}'
    )
  return experiment.Experiment(
    name=f'pretrain_{variant}',
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
      open_source=_SOURCES[variant],
      row_length=LENGTH,
      batch_size=16,
      tokenizer=data_config.TokenizerConfig(kind='bpe', vocab_size=VOCAB_SIZE),
    ),
    optimizer=chain.OptimizerConfig(
      peak_lr=2e-3, end_lr=2e-4, schedule='wsd', decay_steps=100
    ),
    num_steps=500,
  )
