"""The plan of serving a model: memory and speed, for `serve.py --plan`.

    python serve.py --model=DIR --plan
    python serve.py --model=DIR --plan=v5e:2x4 --engine.tensor=4
    python serve.py --config=experiments/pretrain.py:8b --plan=h100:8

The plan needs the manifest or a config only: no weights are read. Decoding
reads every weight and every cached key and value once per step, so that memory
bandwidth bounds its speed until the batch is large enough to keep the
multipliers busy (Pope et al., arXiv:2211.05102, section 2). For a target
device, the engine's decode step is compiled ahead of time, and the plan shows
the compiler's memory beside the formula's.

Devices that share a model (`--engine.tensor`) each compute a model of their own
parts, so the formulas of a device are those of that smaller model; a step also
sends the sums that `parallel.tensor.ports` lists. The devices of a target that
are left over hold replicas. A model or a head that drafts takes memory; speeds
are those without drafts.
"""

import bisect
from collections.abc import Mapping
import dataclasses
import functools
import math
from typing import Any

import jax
import jax.numpy as jnp
from jax.sharding import AbstractMesh

from checks import expect
from frozen import stored_kernels
from hardware import compile_ahead, peaks as peaks_lib, targets
from inference import drafts
from inference.engine import adapter_table, engine_config
from inference.engine.spread import (
  adapters as adapters_lib,
  layout as layout_lib,
  refusals,
  stored as stored_lib,
)
from inference.planning import (
  compiled as compiled_lib,
  saved as saved_lib,
  subject as subject_lib,
)
from models import flops, kv_cache, model_config
from parallel import mesh as mesh_lib, parallel_config

# Share of the memory left free, for activations, the runtime, and everything
# else that no formula knows.
_MARGIN = 0.05
# Largest batch of the compiled decode step; a power of two, as batches are.
_MOST_COMPILED_SEQUENCES = 64


