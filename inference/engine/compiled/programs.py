"""Compiles the steps of an engine, so that no request waits for it.

`Programs` compiles `steps.decode_steps` or `steps.prefill` for each shape
(D decodes, X chunks), and `steps.sample` for a few numbers of tokens. It calls
executables, which cannot compile anything. An engine may start with the few
shapes that hold every step, and get the others from another thread: until then
its steps have more padding.

The host's arrays of a step reach a program as one array. A program of decodes
also samples; after a prefill another program does, since the filters of the
sampler take longer to compile than a layer of the model.
"""

from collections.abc import Sequence
from concurrent import futures
import dataclasses
from typing import Any

import jax.numpy as jnp
import numpy as np

from hardware import compilation_cache
from inference.engine import (
  adapter_table,
  device_state,
  engine_config,
  inputs as inputs_lib,
  steps,
)
from inference.engine.compiled import (
  jitted,
  keys as keys_lib,
  late,
  layered,
  layouts,
  lowering,
  pending as pending_lib,
  program_store,
  shapes as shapes_lib,
)
from inference.sampling import sampler as sampler_lib
from models import transformer
from models.layers import adapters as adapters_lib
from models.linear.native import few_rows


class Programs:
  """The compiled programs of one engine."""

  def __init__(
    self,
    *,
    model: transformer.Transformer,
    params: device_state.Params,
    state: device_state.State,
    config: engine_config.EngineConfig,
    context: int,
    vocab_size: int,
    placement: lowering.Placement,
    compile_all: bool = True,
  ):
    """Compiles the programs that steps need.

    Args:
      model: the model that the params belong to.
      params: arrays or shapes, as is `state`; with the table of adapters, if
        the engine has one.
      state: of the engine.
      config: of the engine; it has the shapes of the steps.
      context: most tokens of a sequence.
      vocab_size: V, ids that may be sampled.
      placement: the devices.
      compile_all: False leaves the shapes without which every step can be
        computed to `compile_rest`.
    """
    shapes = [steps.Shape(*shape) for shape in config.step_shapes()]
    self.shapes = sorted(shapes, key=lambda shape: (sum(shape), shape))
    self._context = context
    self.has_grammars = config.constraints
    self.verified = [
      keys_lib.Verified(*shape) for shape in config.verified_shapes()
    ]
    beside = shapes_lib.beside_chunks(self.shapes) if self.verified else []
    self._padding_slot = state.slots.last_B.shape[0] - 1
    self._vocab_size = vocab_size
    # Shapes alone: steps donate the arrays of the state.
    self._params, self._state = device_state.abstract((params, state))
    self._has_adapters = adapters_lib.COLLECTION in self._params
    cheap = few_rows.most_logits(model.execution.unembed)
    sizes = shapes_lib.sample_sizes(max(map(sum, shapes)), cheap)
    self._layouts = layouts.Layouts(
      chunk_tokens=config.chunk_tokens,
      table_width=config.table_width(context),
      sample_sizes=[*sizes, *map(sum, beside[-1:])],
      has_adapters=self._has_adapters,
      is_layered=not placement.is_spread
      and layered.suits(self._params, placement.device.platform),
    )
    self._is_layered = self._layouts.is_layered
    # Of one call. A layered step takes long beside the host's work.
    self.decode_steps = 1 if self._is_layered else config.decode_steps
    self._store = self._opened_store(model, placement)
    self._lowering = lowering.Lowering(
      model=model,
      params=self._params,
      state=self._state,
      layouts=self._layouts,
      placement=placement,
      vocab_size=vocab_size,
      context=context,
      decode_steps=self.decode_steps,
    )
    self._compiled: dict[Any, Any] = {}
    width = max((each.width for each in self.verified), default=0)
    chunks = config.max_mixed_chunks
    self.keys_beside = {  # what samples in each shape
      each: self._layouts.beside(each, chunks, width) for each in sorted(beside)
    }
    first = self.shapes if compile_all else shapes_lib.holding_all(self.shapes)
    names = ['seat', 'recount', 'copy', *['adapt'] * self._has_adapters]
    masks = self._late_masks(first, compile_all)
    self.masks = late.Late(self._compile, placement.device, *masks)
    self._compile([*names, *self._with_sizes(first)])
    if compile_all:
      self._compile(self._verifying())

  def _opened_store(
    self, model: transformer.Transformer, placement: lowering.Placement
  ) -> program_store.Store:
    """Returns the store of programs; those of several devices are not kept."""
    layouts = self._layouts
    return program_store.Store(
      None if placement.is_spread else compilation_cache.directory(),
      placement.device,
      model.config,
      jnp.dtype(model.dtype).name,
      program_store.describe_ports(model.execution),
      program_store.describe((self._params, self._state)),
      (layouts.chunk_tokens, layouts.table_width, self._context),
      (self._vocab_size, layouts.sample_sizes),
      self.decode_steps,
      self._is_layered,
    )

  def _late_masks(
    self, first: list[steps.Shape], compile_all: bool
  ) -> tuple[list[Any], list[Any]]:
    """Returns the keys that a first grammar waits for, and those of all."""
    # On a server it waits for no drafts.
    drafts = self._masked_drafts()
    now = self._of_masks(first) + (drafts if compile_all else [])
    return now, self._of_masks(self.shapes) + drafts

  def compile_rest(self) -> None:
    """Compiles the shapes that are left; another thread may run steps."""
    self._compile(self._with_sizes(self.shapes))
    self._compile(self._verifying())

  def _verifying(self) -> list[Any]:
    """Returns the keys of the programs that verify drafts."""
    keys = [
      key for each in self.verified for key in (keys_lib.Accepted(each), each)
    ]
    sampling = dict.fromkeys(self.keys_beside.values())
    return [*keys, *sampling, *self.keys_beside]

  def _masked_drafts(self) -> list[Any]:
    """Returns the keys of what samples after drafts within grammars."""
    unmasked = map(keys_lib.Accepted, self.verified)
    return [
      dataclasses.replace(each, is_masked=True)
      for each in (*unmasked, *dict.fromkeys(self.keys_beside.values()))
    ]

  def _with_sizes(self, shapes: list[steps.Shape]) -> list[Any]:
    """Returns shapes, and before them the sizes that they sample with."""
    sizes = [
      self._layouts.num_sampled(each)
      for each in shapes
      if each.num_chunks or self._is_layered
    ]
    return [*dict.fromkeys(sizes), *shapes]

  def _of_masks(self, shapes: list[steps.Shape]) -> list[Any]:
    """Returns the keys of the programs that shapes need within grammars."""
    sizes = [self._layouts.num_sampled(each, is_split=True) for each in shapes]
    keys: list[Any] = [keys_lib.Masked(size) for size in dict.fromkeys(sizes)]
    return keys + [
      keys_lib.Forward(each) for each in shapes if self._layouts.is_whole(each)
    ]

  def _compile(self, keys: list[Any]) -> None:
    """Compiles the programs of the keys that have none."""
    # XLA compiles without Python's lock: several programs at once, and the next
    # one is traced meanwhile.
    with futures.ThreadPoolExecutor() as pool:
      made = {
        key: pool.submit(self._store.load, key)
        for key in keys
        if key not in self._compiled
      }
      for key, stored in made.items():
        if stored.result() is None:
          made[key] = pool.submit(
            self._store.keep, key, self._lowering.lowered(key)
          )
      for key, each in made.items():
        self._compiled[key] = each.result()

  def verified_shapes(self, num_spans: int) -> list[keys_lib.Verified]:
    """Returns the smallest shape of each width that holds so many spans.

    Only shapes that are compiled; none if the engine does not speculate.
    """
    widths = sorted({shape.width for shape in self.verified})
    found = [self.verified_for(num_spans, width) for width in widths]
    return list(dict.fromkeys(shape for shape in found if shape))

  def verified_for(
    self, num_spans: int, length: int
  ) -> keys_lib.Verified | None:
    """Returns the smallest shape that holds spans of up to `length` tokens.

    None if none is compiled: the engine does not speculate, or not yet.
    """
    held = [
      shape
      for shape in self.verified
      if shape.num_spans >= num_spans
      and shape.width >= length
      and shape in self._compiled
    ]
    return min(
      held, key=lambda shape: (shape.width, shape.num_spans), default=None
    )

  def beside_shapes(
    self, num_decodes: int, num_chunks: int
  ) -> list[steps.Shape]:
    """Returns the compiled shapes that verify drafts, see `shapes.beside`."""
    return shapes_lib.beside(
      self.keys_beside, self._compiled, num_decodes, num_chunks
    )

  def empty_verified(
    self, shape: keys_lib.Verified
  ) -> tuple[np.ndarray, steps.Inputs]:
    """Returns inputs of padding only, as `empty_inputs` does."""
    return inputs_lib.empty(
      self._layouts.verified(shape), padding_slot=self._padding_slot
    )

  def verify(
    self,
    shape: keys_lib.Verified,
    params: device_state.Params,
    state: device_state.State,
    flat_I: np.ndarray,
  ) -> tuple[device_state.State, pending_lib.Drafted]:
    """Computes a step that verifies drafts, up to the logits.

    Donates the KV cache of `state`. Arguments are those of `step`.
    """
    inputs: Any = flat_I
    if self._is_layered:
      inputs = inputs_lib.split(flat_I, self._layouts.verified(shape))
    kv_cache, logits_XRV = self._compiled[shape](
      params, state.kv_cache, state.slots.last_B, inputs
    )
    state = state._replace(kv_cache=kv_cache)
    return state, pending_lib.Drafted(shape, logits_XRV, flat_I)

  def accept(
    self,
    state: device_state.State,
    pending: pending_lib.Drafted,
    allowed_XRW: np.ndarray | None = None,
  ) -> tuple[device_state.State, steps.Outputs]:
    """Samples while drafts are right. Donates the slots of `state`.

    Args:
      state: of the engine.
      pending: of `verify`.
      allowed_XRW: bits of the tokens that grammars allow; None: all.
    """
    key, allowed = keys_lib.Accepted(pending.shape), ()
    if allowed_XRW is not None:
      key = keys_lib.Accepted(pending.shape, is_masked=True)
      allowed = (allowed_XRW,)
    slots, outputs = self._compiled[key](
      state.slots, pending.logits_XRV, pending.flat_I, *allowed
    )
    return state._replace(slots=slots), outputs

  def accept_beside(
    self,
    state: device_state.State,
    pending: pending_lib.Beside,
    allowed_XWW: np.ndarray | None = None,
  ) -> tuple[device_state.State, steps.Outputs]:
    """Samples a step that has drafts beside chunks, as `accept` does."""
    key, step, spans_2XW = pending
    allowed = ()
    if allowed_XWW is not None:
      key, allowed = dataclasses.replace(key, is_masked=True), (allowed_XWW,)
    slots, outputs = self._compiled[key](
      state.slots, step.logits_RV, *step.where, spans_2XW, *allowed
    )
    return state._replace(slots=slots), outputs._replace(
      prompt=step.prompt, hidden_MD=step.hidden_MD
    )

  def inputs_of(self, pending: pending_lib.Drafted) -> steps.Inputs:
    """Returns views of the inputs of a step that verifies drafts."""
    return inputs_lib.split(
      pending.flat_I, self._layouts.verified(pending.shape)
    )

  def draft(
    self, compute: Any, key: Any, state: Any, array: np.ndarray
  ) -> np.ndarray | None:
    """Calls a program of a source of drafts, see `drafting.making.Source`."""
    return compute(key, state, array)

  @property
  def can_mask_drafts(self) -> bool:
    """Whether drafts can be verified within grammars."""
    return set(self._masked_drafts()) <= self._compiled.keys()

  def all_allowed(self, *sizes: int) -> np.ndarray:
    """Returns the bits of a step without grammars, uint32 [..., V / 32]."""
    return lowering.all_allowed(sizes, self._vocab_size)

  def shape_for(
    self, num_decodes: int, num_chunks: int, *, is_split: bool = False
  ) -> steps.Shape:
    """Returns the smallest shape that holds so many decodes and chunks.

    Only shapes that are compiled; their size of `sample` is compiled first.
    """
    return next(
      shape
      for shape in self.shapes
      if shape.num_decodes >= num_decodes
      and shape.num_chunks >= num_chunks
      and shape in self._compiled
      and (not is_split or self._is_split(shape))
    )

  def _is_split(self, shape: steps.Shape) -> bool:
    """Returns whether the programs of a split step are compiled."""
    size = keys_lib.Masked(self._layouts.num_sampled(shape, is_split=True))
    return size in self._compiled and (
      not self._layouts.is_whole(shape)
      or keys_lib.Forward(shape) in self._compiled
    )

  def empty_inputs(
    self, shape: steps.Shape, *, is_split: bool = False
  ) -> tuple[np.ndarray, steps.Inputs]:
    """Returns inputs of padding only: one array, and the views of its parts.

    Args:
      shape: of the step.
      is_split: whether they are for `forward`.
    """
    return inputs_lib.empty(
      self._layouts.of(shape, is_split=is_split),
      padding_slot=self._padding_slot,
    )

  def step(
    self,
    shape: steps.Shape,
    params: device_state.Params,
    state: device_state.State,
    flat_I: np.ndarray,
  ) -> tuple[device_state.State, steps.Outputs]:
    """Computes `decode_steps`, or `prefill` and `sample`. Donates `state`.

    Args:
      shape: of the step.
      params: serving params.
      state: of the engine.
      flat_I: the inputs of the step, filled.
    """
    if self._layouts.is_whole(shape):
      return self._compiled[shape](params, state, flat_I)
    return self.sample(*self.forward(shape, params, state, flat_I))

  def forward(
    self,
    shape: steps.Shape,
    params: device_state.Params,
    state: device_state.State,
    flat_I: np.ndarray,
  ) -> tuple[device_state.State, pending_lib.Pending]:
    """Computes a step up to the logits. Donates the KV cache of `state`.

    Arguments are those of `step`; the inputs are those of a split step.
    """
    last_B = state.slots.last_B
    key = keys_lib.Forward(shape) if self._layouts.is_whole(shape) else shape
    program = self._compiled[key]
    if self._is_layered:
      inputs = inputs_lib.split(flat_I, self._layouts.of(shape))
      # Logprobs and hidden states of prompts come last, if there are chunks.
      kv_cache, logits_RV, *of_prompts = program(
        params, state.kv_cache, last_B, inputs
      )
      prompt, hidden_MD = of_prompts or (None, None)
      where = jitted.sampled(inputs)
    elif shape.num_chunks:
      kv_cache, logits_RV, prompt, hidden_MD, where = program(
        params, state.kv_cache, last_B, flat_I
      )
    else:
      prompt = hidden_MD = None
      kv_cache, logits_RV, where = program(
        params, state.kv_cache, last_B, flat_I
      )
    size = self._layouts.num_sampled(shape, is_split=True)
    pending = pending_lib.Pending(logits_RV, prompt, hidden_MD, where, size)
    return state._replace(kv_cache=kv_cache), pending

  def sample(
    self,
    state: device_state.State,
    pending: pending_lib.Pending,
    allowed_RW: np.ndarray | None = None,
  ) -> tuple[device_state.State, steps.Outputs]:
    """Samples the tokens of a step. Donates the slots of `state`.

    Args:
      state: of the engine.
      pending: of `forward`.
      allowed_RW: bits of the tokens that grammars allow; None: all.
    """
    key, allowed = pending.size, ()
    if allowed_RW is not None:
      key, allowed = keys_lib.Masked(pending.size), (allowed_RW,)
    slots, outputs = self._compiled[key](
      state.slots, pending.logits_RV, *pending.where, *allowed
    )
    state = state._replace(slots=slots)
    return state, outputs._replace(
      prompt=pending.prompt, hidden_MD=pending.hidden_MD
    )

  def seat(
    self,
    state: device_state.State,
    rows: Sequence[tuple[int, sampler_lib.Sampler]],
  ) -> device_state.State:
    """Gives slots the settings of sequences. Donates the slots of `state`."""
    slots = state.slots
    for start in range(0, len(rows), lowering.SEATS):
      some = rows[start : start + lowering.SEATS]
      seats_SW = device_state.seats(some, lowering.SEATS, self._padding_slot)
      slots = self._compiled['seat'](slots, seats_SW)
    return state._replace(slots=slots)

  def recount(
    self, state: device_state.State, slot: int, ids, num_prompt_tokens: int
  ) -> device_state.State:
    """Counts the tokens of a sequence. Donates the slots of `state`."""
    ids_T = np.full((self._context,), -1, np.int32)
    ids_T[: len(ids)] = ids
    slots = self._compiled['recount'](
      state.slots, np.int32(slot), ids_T, np.int32(num_prompt_tokens)
    )
    return state._replace(slots=slots)

  def put_adapter(
    self,
    table: adapter_table.Table,
    slot: int,
    row: adapter_table.Table,
  ) -> adapter_table.Table:
    """Writes an adapter into its slot of the table. Donates `table`."""
    return self._compiled['adapt'](table, np.int32(slot), row)

  def copy_pages(self, state: device_state.State, copies) -> device_state.State:
    """Copies pages, (source, target) each. Donates the KV cache of `state`.

    A page may be the source of one copy and the target of a later one: the
    program reads all sources before it writes, and its calls run in order.
    """
    kv_cache = state.kv_cache
    num_pages = kv_cache[0].kv_PQYC.shape[0]
    for start in range(0, len(copies), lowering.COPIES):
      some = copies[start : start + lowering.COPIES]
      source_Z = np.zeros((lowering.COPIES,), np.int32)
      target_Z = np.full((lowering.COPIES,), num_pages, np.int32)
      source_Z[: len(some)], target_Z[: len(some)] = zip(*some, strict=True)
      kv_cache = self._compiled['copy'](kv_cache, source_Z, target_Z)
    return state._replace(kv_cache=kv_cache)
