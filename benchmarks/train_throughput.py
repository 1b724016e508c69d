"""Training speed of one device, beside its peak rate and a peer.

    python -m benchmarks.train_throughput --shape=small --peer

One optimizer step (forward, backward, clipping, AdamW; no dropout), as a run
with default settings takes it. On a CPU, in float32:

    small  6 layers, width 384, vocabulary 65: 10.8M; batch 8 x 256
    124m   12 layers, width 768, vocabulary 50304: GPT-2; batch 4 x 256

On an accelerator, in bfloat16 with float32 parameters:

    124m   the same GPT-2; batch 16 x 1024
    1b     the shape of Llama 3.2 1B, vocabulary 128256; batch 4 x 4096

Columns. `tokens/s` is the median over rounds. `MFU` is the FLOPs per second
that the model needs (`models.flops`, without the masked half of causal
attention) over the peak rate. The peak is the datasheet's, or, for an unknown
device such as a CPU, the matmul rate measured in the same round. `memory` is
the peak memory of the device; on a CPU, of the process. The parts of a step are
measured alone (`benchmarks.train_parts`).

With `--peer`, the same model of transformers trains on torch: on a CPU eager,
taking turns with ours; on a GPU with torch.compile, bfloat16 autocast and
scaled_dot_product_attention, before ours, so that each has the whole memory.
Both have the fused AdamW. `ours / peer` is the median over rounds of the ratio
of tokens/s; above 1, ours is faster.
"""

import contextlib
import dataclasses
import os
import resource
import statistics
import time
from typing import Any

from absl import app, flags
import jax
import numpy as np

from benchmarks import decode_latency, train_parts
from benchmarks.common import entry, timing
from benchmarks.peer import peer_process
from data import data_config
from experiments import presets
from hardware import host_memory, peaks
from models import flops, model_config
from training import experiment as experiment_lib, learner as learner_lib
from training.optimizer import chain, update_rules
from training.planning import choices


@dataclasses.dataclass(frozen=True, kw_only=True)
class Shape:
  """A model, and the size of its batches."""

  model: model_config.ModelConfig
  batch_size: int  # rows
  row_length: int  # tokens
  steps: int  # optimizer steps per turn, for a few seconds
  dtype: str = 'float32'  # of the computation

  @property
  def tokens_per_turn(self) -> int:
    """The tokens that one turn trains on."""
    return self.steps * self.batch_size * self.row_length


def gpt2(**sizes: int) -> model_config.ModelConfig:
  """Returns GPT-2 with unrolled layers, which XLA:CPU runs faster."""
  return dataclasses.replace(presets.gpt2(**sizes), scan_layers=False)


def llama_1b(length: int) -> model_config.ModelConfig:
  """Returns the shape of Llama-3.2-1B, with a context of `length`."""
  return presets.llama3(
    num_layers=16,
    num_heads=32,
    width=2048,
    mlp_width=8192,
    length=length,
    tie_embeddings=True,
  )


def shapes(platform: str = 'cpu') -> dict[str, Shape]:
  """Returns the shapes of a platform by name."""
  return _CPU if platform == 'cpu' else _ACCELERATOR