@dataclasses.dataclass(frozen=True, kw_only=True)
class Plan:
  """The figures of serving one model. Bytes are of one device."""

  subject: subject_lib.Subject
  target: str
  device_kind: str
  peaks: peaks_lib.Peaks
  num_devices: int = 1  # of the target
  tensor: int = 1  # devices that share the model
  experts: int = 1  # groups of these that have experts whole
  # Smaller plans of the same generation, from one device on; see `smallest`.
  slices: tuple[tuple[str, int], ...] = ()  # (name, number of devices)
  num_adapters: int = 0  # places for adapters beside the weights
  adapter_rank: int = 0
  drafting: drafts.Memory = drafts.Memory()  # beside the model
  # Of kernels in fewer bits: the bytes that they save in memory, in the reads
  # of a step, and in those of a step that reads all experts.
  saved_bytes: int = 0
  saved_bytes_of_step: int = 0
  saved_bytes_of_experts: int = 0
  compiled: compile_ahead.Program | compile_ahead.OutOfMemory | None = None
  compiled_sequences: int = 0

  @property
  def config(self) -> model_config.ModelConfig:
    """The config of the model."""
    return self.subject.config

  @property
  def dtype(self) -> str:
    """The dtype of weights, cache and computation."""
    return self.subject.dtype

  @property
  def itemsize(self) -> int:
    """Bytes of one weight, and of one cached channel."""
    return jnp.dtype(self.dtype).itemsize

  @functools.cached_property
  def part(self) -> model_config.ModelConfig:
    """The model that one device computes."""
    return self.config if self.tensor == 1 else self._layout.config(1)

  @property
  def _layout(self) -> layout_lib.Layout:
    return layout_lib.Layout(
      model=self.config,
      vocab_size=self.config.vocab_size,
      num_parts=self.tensor,
      num_expert_groups=self.experts,
    )

  @functools.cached_property
  def _cuts(self) -> Mapping[str, stored_lib.Cut]:
    """How devices share each kernel in fewer bits, by path."""
    if self.tensor == 1 or self.subject.quantization == stored_kernels.NONE:
      return {}
    shapes = layout_lib.separate(self.subject.shapes(), self.config)
    return stored_lib.cuts(self._layout, shapes)

  @functools.cached_property
  def _saved(self) -> saved_lib.Saved:
    """The bytes that kernels in fewer bits save a device."""
    if self.tensor == 1:
      return saved_lib.Saved(
        self.saved_bytes, self.saved_bytes_of_step, self.saved_bytes_of_experts
      )
    saved = {
      path: self.itemsize * cut.num_weights(self.tensor)
      - cut.num_bytes(self.tensor)
      for path, cut in self._cuts.items()
    }
    return saved_lib.with_reads(saved, self.config)

  @property
  def across(self) -> list[stored_lib.Cut]:
    """Kernels whose inputs and outputs are sent in place of their terms."""
    return [cut for cut in self._cuts.values() if cut.is_across]

  @functools.cached_property
  def weight_bytes(self) -> int:
    """Bytes of all weights that a device has."""
    saved = self._saved.memory
    if self.tensor == 1:
      return self.subject.num_params * self.itemsize - saved
    return flops.num_params(self.part) * self.itemsize - saved

  @functools.cached_property
  def adapter_bytes(self) -> int:
    """Bytes of the table of adapters that a device has."""
    if not self.num_adapters:
      return 0
    places: adapter_table.Places = adapter_table.WHOLE
    if self.tensor > 1:
      sizes = parallel_config.ParallelConfig(tensor=self.tensor).sizes(
        self.tensor
      )
      mesh = AbstractMesh(sizes, mesh_lib.AXES)  # no device has to be there
      places = adapters_lib.Places(mesh, self._layout)
    return adapter_table.num_bytes(
      self.subject.shapes(),
      num_adapters=self.num_adapters,
      rank=self.adapter_rank,
      dtype=self.dtype,
      places=places,
    )

  @property
  def held_bytes(self) -> int:
    """Bytes of weights, adapters and what drafts that a device has."""
    drafting = self.drafting.num_bytes(self.part.vocab_size)
    return self.weight_bytes + self.adapter_bytes + drafting

  @property
  def num_replicas(self) -> int:
    """The engines that the devices of the target hold."""
    return self.num_devices // self.tensor

  @property
  def kv_bytes_per_token(self) -> int:
    """Bytes of the cached keys and values of one token, all layers."""
    config = self.part
    rows, width = kv_cache.rows_and_width(config)
    return config.num_layers * rows * width * self.itemsize

  def bytes_of(self, num_sequences: int, length: int) -> float:
    """Returns the bytes of a device: weights, adapters and sequences.

    Args:
      num_sequences: of `length` tokens each.
      length: tokens of a sequence.
    """
    # Float32 logits, and a copy of them: the weights of the sampler's search.
    logits = 2 * 4 * num_sequences * self.part.vocab_size
    per_token = self.kv_bytes_per_token + self.drafting.bytes_per_token
    cache = num_sequences * length * per_token
    return self.held_bytes + cache + logits

  def num_sequences(self, length: int) -> int:
    """Returns how many sequences with `length` tokens fit; may be 0."""
    room = self.peaks.memory_bytes * (1 - _MARGIN) - self.held_bytes
    each = self.bytes_of(1, length) - self.held_bytes
    return max(int(room // each), 0)

  def step_bytes(self, num_sequences: int, context: float) -> float:
    """Returns the bytes of weights and cache that a decode step reads.

    A mixture of experts reads each expert that any token chooses: for B tokens
    that choose A of E experts independently, E (1 - (1 - A/E)^B) experts.
    """
    config = self.part
    weights = flops.num_matmul_params(config)
    saved: float = self._saved.step
    if config.num_experts:
      share = config.num_active_experts / config.num_experts
      taken = config.num_experts * (1 - (1 - share) ** num_sequences)
      each = (flops.num_params(config) - flops.num_active_params(config)) / (
        config.num_experts - config.num_active_experts or 1
      )
      weights += (taken - config.num_active_experts) * each
      saved += self._saved.experts * taken / config.num_experts
    cache = num_sequences * context * self.kv_bytes_per_token
    # A step computes with all places for adapters.
    return weights * self.itemsize - saved + self.adapter_bytes + cache

  @property
  def sums_per_step(self) -> int:
    """The sums over devices in a decode step, sampling left out.

    One after attention and one after the MLP or the experts of each layer, one
    after shared experts, and one of the embedding (`parallel.tensor.ports`).
    Kernels of `across` need no sum, but for the one over groups of experts.
    """
    if self.tensor == 1:
      return 0
    config = self.config
    layers = [config.layer(n) for n in range(config.num_layers)]
    with_shared = bool(config.num_shared_experts) * sum(
      layer.has_experts for layer in layers
    )
    unsummed = [
      cut for cut in self.across if self.experts == 1 or not cut.has_experts
    ]
    return 2 * config.num_layers + with_shared + 1 - len(unsummed)

  def _width_in(self, cut: stored_lib.Cut) -> int:
    """Returns the inputs of a token that devices send for a kernel."""
    copies = self.config.num_active_experts if cut.has_experts else 1
    return cut.width_in * copies

  def sent_bytes(self, num_tokens: int) -> float:
    """Returns the bytes that a device sends in a step of so many tokens."""
    width, share = self.config.model_width, (self.tensor - 1) / self.tensor
    # Over a ring; a sum passes it twice.
    numbers = 2 * self.sums_per_step * width
    numbers += sum(self._width_in(cut) + width for cut in self.across)
    return num_tokens * self.itemsize * numbers * share

  @property
  def sends_no_weight(self) -> bool:
    """Whether no collective of the compiled step is larger than the stream.

    The stream of a step, or the inputs of a kernel of `across`, is the largest
    array that devices should exchange.
    """
    if not isinstance(self.compiled, compile_ahead.Program):
      return True
    # A backend may add in float32, and sends the sums of routed and of shared
    # experts as one.
    joined = 2 if self.config.num_shared_experts else 1
    widths = [self._width_in(cut) for cut in self.across]
    widest = max([joined * self.config.model_width, *widths])
    most = 4 * self.compiled_sequences * widest
    return all(
      each.payload_bytes <= most for each in self.compiled.traffic.collectives
    )

  def step_seconds(
    self, num_sequences: int, context: float, prompt_tokens: int = 0
  ) -> float:
    """Returns the least time of a decode step, in seconds.

    Args:
      num_sequences: that decode.
      context: tokens in the cache of each.
      prompt_tokens: of one prompt in the middle, computed in the same step.
    """
    num_tokens = num_sequences + prompt_tokens
    products = num_tokens * flops.forward_flops_per_token(self.part, context)
    sent, links = self.sent_bytes(num_tokens), self.peaks.link_bytes_per_s
    num_read = num_sequences + (prompt_tokens > 0)
    return max(
      self.step_bytes(num_read, context) / self.peaks.bytes_per_s,
      products / self.peaks.flops_per_s[self.dtype],
      sent / links if links else 0.0,
    )

  def tokens_per_s(self, num_sequences: int, context: float) -> float:
    """Returns the upper bound of a replica, of all sequences together."""
    return num_sequences / self.step_seconds(num_sequences, context)

  def least_prompts(
    self, num_sequences: int, context: float, longer: float
  ) -> int:
    """Returns the prompt tokens that make a decode step `longer` times as long.

    Fewer are computed in the time in which weights and cache are read.
    """
    limit = longer * self.step_seconds(num_sequences, context)

    def is_longer(tokens: int) -> bool:
      return self.step_seconds(num_sequences, context, tokens) >= limit

    high = 1
    while not is_longer(high):
      high *= 2
    return bisect.bisect_left(range(high + 1), True, key=is_longer)

  def prompt_tokens_per_s(self, length: int) -> float:
    """Returns the upper bound of a replica that computes prompts alone.

    Args:
      length: tokens of a prompt; half of them are its mean context.
    """
    seconds = self.step_seconds(0, length / 2, prompt_tokens=length)
    return length / seconds

  @property
  def rate(self) -> float:
    """The most tokens per second of all replicas; 0 if the model does not fit.

    Of as many sequences as fit at full context, with half of it cached.
    """
    length = self.config.max_length
    most = self.num_sequences(length)
    if not most:
      return 0.0
    return self.num_replicas * self.tokens_per_s(most, length / 2)

  def compute_bound_batch(self, context: float) -> int | None:
    """Returns the smallest batch whose products take longer than its reads.

    None if reading the cache of a token takes longer than its products: then no
    batch is compute-bound.
    """
    per_token = flops.forward_flops_per_token(self.part, context)
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
  subject: subject_lib.Subject,
  target_name: str = targets.HERE,
  *,
  tensor: int | None = None,
  experts: int = 1,
  is_compiled: bool = True,
  max_adapters: int = 0,
  max_adapter_rank: int | None = None,
  **drafting: Any,
) -> Plan:
  """Returns the plan for a model.

  Args:
    subject: the model.
    target_name: `here`, or a name that `hardware.targets` knows, as v5e:2x4.
    tensor: devices that share the model; None: as many as give the most tokens
      per second, see `chosen`.
    experts: groups of these devices that share the experts of a mixture.
    is_compiled: whether the decode step is compiled for the target.
    max_adapters: places for adapters.
    max_adapter_rank: of each; None: as in an engine.
    **drafting: `speculation`, `draft_model` and `draft_head` of an engine.

  Raises:
    FileNotFoundError: there is no such model or head that drafts.
    ValueError: the target does not exist, or the engine refuses the model over
      so many devices, or the drafts.
  """
  is_here = target_name == targets.HERE
  target = None if is_here else targets.parse(target_name)
  if target is None:
    devices = jax.local_devices()
  elif is_compiled or target.device_kind not in peaks_lib.DATASHEETS:
    devices = targets.devices(target)
  else:  # no compiler has to be there
    devices = []
  kind = devices[0].device_kind if target is None else target.device_kind
  peaks = peaks_lib.DATASHEETS.get(kind) or peaks_lib.peaks(devices[0])
  saved = saved_lib.of_subject(subject)
  room = engine_config.EngineConfig(
    max_adapters=max_adapters, max_adapter_rank=max_adapter_rank
  ).holding([])
  plan = Plan(
    subject=subject,
    target=target_name,
    device_kind=kind,
    peaks=peaks,
    num_devices=target.num_devices if target else len(devices),
    slices=targets.slices(target) if target else (),
    num_adapters=max_adapters,
    adapter_rank=room.max_adapter_rank or 0,
    drafting=subject.drafting(engine_config.EngineConfig(**drafting)),
    saved_bytes=saved.memory,
    saved_bytes_of_step=saved.step,
    saved_bytes_of_experts=saved.experts,
  )
  if tensor is None:
    plan = chosen(plan) if target else plan
  else:
    _check_degree(plan, tensor, experts)
    plan = dataclasses.replace(plan, tensor=tensor, experts=experts)
  if is_here or not is_compiled:
    return plan
  fitting = max(plan.num_sequences(plan.config.max_length), 1)
  sequences = min(1 << fitting.bit_length() - 1, _MOST_COMPILED_SEQUENCES)
  engine = dataclasses.replace(
    room, tensor=plan.tensor, experts=experts, max_sequences=sequences
  )
  return dataclasses.replace(
    plan,
    compiled=compiled_lib.decode_step(subject, engine, devices),
    compiled_sequences=sequences,
  )


def degrees(plan: Plan) -> list[Plan]:
  """Returns the plans of all numbers of devices that may share the model."""
  found = []
  for tensor in range(1, plan.num_devices + 1):
    engine = engine_config.EngineConfig(tensor=tensor)
    if plan.num_devices % tensor == 0 and not refusals.problem(
      engine, plan.config
    ):
      groups = math.gcd(plan.experts, tensor)
      found.append(dataclasses.replace(plan, tensor=tensor, experts=groups))
  return found


def chosen(plan: Plan) -> Plan:
  """Returns the plan of the degree with the most tokens per second.

  All devices of the target count, with the sequences of full context that they
  hold. Of equal degrees it is the smallest, which sends least; if the model
  fits at none, the largest.
  """
  plans = degrees(plan)
  best = max(plans, key=lambda each: (each.rate, -each.tensor))
  return best if best.rate else plans[-1]


def smallest(plan: Plan) -> tuple[str, Plan] | None:
  """Returns the smallest slice that holds the model, and its plan.

  It holds weights and one sequence of full context, by the formula. None if no
  slice does, or the generation has none.
  """
  length = plan.config.max_length
  for name, num_devices in plan.slices:
    for each in degrees(dataclasses.replace(plan, num_devices=num_devices)):
      if each.num_sequences(length):
        return name, each
  return None


def _check_degree(plan: Plan, tensor: int, experts: int) -> None:
  expect.at_least('--engine.tensor', tensor, 1)
  if plan.num_devices % tensor:
    raise ValueError(
      f'--engine.tensor: got {tensor} with --plan={plan.target}, expected a'
      f' divisor of its {plan.num_devices} devices; change one of them'
    )
  engine = engine_config.EngineConfig(tensor=tensor, experts=experts)
  if tensor > 1:
    refusals.check(engine, plan.config)
