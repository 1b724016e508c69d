"""Supervised fine-tuning: a frozen model learns the answers of conversations.

    python train.py --config=experiments/sft.py:runs/base --audit \
      --config.data.path='chat/{split}.jsonl'       # which tokens are trained?
    python train.py --config=experiments/sft.py:runs/base --workdir=runs/sft \
      --config.data.path='chat/{split}.jsonl'
    python serve.py --model=runs/sft/frozen --chat

The variant names a frozen directory. The run takes its model, its tokenizer,
its weights and its chat template; the frozen result has the same template, stop
tokens and settings. `data/examples/shapes.py` lists the shapes of records. Only
answers and their stop tokens are trained. Without a variant, a small model
trains for minutes on a CPU from random weights and writes plain transcripts, to
try the data. The learning rate is for full fine-tuning; adapters
(--config.adapter.rank=8) need about ten times as much.
"""

from data import data_config, sources
from experiments import presets
from training import experiment
from training.checkpoints import init_from
from training.optimizer import chain

VOCAB_SIZE = 512
LENGTH = 1024


def get_config(directory: str = '') -> experiment.Experiment:
  """Returns the experiment that starts from a frozen directory."""
  model = presets.llama(
    vocab_size=VOCAB_SIZE,
    num_layers=4,
    num_heads=4,
    num_kv_heads=4,
    width=128,
    mlp_width=352,
    length=256,
  )
  tokenizer = data_config.TokenizerConfig(kind='byte')
  if directory:
    model = init_from.model_of(directory)
    tokenizer = init_from.tokenizer_of(directory)
  return experiment.Experiment(
    name='sft',
    model=model,
    init_from=directory,
    data=data_config.DataConfig(
      open_source=sources.jsonl,
      examples='chat',
      row_length=min(LENGTH, model.max_length),
      batch_size=16,
      packing='best_fit',
      tokenizer=tokenizer,
    ),
    optimizer=chain.OptimizerConfig(
      peak_lr=2e-5 if directory else 1e-3,
      end_lr=0.0,
      schedule='linear',
      warmup_steps=20,
      weight_decay=0.0,
    ),
    num_steps=300,
    log_every_steps=10,
    eval_every_steps=100,
  )