_CPU = {
  'small': Shape(
    model=gpt2(vocab_size=65, num_layers=6, num_heads=6, width=384, length=256),
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
_ACCELERATOR = {
  '124m': Shape(
    model=presets.gpt2(
      vocab_size=50304, num_layers=12, num_heads=12, width=768, length=1024
    ),
    batch_size=16,
    row_length=1024,
    steps=20,
    dtype='bfloat16',
  ),
  '1b': Shape(
    model=llama_1b(length=4096),
    batch_size=4,
    row_length=4096,
    steps=5,
    dtype='bfloat16',
  ),
}


RULE = update_rules.AdamW()
OPTIMIZER = chain.OptimizerConfig(
  rule=RULE, peak_lr=1e-4, schedule='constant', warmup_steps=0
)


class Ours:
  """Our train step, with the default choices of a run."""

  def __init__(self, shape: Shape, device: jax.Device):
    """Compiles the step and warms it up."""
    chosen = choices.make(experiment_of(shape), [device])
    self.reasons = chosen.reasons
    self.learner = learner_lib.make(chosen.experiment, [device])
    self._steps = shape.steps
    self._step = self.learner.compile_train_step()
    self._batch = self.learner.placement.put_batch(_batch(shape))
    start = time.perf_counter()
    self._state: Any = self.learner.init(jax.random.key(0))
    self._state, _ = self._step(self._state, self._batch)
    jax.block_until_ready(self._state)
    self.first_step_s = time.perf_counter() - start
    self.turn()

  def turn(self) -> float:
    """Takes the steps of a turn; returns their seconds."""
    start = time.perf_counter()
    for _ in range(self._steps):
      self._state, _ = self._step(self._state, self._batch)
    jax.block_until_ready(self._state)
    return time.perf_counter() - start

  def release(self) -> None:
    """Frees the state."""
    self._state = None


def experiment_of(shape: Shape) -> experiment_lib.Experiment:
  """Returns an experiment that is about speed alone."""
  return experiment_lib.Experiment(
    name='train_throughput',
    model=shape.model,
    data=data_config.DataConfig(
      path='-',
      batch_size=shape.batch_size,
      row_length=shape.row_length,
      packing='none',
    ),
    optimizer=OPTIMIZER,
    compute_dtype=shape.dtype,
    num_steps=1,
  )


def _batch(shape: Shape) -> dict[str, np.ndarray]:
  rng = np.random.default_rng(0)
  dims = (shape.batch_size, shape.row_length)
  ids = rng.integers(0, shape.model.vocab_size, (2, *dims), dtype=np.int32)
  return {
    'tokens': ids[0],
    'targets': ids[1],
    'positions': np.tile(np.arange(dims[1], dtype=np.int32), (dims[0], 1)),
    'segment_ids': np.ones(dims, np.int32),
    'weights': np.ones(dims, np.float32),
  }


def peer_spec(shape: Shape, device: str = 'cpu') -> dict[str, Any]:
  """Returns the same training for `peer_worker`."""
  model, is_gpt2 = shape.model, shape.model.positions == 'learned'
  return {
    'workload': 'train_gpt2' if is_gpt2 else 'train_llama',
    'device': device,
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
    'model': _gpt2_config(model)
    if is_gpt2
    else decode_latency.peer_model(model),
  }


def _gpt2_config(model: model_config.ModelConfig) -> dict[str, Any]:
  return {
    'vocab_size': model.vocab_size,
    'n_layer': model.num_layers,
    'n_head': model.num_heads,
    'n_embd': model.model_width,
    'n_inner': model.mlp_width,
    'n_positions': model.max_length,
    'layer_norm_epsilon': model.norm_epsilon,
    'activation_function': 'gelu_new',
  }


def run(
  name: str,
  shape: Shape,
  *,
  with_peer: bool,
  rounds: int,
  with_parts: bool = False,
) -> dict[str, Any]:
  """Measures one shape; returns everything that `report` prints."""
  device = jax.devices()[0]
  is_cpu = device.platform == 'cpu'
  num_params = flops.num_params(shape.model)
  needed = flops.train_flops_per_token(shape.model, shape.row_length)
  result: dict[str, Any] = {}
  turns: dict[str, timing.Turn] = {}
  taken: dict[str, list[float]] = {}
  known = peaks.DATASHEETS.get(device.device_kind)
  if known is None:
    turns['roofline'] = _matmul_turn(device, shape.dtype)
  with contextlib.ExitStack() as stack:
    if with_peer:
      spec = peer_spec(shape, 'cpu' if is_cpu else 'cuda')
      peer = stack.enter_context(peer_process.PeerProcess(spec))
      result['peer_info'] = peer.info
      peer_process.check_same_size(peer.info, num_params)
      if is_cpu:
        turns['peer'] = peer.turn
      else:
        taken |= timing.interleave({'peer': peer.turn}, rounds)
        stack.close()  # gives its memory back
    ours = Ours(shape, device)
    taken |= timing.interleave(turns | {'ours': ours.turn}, rounds)
  per_flop = taken.pop('roofline', None)
  if per_flop is None:
    assert known is not None
    per_flop = [1 / known.flops_per_s[shape.dtype]] * rounds
  for side, side_seconds in taken.items():
    tokens_per_s = [shape.tokens_per_turn / s for s in side_seconds]
    mfu = [t * needed * p for t, p in zip(tokens_per_s, per_flop, strict=True)]
    result[side] = {
      'tokens_per_s': statistics.median(tokens_per_s),
      'mfu': statistics.median(mfu),
      'seconds_per_turn': side_seconds,
    }
  result['ours'] |= {
    'memory_bytes': _memory_bytes(device),
    'first_step_s': ours.first_step_s,
    'chosen': ours.reasons,
  }
  if with_peer:
    result['peer']['memory_bytes'] = result['peer_info']['memory_bytes']
    result['ratio'] = timing.median_ratio(taken['peer'], taken['ours'])
  if with_parts:
    ours.release()
    step_seconds = statistics.median(taken['ours']) / shape.steps
    result['parts'] = train_parts.seconds(ours.learner, step_seconds)
  return {
    'benchmark': 'train_throughput',
    'shape': name,
    'device': device.device_kind,
    'num_params': num_params,
    'batch_size': shape.batch_size,
    'row_length': shape.row_length,
    'dtype': shape.dtype,
    'roofline_flops_per_s': 1 / statistics.median(per_flop),
    'needed_flops_per_token': needed,
    **result,
  }


def _matmul_turn(device: jax.Device, dtype: str) -> timing.Turn:
  """Returns a turn that returns the seconds of one FLOP."""
  size = 1024 if device.platform == 'cpu' else 8192
  return lambda: (
    1 / peaks.matmul_flops_per_s(dtype, size=size, seconds=0.3, device=device)
  )


def _memory_bytes(device: jax.Device) -> int:
  if device.platform == 'cpu':
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024
  return (device.memory_stats() or {}).get('peak_bytes_in_use', 0)


def report(result: dict[str, Any]) -> str:
  """Returns the table of one shape."""
  rows = [('', 'tokens/s', 'MFU', 'memory')]
  for side in ('ours', 'peer'):
    if side in result:
      figures = result[side]
      rows.append(
        (
          side,
          f'{figures["tokens_per_s"]:,.0f}',
          f'{figures["mfu"]:.1%}',
          f'{figures.get("memory_bytes", 0) / 1e9:.1f} GB',
        )
      )
  title = (
    f'Training, {result["shape"]}: {result["num_params"] / 1e6:.1f}M'
    f' parameters, batch {result["batch_size"]} x {result["row_length"]},'
    f' {result.get("dtype", "float32")}; roofline'
    f' {result["roofline_flops_per_s"] / 1e9:,.0f} GFLOP/s'
  )
  lines = [timing.table(title, rows)]
  if 'ratio' in result:
    lines.append(f'  ours / peer: {result["ratio"]:.2f}')
  if parts := result.get('parts'):
    whole = sum(parts.values())
    shares = [
      f'{name} {1e3 * seconds:.1f} ms {seconds / whole:.0%}'
      for name, seconds in parts.items()
    ]
    lines.append(f'  a step: {", ".join(shares)}')
  for reason in result['ours'].get('chosen', ()):
    lines.append(f'  chosen: {reason}')
  return '\n'.join(lines)


def main(argv: list[str]) -> None:
  """Runs the benchmark."""
  del argv
  host_memory.reuse_freed_memory()  # as train.py does
  # Before jax opens a GPU: the peer needs its memory first.
  os.environ.setdefault('XLA_PYTHON_CLIENT_PREALLOCATE', 'false')
  entry.run(_measure, report, is_list=True)


def _measure(args):
  """Yields the result of each shape that the flags ask for."""
  here = shapes(jax.default_backend())
  if args.shape not in ('all', *here):
    raise ValueError(
      f'--shape: got {args.shape} on {jax.default_backend()}, expected all or'
      f' {" or ".join(here)}'
    )
  for name, shape in here.items():
    if args.shape in ('all', name):
      yield run(
        name,
        shape,
        with_peer=args.peer,
        rounds=args.rounds,
        with_parts=args.parts,
      )


if __name__ == '__main__':
  entry.define_flags(rounds=5, has_peer=True)
  flags.DEFINE_enum(
    'shape', 'all', ['all', *(_CPU | _ACCELERATOR)], 'The model to train.'
  )
  flags.DEFINE_bool('parts', True, 'Also measures the parts of a step alone.')
  app.run(main)
