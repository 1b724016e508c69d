"""Fine-tuning: training continues from frozen weights, own or imported.

    python -m frozen.huggingface import --source=org/model --out=runs/base
    python train.py --config=experiments/finetune.py:runs/base \
      --workdir=runs/tuned --config.data.path='corpus/{split}.jsonl'
    python -m frozen.huggingface export --source=runs/tuned/frozen --out=tuned

The variant names a frozen directory. The run takes its model, its tokenizer and
its weights. Without a variant, a small model starts from random weights, to try
the data. The learning rate is a tenth of the usual rate for training a model of
that size from random weights.
"""

from data import data_config, sources
from experiments import presets
from training import experiment
from training.checkpoints import init_from
from training.optimizer import chain

VOCAB_SIZE = 4096
LENGTH = 512


def get_config(directory: str = '') -> experiment.Experiment:
  """Returns the experiment that starts from a frozen directory."""
  model = presets.llama(
    vocab_size=VOCAB_SIZE,
    num_layers=6,
    num_heads=4,
    num_kv_heads=2,
    width=256,
    mlp_width=704,
    length=LENGTH,
  )
  tokenizer = data_config.TokenizerConfig(kind='bpe', vocab_size=VOCAB_SIZE)
  if directory:
    model = init_from.model_of(directory)
    tokenizer = init_from.tokenizer_of(directory)
  return experiment.Experiment(
    name='finetune',
    model=model,
    init_from=directory,
    data=data_config.DataConfig(
      open_source=sources.jsonl,
      row_length=min(LENGTH, model.max_length),
      batch_size=16,
      packing='first_fit',
      tokenizer=tokenizer,
    ),
    optimizer=chain.OptimizerConfig(peak_lr=3e-5, end_lr=3e-6, warmup_steps=20),
    num_steps=500,
  )
