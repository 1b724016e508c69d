"""Training speed of one device, beside the matmul roofline and a peer.

    python -m benchmarks.train_throughput --shape=small --peer

One optimizer step (forward, backward, clipping, AdamW; float32, no dropout) of
a GPT-2 at two shapes:

    small  6 layers, width 384, vocabulary 65: 10.8M; batch 8 x 256
    124m   12 layers, width 768, vocabulary 50304: GPT-2; batch 4 x 256

Columns. `tokens/s` is the median over rounds. `MFU` is the FLOPs per second
that the model needs (`models.flops`, without the masked half of causal
attention) over the matmul rate that this device reached in the same round. With
`--peer`, transformers' GPT2LMHeadModel trains in torch eager on the same
shapes, taking turns with ours. `ours / peer` is the median over rounds of the
ratio of tokens/s; above 1, ours is faster.
"""

import contextlib
import dataclasses
import statistics
import time
from typing import Any

from absl import app, flags
import jax
import jax.numpy as jnp
import numpy as np

from benchmarks import entry, timing
from benchmarks.peer import peer_process
from experiments import presets
from hardware import host_memory, peaks
from models import flops, model_config, transformer
from training import state as state_lib, step
from training.objectives import next_token
from training.optimizer import chain, update_rules


@dataclasses.dataclass(frozen=True, kw_only=True)
class Shape:
  """A model, and the size of its batches."""

  model: model_config.ModelConfig
  batch_size: int  # rows
  row_length: int  # tokens
  steps: int  # optimizer steps per turn, for a few seconds

  @property
  def tokens_per_turn(self) -> int:
    """The tokens that one turn trains on."""
    return self.steps * self.batch_size * self.row_length


def gpt2(**sizes: int) -> model_config.ModelConfig:
  """Returns GPT-2 with unrolled layers, which XLA:CPU runs faster."""
  return dataclasses.replace(presets.gpt2(**sizes), scan_layers=False)


def shapes() -> dict[str, Shape]:
  """Returns the shapes by name."""
  return {
    'small': Shape(
      model=gpt2(
        vocab_size=65, num_layers=6, num_heads=6, width=384, length=256
      ),
      batch_size=8,
      row_length=256,
      steps=3,
    ),
    '124m': Shape(
      model=gpt2(
        vocab_size=50304, num_layers=12, num_heads=12, width=768, length=1024
      ),
      batch_size=4,
      row_length=256,
      steps=1,
    ),
  }


RULE = update_rules.AdamW()
OPTIMIZER = chain.OptimizerConfig(
  rule=RULE, peak_lr=1e-4, schedule='constant', warmup_steps=0
)


def our_turn(shape: Shape) -> timing.Turn:
  """Returns a turn of our train step, compiled and warmed up."""
  model = transformer.Transformer(shape.model)
  optimizer = chain.make_optimizer(
    OPTIMIZER, 1, shape.model, state_lib.abstract_params(model)
  )
  state = jax.jit(lambda key: state_lib.init(model, optimizer, key))(
    jax.random.key(0)
  )
  train_step = jax.jit(
    step.make_train_step(model, next_token.NextToken(), optimizer),
    donate_argnums=0,
  )
  batch = _batch(shape)

  def turn() -> float:
    nonlocal state
    start = time.perf_counter()
    for _ in range(shape.steps):
      state, _ = train_step(state, batch)
    jax.block_until_ready(state)
    return time.perf_counter() - start

  turn()
  return turn


def _batch(shape: Shape) -> dict[str, jax.Array]:
  rng = np.random.default_rng(0)
  dims = (shape.batch_size, shape.row_length)
  ids = rng.integers(0, shape.model.vocab_size, (2, *dims), dtype=np.int32)
  return {
    'tokens': jnp.asarray(ids[0]),
    'targets': jnp.asarray(ids[1]),
    'positions': jnp.tile(jnp.arange(dims[1], dtype=jnp.int32), (dims[0], 1)),
    'segment_ids': jnp.ones(dims, jnp.int32),
    'weights': jnp.ones(dims, jnp.float32),
  }


