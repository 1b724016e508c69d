"""Pretraining at the size of GPT-2 small, 124M parameters.

    python train.py --config=experiments/pretrain_124m.py --workdir=runs/124m \
      --config.data.path='text/{split}-*.parquet'

Shape and schedule are taken from nanoGPT's reproduction of GPT-2
(config/train_gpt2.py, https://github.com/karpathy/nanoGPT): half a million
tokens per step, peak learning rate 6e-4, weight decay 0.1. nanoGPT takes
600,000 steps and reaches 2.85 nats per token on OpenWebText after four days on
8 A100.
This run takes 19,073 steps, 10 billion tokens, of the Parquet files that
`data.path` names. It is meant for accelerators: its 8.0e18 FLOPs would take 11
hours at 20 % MFU of an H100 (989 TFLOP/s). It has not been run.
"""

from data import data_config, sources
from experiments import presets
from training import experiment
from training.optimizer import chain

LENGTH = 1024
NUM_STEPS = 19_073


def get_config() -> experiment.Experiment:
  """Returns the experiment."""
  return experiment.Experiment(
    name='pretrain_124m',
    model=presets.gpt2(
      vocab_size=50_304,  # 50,257 rounded up to a multiple of 128
      num_layers=12,
      num_heads=12,
      width=768,
      length=LENGTH,
    ),
    data=data_config.DataConfig(
      open_source=sources.parquet,
      row_length=LENGTH,
      batch_size=512,
      tokenizer=data_config.TokenizerConfig(kind='bpe', vocab_size=50_257),
    ),
    optimizer=chain.OptimizerConfig(
      peak_lr=6e-4, end_lr=6e-5, warmup_steps=700, weight_decay=0.1
    ),
    compute_dtype='bfloat16',
    num_steps=NUM_STEPS,
    num_microbatches=16,
    eval_every_steps=1000,
    eval_batches=40,
    checkpoint=experiment.CheckpointConfig(
      every_steps=1000, keep_every_steps=5000
    ),
    freeze=experiment.FreezeConfig(dtype='bfloat16'),
  )
