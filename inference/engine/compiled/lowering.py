"""Traces the programs of an engine, each by its key.

A key is a shape of a step, a size to sample, a name, or one of `keys`. Programs
that are traced here are compiled and called by `programs`.
"""

import dataclasses
from typing import Any

import jax
import jax.numpy as jnp
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
from inference.sampling import sampler as sampler_lib
from models import kv_cache as kv_cache_lib, transformer
from models.layers import adapters as adapters_lib

COPIES = 8  # pages that one call of `copy_pages` copies
_copy_pages = jax.jit(kv_cache_lib.copy_pages, donate_argnums=0)


@dataclasses.dataclass(frozen=True, kw_only=True)
class Lowering:
  """What the programs of one engine are traced from."""

  model: transformer.Transformer
  params: device_state.Params  # shapes, as `state`
  state: device_state.State
  layouts: layouts_lib.Layouts
  vocab_size: int  # V, ids that may be sampled
  context: int  # most tokens of a sequence
  decode_steps: int  # of one call

  def lowered(self, key: Any) -> Any:
    """Traces the program of a key."""
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
      return device_state.seat.lower(slots, slot, sampler_lib.idle())
    if key == 'adapt':
      table = params[adapters_lib.COLLECTION]
      return jitted.put_adapter.lower(
        table, slot, adapter_table.row_shapes(table)
      )
    if key == 'recount':
      return device_state.recount.lower(slots, slot, ids_T, slot)
    pages_Z = np.zeros((COPIES,), np.int32)
    return _copy_pages.lower(kv_cache, pages_Z, pages_Z)

  @property
  def _static(self) -> dict[str, Any]:
    return {'model': self.model, 'vocab_size': self.vocab_size}

  @property
  def _given(self) -> tuple[Any, ...]:
    """The first arguments of a step that does not sample."""
    return self.params, self.state.kv_cache, self.state.slots.last_B

  def _step(self, shape: steps.Shape) -> Any:
    layout = self.layouts.of(shape)
    flat_I = np.zeros((layout.size,), np.int32)
    if self.layouts.is_layered:
      inputs = inputs_lib.split(flat_I, layout)
      return layered.lower(*self._given, inputs, **self._static)
    if shape.num_chunks:
      return jitted.prefill.lower(
        *self._given, flat_I, layout=layout, **self._static
      )
    return jitted.decode_steps.lower(
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
    return jitted.forward.lower(
      *self._given, flat_I, layout=layout, **self._static
    )

  def _sample(self, key: int | keys_lib.Masked) -> Any:
    size = key.size if isinstance(key, keys_lib.Masked) else key
    logits_RV = jax.ShapeDtypeStruct((size, self.vocab_size), jnp.float32)
    zeros_R = np.zeros((size,), np.int32)
    allowed = ()
    if isinstance(key, keys_lib.Masked):
      allowed = (all_allowed(size, self.vocab_size),)
    return jitted.sample.lower(
      self.state.slots, logits_RV, zeros_R, zeros_R, zeros_R, *allowed
    )

  def _verified(self, key: keys_lib.Verified | keys_lib.Accepted) -> Any:
    shape = key.shape if isinstance(key, keys_lib.Accepted) else key
    layout = self.layouts.verified(shape)
    flat_I = np.zeros((layout.size,), np.int32)
    if isinstance(key, keys_lib.Accepted):
      logits_XRV = jax.ShapeDtypeStruct(
        (shape.num_spans, shape.width, self.vocab_size), jnp.float32
      )
      return verification.accept.lower(
        self.state.slots, logits_XRV, flat_I, layout=layout
      )
    if self.layouts.is_layered:
      inputs = inputs_lib.split(flat_I, layout)
      return layered.lower(
        *self._given, inputs, finish=verification.finish, **self._static
      )
    return verification.verify.lower(
      *self._given, flat_I, layout=layout, **self._static
    )


def all_allowed(size: int, vocab_size: int) -> np.ndarray:
  """Returns the bits of tokens without grammars, uint32 [R, V / 32]."""
  return np.full((size, -(-vocab_size // 32)), 2**32 - 1, np.uint32)