def peer_spec(shape: Shape) -> dict[str, Any]:
  """Returns the same training for `peer_worker`."""
  model = shape.model
  return {
    'workload': 'train_gpt2',
    'batch_size': shape.batch_size,
    'row_length': shape.row_length,
    'steps': shape.steps,
    'clip_norm': OPTIMIZER.clip_norm,
    'optimizer': {
      'lr': OPTIMIZER.peak_lr,
      'betas': (RULE.beta1, RULE.beta2),
      'eps': RULE.epsilon,
      'weight_decay': OPTIMIZER.weight_decay,
    },
    'model': {
      'vocab_size': model.vocab_size,
      'n_layer': model.num_layers,
      'n_head': model.num_heads,
      'n_embd': model.model_width,
      'n_inner': model.mlp_width,
      'n_positions': model.max_length,
      'layer_norm_epsilon': model.norm_epsilon,
      'activation_function': 'gelu_new',
    },
  }


def run(
  name: str, shape: Shape, *, with_peer: bool, rounds: int
) -> dict[str, Any]:
  """Measures one shape; returns everything that `report` prints."""
  device = jax.devices()[0]
  num_params = flops.num_params(shape.model)
  needed = flops.train_flops_per_token(shape.model, shape.row_length)
  size = 1024 if device.platform == 'cpu' else 8192

  def matmul_turn() -> float:
    rate = peaks.matmul_flops_per_s(
      'float32', size=size, seconds=0.3, device=device
    )
    return 1 / rate  # seconds per FLOP

  turns: dict[str, timing.Turn] = {'roofline': matmul_turn}
  result: dict[str, Any] = {}
  with contextlib.ExitStack() as stack:
    if with_peer:
      peer = stack.enter_context(peer_process.PeerProcess(peer_spec(shape)))
      turns['peer'] = peer.turn
      result['peer_info'] = peer.info
      peer_process.check_same_size(peer.info, num_params)
    turns['ours'] = our_turn(shape)
    taken = timing.interleave(turns, rounds)
  per_flop = taken.pop('roofline')
  for side, side_seconds in taken.items():
    tokens_per_s = [shape.tokens_per_turn / s for s in side_seconds]
    mfu = [t * needed * p for t, p in zip(tokens_per_s, per_flop, strict=True)]
    result[side] = {
      'tokens_per_s': statistics.median(tokens_per_s),
      'mfu': statistics.median(mfu),
      'seconds_per_turn': side_seconds,
    }
  if with_peer:
    result['ratio'] = timing.median_ratio(taken['peer'], taken['ours'])
  return {
    'benchmark': 'train_throughput',
    'shape': name,
    'device': device.device_kind,
    'num_params': num_params,
    'batch_size': shape.batch_size,
    'row_length': shape.row_length,
    'roofline_flops_per_s': 1 / statistics.median(per_flop),
    'needed_flops_per_token': needed,
    **result,
  }


def report(result: dict[str, Any]) -> str:
  """Returns the table of one shape."""
  rows = [('', 'tokens/s', 'MFU')]
  for side in ('ours', 'peer'):
    if side in result:
      figures = result[side]
      rows.append(
        (side, f'{figures["tokens_per_s"]:,.0f}', f'{figures["mfu"]:.1%}')
      )
  title = (
    f'Training, {result["shape"]}: {result["num_params"] / 1e6:.1f}M'
    f' parameters, batch {result["batch_size"]} x {result["row_length"]},'
    f' float32; roofline {result["roofline_flops_per_s"] / 1e9:.0f} GFLOP/s'
  )
  lines = [timing.table(title, rows)]
  if 'ratio' in result:
    lines.append(f'  ours / peer: {result["ratio"]:.2f}')
  return '\n'.join(lines)


def main(argv: list[str]) -> None:
  """Runs the benchmark."""
  del argv
  host_memory.reuse_freed_memory()  # as train.py does
  entry.run(
    lambda args: (
      run(name, shape, with_peer=args.peer, rounds=args.rounds)
      for name, shape in shapes().items()
      if args.shape in ('all', name)
    ),
    report,
    is_list=True,
  )


if __name__ == '__main__':
  entry.define_flags(rounds=5, has_peer=True)
  flags.DEFINE_enum('shape', 'all', ['all', *shapes()], 'The model to train.')
  app.run(main)
