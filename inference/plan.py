"""The plan of serving a frozen model: memory and speed, for `serve.py --plan`.

    python serve.py --model=DIR --plan
    python serve.py --model=DIR --plan=v5e:2x4

The plan needs the manifest only: no weights are read. Decoding reads every
weight and every cached key and value once per step, so that memory bandwidth
bounds its speed until the batch is large enough to keep the multipliers busy
(Pope et al., arXiv:2211.05102, section 2). For a target device, the engine's
decode step is compiled ahead of time, and the plan shows the compiler's memory
beside the formula's.

Life two runs on one device: all figures are of one device, whatever the target.
"""

from collections.abc import Mapping
import dataclasses
import math
import pathlib
from typing import Any

import jax
import jax.numpy as jnp
from jax.sharding import Mesh, NamedSharding, PartitionSpec
import numpy as np

from frozen import (
  format as frozen_format,
  manifest as manifest_lib,
  stored_kernels,
)
from hardware import compile_ahead, peaks as peaks_lib, targets
from inference.engine import (
  device_state,
  engine_config,
  execution,
  inputs as inputs_lib,
  steps,
)
from models import flops, kv_cache, layout, model_config, transformer
from models.linear.stored import tree as stored_tree

# Share of the memory left free, for activations, the runtime, and everything
# else that no formula knows.
_MARGIN = 0.05
# Largest batch of the compiled decode step; a power of two, as batches are.
_MOST_COMPILED_SEQUENCES = 64


