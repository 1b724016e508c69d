"""The loss gap of training with 8-bit products: a study of execution.matmul.

    python -m studies.matmul_loss_gap --text=tiny_shakespeare.txt

Trains the same small byte model on the same batches and seeds with float, int8
and fp8 products. Prints the loss on a held-out tenth of the text. `gap` is the
mean over seeds of the difference to the float run of the same seed, with its
standard error. Seeds are paired, so that common noise cancels. CPUs emulate
8-bit products: this study says nothing about speed.
"""

import statistics

from absl import app
import jax
import numpy as np

from checks import path_flags
from data import data_config
from experiments import presets
from studies.common import study_flags
from training import experiment as experiment_lib, learner as learner_lib
from training.optimizer import chain

_TEXT = path_flags.DEFINE_path('text', None, 'A file of text.', required=True)
_NUM_STEPS, _NUM_SEEDS = 300, 3

ROWS, LENGTH, EVAL_ROWS = 16, 64, 512


def experiment(matmul: str, num_steps: int) -> experiment_lib.Experiment:
  """Returns the experiment: two layers of width 64 over bytes, 0.1M params."""
  return experiment_lib.Experiment(
    name='matmul_loss_gap',
    model=presets.llama(
      vocab_size=256, num_layers=2, num_heads=4, num_kv_heads=2, width=64,
      mlp_width=192, length=LENGTH,
    ),
    data=data_config.DataConfig(row_length=LENGTH, batch_size=ROWS),
    optimizer=chain.OptimizerConfig(
      peak_lr=4e-3, end_lr=4e-4, warmup_steps=num_steps // 10
    ),
    execution=experiment_lib.ExecutionConfig(matmul=matmul),
    num_steps=num_steps,
    compute_dtype='bfloat16',
  )  # fmt: skip


def batch(bytes_L: np.ndarray, starts_B: np.ndarray) -> dict[str, np.ndarray]:
  """Returns rows of the text in the format of `data.batches`."""
  rows = bytes_L[starts_B[:, None] + np.arange(LENGTH + 1)[None, :]]
  shape = len(starts_B), LENGTH
  return {
    'tokens': rows[:, :-1].astype(np.int32),
    'targets': rows[:, 1:].astype(np.int32),
    'positions': np.tile(np.arange(LENGTH, dtype=np.int32), (shape[0], 1)),
    'segment_ids': np.ones(shape, np.int32),
    'weights': np.ones(shape, np.float32),
  }


def held_out_losses(text: bytes, matmul: str, num_steps: int, num_seeds: int):
  """Returns the held-out loss after training in nats per byte, per seed."""
  learner = learner_lib.make(experiment(matmul, num_steps), jax.devices()[:1])
  train_step = learner.compile_train_step()
  eval_step = learner.compile_eval_step()
  put = learner.placement.put_batch
  bytes_L = np.frombuffer(text, np.uint8)
  split = len(bytes_L) * 9 // 10
  places = np.linspace(split, len(bytes_L) - LENGTH - 1, EVAL_ROWS)
  losses = []
  for seed in range(num_seeds):
    rng = np.random.default_rng(seed)
    state = learner.init(jax.random.key(seed))
    for _ in range(num_steps):
      starts_B = rng.integers(0, split - LENGTH - 1, ROWS)
      state, _ = train_step(state, put(batch(bytes_L, starts_B)))
    sums = [
      eval_step(state.params, put(batch(bytes_L, part)))
      for part in places.astype(int).reshape(-1, ROWS)
    ]
    total = sum(float(part['loss']) for part in sums)
    losses.append(total / sum(float(part['weight']) for part in sums))
    print(f'{matmul:6} seed {seed}: {losses[-1]:.4f} nats/byte', flush=True)
  return losses


def main(argv: list[str]) -> None:
  """Trains with each format and prints losses and gaps."""
  if len(argv) > 1:
    raise app.UsageError(f'got unknown arguments {argv[1:]}, expected flags')
  with open(_TEXT.value, 'rb') as file:
    text = file.read()
  reference: list[float] = []
  for matmul in experiment_lib.MATMULS:
    losses = held_out_losses(
      text,
      matmul,
      study_flags.STEPS.value or _NUM_STEPS,
      study_flags.SEEDS.value or _NUM_SEEDS,
    )
    reference = reference or losses
    gaps = [a - b for a, b in zip(losses, reference, strict=True)]
    error = statistics.stdev(gaps) / len(gaps) ** 0.5
    print(
      f'{matmul:6} mean {statistics.mean(losses):.4f}, gap'
      f' {statistics.mean(gaps):+.4f} +- {error:.4f}',
      flush=True,
    )


if __name__ == '__main__':
  app.run(main)
