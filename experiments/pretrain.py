"""Pretraining at well-known model sizes, each with a cluster that suits it.

    python train.py --config=experiments/pretrain.py:8b --plan=v5p:4x4x4
    python train.py --config=experiments/pretrain.py:8b --workdir=runs/8b \
      --config.data.path='text/{split}-*.parquet'

Variants, and the target that `PLANS.md` has figures for:

    :124m     GPT-2 small, of `pretrain_124m.py`            v5e:2x4
    :1b       the shape of Llama 3.2 1B                     v5e:4x4
    :8b       Llama 3 8B (arXiv:2407.21783, table 3)        v5p:4x4x4
    :70b      Llama 3 70B (the same table)                  v5p:4x8x8
    :30b-a3b  a mixture of experts: Qwen3-30B-A3B           v5p:4x4x4
              (arXiv:2505.09388)

Shapes and peak learning rates are taken from the papers. The number of steps
gives 20 tokens per parameter (Chinchilla, arXiv:2203.15556), from the Parquet
files that `data.path` names. None of these runs has been made: the largest
needs device-years. `--plan` gives the cost of each run.
"""

from data import data_config, sources
from experiments import presets, pretrain_124m
from parallel import parallel_config
from training import experiment
from training.optimizer import chain

LENGTH = 4096


def get_config(variant: str = '8b') -> experiment.Experiment:
  """Returns the experiment of one size."""
  if variant == '124m':
    return pretrain_124m.get_config()
  if variant == '1b':
    return _experiment(
      variant,
      presets.llama3(
        num_layers=16,
        num_heads=32,
        width=2048,
        mlp_width=8192,
        length=LENGTH,
        tie_embeddings=True,
      ),
      batch_size=256,  # a million tokens
      num_steps=24_000,
      peak_lr=3e-4,
      # Two groups of 8: over a whole v5e torus XLA splits each product into as
      # many parts as there are devices, and adds the parts in main memory.
      parallel=parallel_config.ParallelConfig(fsdp=8),
    )
  if variant == '8b':
    return _experiment(
      variant,
      presets.llama3(
        num_layers=32,
        num_heads=32,
        width=4096,
        mlp_width=14_336,
        length=LENGTH,
      ),
      batch_size=1024,  # four million tokens
      num_steps=39_000,
      peak_lr=3e-4,
      # Two groups of 32: one group of 64 spans all three axes of the torus. XLA
      # then gathers by adding zeros, with twice the traffic.
      parallel=parallel_config.ParallelConfig(fsdp=32),
    )
  if variant == '70b':
    return _experiment(
      variant,
      presets.llama3(
        num_layers=80,
        num_heads=64,
        width=8192,
        mlp_width=28_672,
        length=LENGTH,
      ),
      batch_size=2048,  # eight million tokens
      num_steps=169_000,
      peak_lr=1.5e-4,
      parallel=parallel_config.ParallelConfig(fsdp=64, tensor=4),
    )
  if variant == '30b-a3b':
    return _experiment(
      variant,
      presets.qwen3_30b_a3b(length=LENGTH),
      batch_size=1024,
      num_steps=16_000,  # 20 tokens per active parameter
      peak_lr=3e-4,
      parallel=parallel_config.ParallelConfig(fsdp=32, expert=2),
    )
  raise ValueError(
    f'variant: got {variant!r}, expected 124m, 1b, 8b, 70b or 30b-a3b'
  )


def _experiment(
  variant: str, model, *, batch_size: int, num_steps: int, peak_lr, parallel
) -> experiment.Experiment:
  """Returns the experiment of one size; the other settings are common."""
  return experiment.Experiment(
    name=f'pretrain_{variant}',
    model=model,
    data=data_config.DataConfig(
      open_source=sources.parquet,
      row_length=LENGTH,
      batch_size=batch_size,
      tokenizer=data_config.TokenizerConfig(
        kind='bpe', vocab_size=model.vocab_size, train_bytes=10**9
      ),
    ),
    optimizer=chain.OptimizerConfig(
      peak_lr=peak_lr, end_lr=peak_lr / 10, warmup_steps=2000
    ),
    parallel=parallel,
    execution=experiment.ExecutionConfig(remat='full'),
    compute_dtype='bfloat16',
    num_steps=num_steps,
    num_microbatches=4,
    eval_every_steps=1000,
    eval_batches=8,
    checkpoint=experiment.CheckpointConfig(every_steps=1000),
    freeze=experiment.FreezeConfig(dtype='bfloat16'),
  )