@dataclasses.dataclass(frozen=True, kw_only=True)
class Plan:
  """The figures of serving one model on one device."""

  name: str  # the experiment that trained the weights
  target: str
  device_kind: str
  peaks: peaks_lib.Peaks
  config: model_config.ModelConfig
  dtype: str
  num_params: int
  # Of kernels in fewer bits: how they are stored, and the bytes that this saves
  # in memory and in the reads of a step.
  quantization: Mapping[str, Any] = dataclasses.field(
    default_factory=lambda: dict(stored_kernels.NONE)
  )
  saved_bytes: int = 0
  saved_bytes_of_step: int = 0
  compiled: compile_ahead.Program | compile_ahead.OutOfMemory | None = None
  compiled_sequences: int = 0

  @property
  def itemsize(self) -> int:
    """Bytes of one weight, and of one cached channel."""
    return jnp.dtype(self.dtype).itemsize

  def shapes(self) -> Any:
    """Returns the shapes of the weights, as they are stored."""
    floats = frozen_format.abstract_params(self.config, self.dtype)
    return stored_kernels.with_kernels(floats, self.quantization)

  @property
  def weight_bytes(self) -> int:
    """Bytes of all weights."""
    return self.num_params * self.itemsize - self.saved_bytes

  @property
  def kv_bytes_per_token(self) -> int:
    """Bytes of the cached keys and values of one token, all layers."""
    config = self.config
    rows, width = kv_cache.rows_and_width(config)
    return config.num_layers * rows * width * self.itemsize

  def bytes_of(self, num_sequences: int, length: int) -> float:
    """Returns the bytes of weights and of sequences with `length` tokens."""
    # Float32 logits, and a copy of them: the weights of the sampler's search.
    logits = 2 * 4 * num_sequences * self.config.vocab_size
    cache = num_sequences * length * self.kv_bytes_per_token
    return self.weight_bytes + cache + logits

  def num_sequences(self, length: int) -> int:
    """Returns how many sequences with `length` tokens fit; may be 0."""
    room = self.peaks.memory_bytes * (1 - _MARGIN) - self.weight_bytes
    each = self.bytes_of(1, length) - self.weight_bytes
    return max(int(room // each), 0)

  def step_bytes(self, num_sequences: int, context: float) -> float:
    """Returns the bytes of weights and cache that a decode step reads.

    A mixture of experts reads each expert that any token chooses: for B tokens
    that choose A of E experts independently, E (1 - (1 - A/E)^B) experts.
    """
    weights = flops.num_matmul_params(self.config)
    config = self.config
    if config.num_experts:
      share = config.num_active_experts / config.num_experts
      taken = config.num_experts * (1 - (1 - share) ** num_sequences)
      each = (flops.num_params(config) - flops.num_active_params(config)) / (
        config.num_experts - config.num_active_experts or 1
      )
      weights += (taken - config.num_active_experts) * each
    cache = num_sequences * context * self.kv_bytes_per_token
    return weights * self.itemsize - self.saved_bytes_of_step + cache

  def step_seconds(self, num_sequences: int, context: float) -> float:
    """Returns the least time of a decode step, in seconds."""
    products = num_sequences * flops.forward_flops_per_token(
      self.config, context
    )
    return max(
      self.step_bytes(num_sequences, context) / self.peaks.bytes_per_s,
      products / self.peaks.flops_per_s[self.dtype],
    )

  def tokens_per_s(self, num_sequences: int, context: float) -> float:
    """Returns the upper bound of decoding speed, of all sequences together."""
    return num_sequences / self.step_seconds(num_sequences, context)

  def compute_bound_batch(self, context: float) -> int | None:
    """Returns the smallest batch whose products take longer than its reads.

    None if reading the cache of a token takes longer than its products: then no
    batch is compute-bound.
    """
    per_token = flops.forward_flops_per_token(self.config, context)
    compute = per_token / self.peaks.flops_per_s[self.dtype]

    def is_bound(batch: int) -> bool:
      read = self.step_bytes(batch, context) / self.peaks.bytes_per_s
      return batch * compute >= read

    cache = context * self.kv_bytes_per_token / self.peaks.bytes_per_s
    if compute <= cache:
      return None
    high = 1
    while not is_bound(high):
      high *= 2
    low = high // 2
    while high - low > 1:
      middle = (low + high) // 2
      low, high = (low, middle) if is_bound(middle) else (middle, high)
    return high


def make(
  directory: str, target_name: str = targets.HERE, *, is_compiled: bool = True
) -> Plan:
  """Returns the plan for a frozen directory; reads its manifest only.

  Raises:
    FileNotFoundError, ValueError: the model or the target does not exist.
  """
  manifest = manifest_lib.read(pathlib.Path(directory))
  config = model_config.ModelConfig.from_dict(manifest.model)
  is_here = target_name == targets.HERE
  device = (
    jax.devices()[0]
    if is_here
    else targets.devices(targets.parse(target_name))[0]
  )
  saved, saved_of_step = _saved(manifest, config)
  plan = Plan(
    name=manifest.experiment,
    target=target_name,
    device_kind=device.device_kind,
    peaks=peaks_lib.peaks(device),
    config=config,
    dtype=manifest.dtype,
    num_params=manifest.num_params,
    quantization=manifest.quantization,
    saved_bytes=saved,
    saved_bytes_of_step=saved_of_step,
  )
  if is_here or not is_compiled:
    return plan
  fitting = max(plan.num_sequences(config.max_length), 1)
  sequences = min(1 << fitting.bit_length() - 1, _MOST_COMPILED_SEQUENCES)
  return dataclasses.replace(
    plan,
    compiled=compile_decode_step(plan, device, sequences),
    compiled_sequences=sequences,
  )


def compile_decode_step(
  plan: Plan, device: jax.Device, num_sequences: int
) -> compile_ahead.Program | compile_ahead.OutOfMemory:
  """Compiles the decode steps of sequences that fill the context."""
  mesh = Mesh(np.array([device]), ('device',))
  sharding = NamedSharding(mesh, PartitionSpec())
  engine = engine_config.EngineConfig(max_sequences=num_sequences)
  dtype = jnp.dtype(plan.dtype)
  params, config = (
    jax.eval_shape(
      lambda tree: layout.unstack({'params': tree}, plan.config)[0],
      plan.shapes()['params'],
    ),
    dataclasses.replace(plan.config, scan_layers=False),
  )
  backend = execution.choose(engine, config, dtype, device.platform)
  model = transformer.Transformer(config, dtype, backend.execution)
  tokens = engine.page_tokens(config.max_length)
  per_sequence = -(-config.max_length // tokens)
  state = jax.eval_shape(
    lambda: device_state.init_state(
      model,
      num_slots=num_sequences,
      num_pages=num_sequences * per_sequence + 1,
      page_size=tokens,
      kv_dtype=backend.kv_dtype,
      channels=backend.channels,
      vocab_size=config.vocab_size,
    )
  )
  table_width = engine.table_width(config.max_length)
  _, inputs = inputs_lib.empty(
    inputs_lib.Layout(
      num_sequences, 0, engine.chunk_tokens, table_width, num_sequences
    ),
    padding_slot=num_sequences,
  )

  def put(tree: Any) -> Any:
    return jax.tree.map(
      lambda leaf: jax.ShapeDtypeStruct(
        leaf.shape, leaf.dtype, sharding=sharding
      ),
      tree,
    )

  with jax.set_mesh(mesh):
    return compile_ahead.compile(
      steps.decode_steps.lower(
        put(params),
        put(state),
        put(inputs),
        model=model,
        vocab_size=config.vocab_size,
        most=engine.decode_steps,
      )
    )


def _saved(manifest: manifest_lib.Manifest, config) -> tuple[int, int]:
  if manifest.quantization == stored_kernels.NONE:
    return 0, 0  # the shapes of a model take a moment
  itemsize = jnp.dtype(manifest.dtype).itemsize
  shapes = frozen_format.shapes_of(manifest, config)
  saved = {
    path: itemsize * math.prod(leaf.shape) - leaf.nbytes
    for path, leaf in stored_kernels.by_path(shapes).items()
    if stored_tree.is_stored(leaf)
  }
  total = sum(saved.values())
  # A step looks up rows of an embedding that is not the head, too.
  unread = (
    0 if config.tie_embeddings else saved.get('params/embed/embedding', 0)
  )
  return total, total - unread


def report(plan: Plan) -> str:
  """Returns the plan as text, one line per figure."""
  lines = [*_model_lines(plan), *_speed_lines(plan), *_compiled_lines(plan)]
  return '\n'.join(f'{name:<16} {text}'.rstrip() for name, text in lines)


def _model_lines(plan: Plan):
  limit = plan.peaks.memory_bytes
  yield 'model', f'{plan.name}, {plan.num_params:,} parameters, {plan.dtype}'
  yield (
    'device',
    f'{plan.device_kind} ({plan.target}), one of them:'
    f' {compile_ahead.size(limit) if limit else "unknown"} of memory,'
    f' {plan.peaks.bytes_per_s / 1e9:.4g} GB/s ({plan.peaks.source})',
  )
  if plan.saved_bytes:
    yield 'stored', stored_kernels.summary(plan.quantization, plan.shapes())
  share = f', {plan.weight_bytes / limit:.0%} of the memory' if limit else ''
  yield 'weights', f'{compile_ahead.size(plan.weight_bytes)}{share}'
  yield 'cache', f'{compile_ahead.size(plan.kv_bytes_per_token)} per token'
  if limit and plan.num_sequences(1) == 0:
    yield 'fits', 'NO: not the weights and one token; take a larger device'
  elif limit:
    yield (
      'sequences',
      ', '.join(
        f'{plan.num_sequences(length):,} of {length}'
        for length in _lengths(plan)
      )
      + ' tokens fit',
    )


def _lengths(plan: Plan) -> list[int]:
  """Returns the lengths to report: a quarter, half and all of the context."""
  longest = plan.config.max_length
  return [length for length in (longest // 4, longest // 2, longest) if length]


def _speed_lines(plan: Plan):
  context = plan.config.max_length / 2
  yield 'decode', f'at best, {context:g} tokens of context in each sequence'
  batches = {1: 'alone'}
  most = plan.num_sequences(plan.config.max_length)
  if most > 1:
    batches[most] = 'all that fit'
  for batch, name in batches.items():
    yield (
      '',
      f'{plan.tokens_per_s(batch, context):,.4g} tokens/s with'
      f' {batch:,} ({name})',
    )
  for told, tokens in (('that context', context), ('an empty one', 0)):
    bound = plan.compute_bound_batch(tokens)
    text = 'never' if bound is None else f'from {bound:,} sequences on'
    yield '', f'compute-bound {text}, at {told}'


def _compiled_lines(plan: Plan):
  compiled = plan.compiled
  if compiled is None:
    return
  count, length = plan.compiled_sequences, plan.config.max_length
  formula = plan.bytes_of(count, length)
  told = f'{count} sequences of {length}: '
  if isinstance(compiled, compile_ahead.OutOfMemory):
    needed = compile_ahead.size(compiled.needed) if compiled.needed else 'more'
    available = compile_ahead.size(
      compiled.available or plan.peaks.memory_bytes
    )
    yield 'compiler', f'{told}needs {needed} of {available}: DOES NOT FIT'
    return
  temporaries = compile_ahead.size(compiled.temporaries)
  yield (
    'compiler',
    f'{told}{compile_ahead.size(compiled.in_use)} at its peak (formula'
    f' {compile_ahead.size(formula)}, {formula / compiled.in_use:.1%});'
    f' arguments {compile_ahead.size(compiled.arguments)},'
    f' temporaries {temporaries},'
    f' {compile_ahead.size(compiled.aliased)} updated in place',
  )
