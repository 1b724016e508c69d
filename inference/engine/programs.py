"""Compiles the steps of an engine for every shape, before the engine is ready.

`Programs` compiles `steps.decode_step` and `steps.prefill` for each shape
(D decodes, X chunks), and `steps.sample` for a few numbers of tokens. It calls
executables afterwards, which cannot compile anything: a request never waits for
a compilation.
"""

from concurrent import futures
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from inference.engine import device_state, inputs as inputs_lib, steps
from inference.sampling import sampler as sampler_lib
from models import kv_cache, transformer

COPIES = 8  # pages that one call of `copy_pages` copies


class Programs:
  """The compiled programs of one engine."""

  def __init__(
    self,
    *,
    model: transformer.Transformer,
    params: device_state.Params,
    state: device_state.State,
    shapes: list[steps.Shape],
    chunk_tokens: int,
    table_width: int,
    vocab_size: int,
  ):
    """Compiles everything; XLA compiles several programs in parallel.

    Args:
      model: the model that the params belong to.
      params: arrays or shapes, as is `state`.
      state: of the engine.
      shapes: of the steps.
      chunk_tokens: R, tokens per chunk.
      table_width: L, pages of a sequence that fills the context.
      vocab_size: V, ids that may be sampled.
    """
    self.shapes = sorted(shapes, key=lambda shape: (sum(shape), shape))
    self._chunk_tokens = chunk_tokens
    self._table_width = table_width
    self._padding_slot = state.slots.last_B.shape[0] - 1
    self._max_length = model.config.max_length
    self._sample_sizes = _sample_sizes(max(map(sum, shapes)))
    lowered = self._lower(model, params, state, vocab_size)
    # XLA compiles without Python's lock: several programs at once.
    with futures.ThreadPoolExecutor() as pool:
      compiled = pool.map(lambda each: each.compile(), lowered.values())
      self._compiled = dict(zip(lowered, compiled, strict=True))

  def _lower(self, model, params, state: device_state.State, vocab_size: int):
    """Traces every program; returns them by shape, by size, by name."""
    lowered: dict[Any, Any] = {
      shape: (steps.prefill if shape.num_chunks else steps.decode_step).lower(
        params,
        state.kv_cache,
        state.slots.last_B,
        self.empty_inputs(shape),
        model=model,
        vocab_size=vocab_size,
      )
      for shape in self.shapes
    }
    for size in self._sample_sizes:
      logits_RV = jax.ShapeDtypeStruct((size, vocab_size), jnp.float32)
      zeros_R = np.zeros((size,), np.int32)
      lowered[size] = steps.sample.lower(
        state.slots, logits_RV, zeros_R, zeros_R, zeros_R
      )
    slot = np.int32(0)
    lowered['seat'] = device_state.seat.lower(
      state.slots, slot, sampler_lib.idle()
    )
    ids_T = np.zeros((self._max_length,), np.int32)
    lowered['recount'] = device_state.recount.lower(
      state.slots, slot, ids_T, slot
    )
    pages_Z = np.zeros((COPIES,), np.int32)
    copy = jax.jit(kv_cache.copy_pages, donate_argnums=0)
    lowered['copy'] = copy.lower(state.kv_cache, pages_Z, pages_Z)
    return lowered

  def shape_for(self, num_decodes: int, num_chunks: int) -> steps.Shape:
    """Returns the smallest shape that holds so many decodes and chunks."""
    return next(
      shape
      for shape in self.shapes
      if shape.num_decodes >= num_decodes and shape.num_chunks >= num_chunks
    )

  def empty_inputs(self, shape: steps.Shape) -> steps.Inputs:
    """Returns inputs of padding only."""
    return inputs_lib.empty(
      shape,
      chunk_tokens=self._chunk_tokens,
      table_width=self._table_width,
      num_sampled=next(n for n in self._sample_sizes if n >= sum(shape)),
      padding_slot=self._padding_slot,
    )

  def step(
    self,
    shape: steps.Shape,
    params: device_state.Params,
    state: device_state.State,
    inputs: steps.Inputs,
  ) -> tuple[device_state.State, steps.Outputs]:
    """Computes one step: `prefill` or `decode_step`, then `sample`.

    Donates `state`.
    """
    # The prompt's logprobs, which `decode_step` does not have, come last.
    kv_cache, logits_RV, *prompt = self._compiled[shape](
      params, state.kv_cache, state.slots.last_B, inputs
    )
    positions_R = inputs.positions_T[inputs.rows_R] + 1
    slots, tokens_R, found = self._compiled[len(positions_R)](
      state.slots, logits_RV, inputs.slots_R, positions_R, inputs.forced_R
    )
    outputs = steps.Outputs(tokens_R, found, prompt[0] if prompt else None)
    return device_state.State(kv_cache, slots), outputs

  def seat(
    self, state: device_state.State, slot: int, row: sampler_lib.Sampler
  ) -> device_state.State:
    """Gives a slot the settings of a sequence. Donates the slots of `state`."""
    slots = self._compiled['seat'](state.slots, np.int32(slot), row)
    return state._replace(slots=slots)

  def recount(
    self, state: device_state.State, slot: int, ids, num_prompt_tokens: int
  ) -> device_state.State:
    """Counts the tokens of a sequence. Donates the slots of `state`."""
    ids_T = np.full((self._max_length,), -1, np.int32)
    ids_T[: len(ids)] = ids
    slots = self._compiled['recount'](
      state.slots, np.int32(slot), ids_T, np.int32(num_prompt_tokens)
    )
    return state._replace(slots=slots)

  def copy_pages(self, state: device_state.State, copies) -> device_state.State:
    """Copies pages, (source, target) each. Donates the KV cache of `state`.

    A page may be the source of one copy and the target of a later one: the
    program reads all sources before it writes, and its calls run in order.
    """
    kv_cache = state.kv_cache
    num_pages = kv_cache[0].kv_PQYC.shape[0]
    for start in range(0, len(copies), COPIES):
      some = copies[start : start + COPIES]
      source_Z = np.zeros((COPIES,), np.int32)
      target_Z = np.full((COPIES,), num_pages, np.int32)
      source_Z[: len(some)], target_Z[: len(some)] = zip(*some, strict=True)
      kv_cache = self._compiled['copy'](kv_cache, source_Z, target_Z)
    return state._replace(kv_cache=kv_cache)


def _sample_sizes(most: int) -> list[int]:
  """Returns the sizes that `sample` is compiled for: powers of 4, and `most`.

  Few sizes: its filters take longer to compile than a layer of the model does,
  and padding costs little beside the matrix products of a step.
  """
  sizes = []
  while (size := 4 ** len(sizes)) < most:
    sizes.append(size)
  return [*sizes, most]
