"""The memory plan of a version: known before its weights are read.

It counts the arrays that an engine allocates when it starts, and the logits of
its largest step. A margin covers the rest: activations, programs, the runtime.
"""

from collections.abc import Sequence
import dataclasses
import math
from typing import Any

import jax
import jax.numpy as jnp

from frozen import (
  format as frozen_format,
  manifest as manifest_lib,
  stored_kernels,
)
from hardware import host_memory, peaks
from inference import drafts
from inference.engine import (
  adapter_table,
  device_state,
  engine_config,
  execution,
)
from inference.engine.spread import placement as placement_lib
from models import model_config

_MARGIN = 0.05  # of the sum


@dataclasses.dataclass(frozen=True, kw_only=True)
class Plan:
  """The bytes that a version takes on a device; on a CPU, on all of them."""

  weights: int
  kv_cache: int
  sampling: int  # counts of tokens, and logits of the largest step
  adapters: int  # places for adapters
  free: int | None  # when the plan was made; None: unknown

  @property
  def total(self) -> int:
    """Bytes of all parts, with a margin."""
    parts = self.weights, self.kv_cache, self.sampling, self.adapters
    return int(sum(parts) * (1 + _MARGIN))

  def as_json(self) -> dict[str, int | None]:
    """Returns the plan as GET /admin/models shows it."""
    return {**dataclasses.asdict(self), 'total': self.total}

  def __str__(self) -> str:
    """Returns the plan as one line."""
    free = 'unknown' if self.free is None else _size(self.free)
    return (
      f'{_size(self.total)} (weights {_size(self.weights)}, KV cache'
      f' {_size(self.kv_cache)}, sampling {_size(self.sampling)}, adapters'
      f' {_size(self.adapters)}, and a margin) of {free} free'
    )

  def check(self, *, pending: int = 0) -> None:
    """Refuses a version that does not fit.

    Args:
      pending: bytes that other versions, which load now, will take.

    Raises:
      ValueError: the free memory holds less than the total.
    """
    if self.free is not None and self.total + pending > self.free:
      others = f', {_size(pending)} promised to others' if pending else ''
      raise ValueError(
        f'memory: got a need of {self}{others}, expected no more than is free;'
        ' unload another version, give this one less kv_memory, or start the'
        ' server with a smaller --engine.kv_memory'
      )


def plan(
  manifest: manifest_lib.Manifest,
  config: engine_config.EngineConfig,
  devices: Sequence[jax.Device] | None = None,
) -> Plan:
  """Returns the plan of a frozen directory; reads its manifest only.

  Args:
    manifest: of the directory.
    config: of the engine.
    devices: of several processes that share it; None: those of this process.

  Raises:
    ValueError: the config does not suit the model.
  """
  device = jax.local_devices()[0]
  model = model_config.ModelConfig.from_dict(manifest.model)
  dtype: Any = jnp.dtype(manifest.dtype)
  context = config.context(model.max_length)
  shapes = frozen_format.shapes_of(manifest, model)
  weights = stored_kernels.num_bytes(shapes)
  places = adapter_table.WHOLE
  if config.num_parts > 1:
    placement = placement_lib.make(
      config,
      dataclasses.replace(model, scan_layers=False),
      params := device_state.unread(shapes),
      vocab_size=model.vocab_size,
      devices=devices,
    )
    model, weights = placement.model, placement.num_bytes(params)
    places = placement.adapters
  backend = execution.choose(config, model, dtype, device.platform)
  drafting = drafts.memory(config, model, dtype, backend, device.platform)
  weights += drafting.num_bytes(model.vocab_size)
  bytes_per_token = backend.bytes_per_token(model) + drafting.bytes_per_token
  config = config.holding([])
  of_adapters = 0
  if config.max_adapters:
    of_adapters = adapter_table.num_bytes(
      shapes,
      num_adapters=config.max_adapters,
      rank=config.max_adapter_rank or 0,
      dtype=dtype,
      places=places,
    )
  num_pages = config.pool_pages(
    context,
    bytes_per_token=bytes_per_token,
    weight_bytes=weights + of_adapters,
    memory_bytes=peaks.memory_bytes(device),
    is_host=device.platform == 'cpu',
  )
  page_bytes = config.page_tokens(context) * bytes_per_token
  # int32 counts of each slot; float32 logits, and a copy of them.
  num_rows = 3 * config.max_sequences
  # Devices of a CPU are all in the memory of the host.
  num_here = 1
  if device.platform == 'cpu':
    num_here = jax.local_device_count() if devices else config.num_devices
  return Plan(
    weights=num_here * weights,
    kv_cache=num_here * math.ceil(num_pages * page_bytes),
    sampling=num_here * 4 * num_rows * model.vocab_size,
    adapters=num_here * of_adapters,
    free=_free_bytes(device),
  )


def _free_bytes(device: jax.Device) -> int | None:
  if device.platform == 'cpu':
    return host_memory.available_bytes()
  stats = device.memory_stats() or {}
  if 'bytes_limit' not in stats:
    return None
  return stats['bytes_limit'] - stats.get('bytes_in_use', 0)


def _size(num_bytes: float) -> str:
  return f'{num_bytes / 2**20:,.0f} MiB'
