"""Traces the programs of an engine, each by its key.

A key is a shape of a step, a size to sample, a name, or one of `keys`. Programs
that are traced here are compiled and called by `programs`.
"""

import dataclasses
from typing import Any, Protocol

import jax
import numpy as np

from inference.engine import (
  adapter_table,
  device_state,
  inputs as inputs_lib,
  steps,
)
from inference.engine.compiled import (
  jitted,
  keys as keys_lib,
  layered,
  layouts as layouts_lib,
  verification,
)
from models import kv_cache as kv_cache_lib, transformer
from models.layers import adapters as adapters_lib

COPIES = 8  # pages that one call of `copy_pages` copies
SEATS = 16  # sequences that one call of `seat` gives a slot
copy_pages = jax.jit(kv_cache_lib.copy_pages, donate_argnums=0)


class Placement(Protocol):
  """The devices that programs are traced for, see `inference.engine.spread`."""

  @property
  def device(self) -> jax.Device:
    """The first device."""
    ...

  @property
  def is_spread(self) -> bool:
    """Whether programs run over a mesh."""
    ...

  @property
  def vocab_size(self) -> int:
    """The number of ids that a device has logits of."""
    ...

  def logits(self, *rows: int) -> jax.ShapeDtypeStruct:
    """Returns the shape of logits [..., V]."""
    ...

  def lower(self, function: Any, *args: Any, **static: Any) -> Any:
    """Returns a jitted function of an engine's programs, traced."""
    ...


@dataclasses.dataclass(frozen=True, kw_only=True)
class Lowering:
  """What the programs of one engine are traced from."""

  model: transformer.Transformer
  params: device_state.Params  # shapes, as `state`
  state: device_state.State
  layouts: layouts_lib.Layouts
  placement: Placement
  vocab_size: int  # V, ids that may be sampled
  context: int  # most tokens of a sequence
  decode_steps: int  # of one call

  def lowered(self, key: Any) -> Any:
    """Traces the program of a key."""
    if isinstance(key, keys_lib.Beside):
      return self._beside(key)
    if isinstance(key, keys_lib.Verified | keys_lib.Accepted):
      return self._verified(key)
    if isinstance(key, steps.Shape):
      return self._step(key)
    if isinstance(key, keys_lib.Forward):
      return self._forward(key)
    if isinstance(key, int | keys_lib.Masked):
      return self._sample(key)
    params, (kv_cache, slots) = self.params, self.state
    slot, ids_T = np.int32(0), np.zeros((self.context,), np.int32)
    if key == 'seat':
      seats_SW = device_state.seats([], SEATS, padding_slot=0)
      return self.placement.lower(device_state.seat, slots, seats_SW)
    if key == 'adapt':
      table = params[adapters_lib.COLLECTION]
      return self.placement.lower(
        jitted.put_adapter, table, slot, adapter_table.row_shapes(table)
      )
    if key == 'recount':
      return self.placement.lower(
        device_state.recount, slots, slot, ids_T, slot
      )
    pages_Z = np.zeros((COPIES,), np.int32)
    return self.placement.lower(copy_pages, kv_cache, pages_Z, pages_Z)

  @property
  def _static(self) -> dict[str, Any]:
    return {'model': self.model, 'vocab_size': self.placement.vocab_size}

  @property
  def _given(self) -> tuple[Any, Any, Any]:
    """The first arguments of a step that does not sample."""
    return self.params, self.state.kv_cache, self.state.slots.last_B

  def _step(self, shape: steps.Shape) -> Any:
    layout = self.layouts.of(shape)
    flat_I = np.zeros((layout.size,), np.int32)
    if self.layouts.is_layered:
      inputs = inputs_lib.split(flat_I, layout)
      return layered.lower(*self._given, inputs, **self._static)
    if shape.num_chunks:
      return self.placement.lower(
        jitted.prefill, *self._given, flat_I, layout=layout, **self._static
      )
    return self.placement.lower(
      jitted.decode_steps,
      self.params,
      self.state,
      flat_I,
      layout=layout,
      most=self.decode_steps,
      **self._static,
    )

  def _forward(self, key: keys_lib.Forward) -> Any:
    layout = self.layouts.of(key.shape, is_split=True)
    flat_I = np.zeros((layout.size,), np.int32)
    return self.placement.lower(
      jitted.forward, *self._given, flat_I, layout=layout, **self._static
    )

  def _sample(self, key: int | keys_lib.Masked) -> Any:
    size = key.size if isinstance(key, keys_lib.Masked) else key
    logits_RV = self.placement.logits(size)
    zeros_R = np.zeros((size,), np.int32)
    allowed = ()
    if isinstance(key, keys_lib.Masked):
      allowed = (all_allowed((size,), self.vocab_size),)
    return self.placement.lower(
      jitted.sample,
      self.state.slots,
      logits_RV,
      zeros_R,
      zeros_R,
      zeros_R,
      *allowed,
    )

  def _beside(self, key: keys_lib.Beside) -> Any:
    zeros_R = np.zeros((key.size,), np.int32)
    sizes = key.num_decodes + key.num_chunks, key.width
    allowed = (all_allowed(sizes, self.vocab_size),) if key.is_masked else ()
    return self.placement.lower(
      verification.accept_beside,
      self.state.slots,
      self.placement.logits(key.size),
      zeros_R,
      zeros_R,
      zeros_R,
      np.zeros((2, *sizes), np.int32),
      *allowed,
    )

  def _verified(self, key: keys_lib.Verified | keys_lib.Accepted) -> Any:
    shape = key.shape if isinstance(key, keys_lib.Accepted) else key
    layout = self.layouts.verified(shape)
    flat_I = np.zeros((layout.size,), np.int32)
    if isinstance(key, keys_lib.Accepted):
      sizes = shape.num_spans, shape.width
      allowed = ()
      if key.is_masked:
        allowed = (all_allowed(sizes, self.vocab_size),)
      return self.placement.lower(
        verification.accept,
        self.state.slots,
        self.placement.logits(*sizes),
        flat_I,
        *allowed,
        layout=layout,
      )
    if self.layouts.is_layered:
      inputs = inputs_lib.split(flat_I, layout)
      return layered.lower(
        *self._given, inputs, finish=verification.finish, **self._static
      )
    return self.placement.lower(
      verification.verify, *self._given, flat_I, layout=layout, **self._static
    )


def all_allowed(sizes: tuple[int, ...], vocab_size: int) -> np.ndarray:
  """Returns the bits of tokens without grammars, uint32 [..., V / 32]."""
  return np.full((*sizes, -(-vocab_size // 32)), 2**32 - 1, np.uint32)
