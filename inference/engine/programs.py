"""The device side of the engine: pure programs, all compiled before they run.

    pools, logits_RV, prompt = forward(params, pools, last_B, inputs, ...)
    slots, outputs = sample(slots, logits_RV, inputs)

One step computes the tokens of many sequences in one row [1, T]: D tokens that
each continue a sequence, and X chunks of R prompt tokens (`models.kv_cache`
says how pages and tables go with them). `forward` gives the logits behind the
last known token of each; `sample` takes a token from them. What changes the
logits in between, a grammar's mask or a verifier, has its place there.

What stays on the device between steps is `State`, and both programs are given
their part of it to keep (donated); `inputs` is what the host decides anew each
time. A sequence's place among the slots is its slot. There is one more than
sequences: the last one is nobody's, and takes what rows of padding write.

Shapes are chosen up front. `Programs` compiles `forward` for each (D, X) and
`sample` for a few numbers of rows before the engine is ready; what it calls
afterwards are executables, which cannot compile anything.
"""

from collections.abc import Callable
from concurrent import futures
import functools
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from inference.sampling import (
  logprobs as logprobs_lib,
  penalties,
  sampler as sampler_lib,
)
from models import kv_cache, transformer

Params = Any  # the variables of `models.transformer.Transformer`

COPIES = 8  # pages that one call of `copy_pages` copies


Pools = tuple[kv_cache.Pages, ...]  # one per layer


class Slots(NamedTuple):
  """Of each slot: how it samples, and what it has sampled."""

  last_B: jax.Array  # int32, the last token
  sampler: sampler_lib.Sampler
  seen_BV: jax.Array  # tokens so far, see `penalties.recount`


class State(NamedTuple):
  """What the device keeps."""

  pools: Pools
  slots: Slots


class Inputs(NamedTuple):
  """What one step computes; NumPy on the host.

  R rows are sampled: those of the D decode tokens, the last of each of the X
  chunks, and padding up to a number that `sample` is compiled for.
  """

  tokens_T: Any  # int32; -1: the last one sampled in the row's slot
  positions_T: Any  # int32; -1: padding
  decode_table_DL: Any  # int32
  chunk_table_XL: Any  # int32
  rows_R: Any  # int32, which tokens are sampled behind
  slots_R: Any  # int32; the last slot of all: nothing is kept
  forced_R: Any  # int32, taken instead of a sampled token; -1: none
  targets_M: Any  # int32, the token behind each of the chunks' tokens; -1: none
  prompt_logprobs_X: Any  # int32, wanted of each chunk; -1: none


class Outputs(NamedTuple):
  """What one step tells the host."""

  tokens_R: Any  # int32
  logprobs: logprobs_lib.Logprobs  # of those tokens
  prompt: logprobs_lib.Logprobs | None  # of the targets; None without chunks


def init_state(
  model: transformer.Transformer,
  *,
  num_slots: int,
  num_pages: int,
  page_size: int,
  kv_dtype: Any,
  channels: int,
  vocab_size: int,
) -> State:
  """Returns the state of an engine that nobody uses yet."""
  pools = kv_cache.init_pages(
    model.config,
    num_pages=num_pages,
    page_size=page_size,
    dtype=kv_dtype,
    channels=channels,
  )
  slots = Slots(
    last_B=jnp.zeros((num_slots + 1,), jnp.int32),
    sampler=sampler_lib.empty(num_slots + 1),
    seen_BV=jnp.zeros((num_slots + 1, vocab_size), jnp.int32),
  )
  return State(pools, slots)


def forward(
  params: Params,
  pools: Pools,
  last_B: jax.Array,
  inputs: Inputs,
  *,
  model: transformer.Transformer,
  vocab_size: int,
) -> tuple[Pools, jax.Array, logprobs_lib.Logprobs | None]:
  """Computes a step's tokens. Donates `pools`.

  Args:
    params: serving params.
    pools: pages, of all layers.
    last_B: the last token sampled in each slot.
    inputs: what is computed.
    model: what the params belong to.
    vocab_size: ids that may be sampled; the embedding may have spare rows.

  Returns:
    The pools, the logits of the rows that are sampled, and the prompt's scores.
  """
  num_decodes = inputs.decode_table_DL.shape[0]
  known_D = inputs.tokens_T[:num_decodes]
  last_D = last_B[inputs.slots_R[:num_decodes]]
  tokens_T = jnp.concatenate(
    [jnp.where(known_D < 0, last_D, known_D), inputs.tokens_T[num_decodes:]]
  )
  cache = tuple(
    kv_cache.PagedLayer(pool, inputs.decode_table_DL, inputs.chunk_table_XL)
    for pool in pools
  )
  hidden_1TD, cache = _apply(
    model, params, tokens_T[None], inputs.positions_T[None], cache, 'hidden'
  )

  def logits_of(hidden):
    return _apply(model, params, hidden, 'unembed')[..., :vocab_size]

  # The head is the largest matrix: only rows that sample need it.
  logits_RV = logits_of(hidden_1TD[0, inputs.rows_R])
  prompt = None
  if inputs.chunk_table_XL.shape[0]:
    prompt = _prompt_logprobs(hidden_1TD[0, num_decodes:], inputs, logits_of)
  return tuple(layer.pages for layer in cache), logits_RV, prompt


def sample(
  slots: Slots,
  logits_RV: jax.Array,
  slots_R: jax.Array,
  positions_R: jax.Array,
  forced_R: jax.Array,
) -> tuple[Slots, jax.Array, logprobs_lib.Logprobs]:
  """Samples a token for each row. Donates `slots`.

  Args:
    slots: of the engine.
    logits_RV: of `forward`.
    slots_R: which slot a row is sampled for.
    positions_R: the position of the new token.
    forced_R: what is taken instead of a sampled one; -1: none.
  """
  sampler = sampler_lib.take(slots.sampler, slots_R)
  tokens_R = sampler_lib.sample(
    logits_RV, sampler, slots.seen_BV, positions_R, slots_B=slots_R
  )
  tokens_R = jnp.where(forced_R < 0, tokens_R, forced_R)
  found = logprobs_lib.logprobs(logits_RV, tokens_R, sampler.num_logprobs_B)
  slots = slots._replace(
    last_B=slots.last_B.at[slots_R].set(tokens_R),
    seen_BV=penalties.count(slots.seen_BV, slots_R, tokens_R),
  )
  return slots, tokens_R, found


def _prompt_logprobs(
  hidden_MD: jax.Array,
  inputs: Inputs,
  logits_of: Callable[[jax.Array], jax.Array],
) -> logprobs_lib.Logprobs:
  """Scores the targets, chunk by chunk: all logits at once could be large."""
  num_chunks = inputs.prompt_logprobs_X.shape[0]
  hidden_XRD = hidden_MD.reshape(num_chunks, -1, hidden_MD.shape[-1])
  targets_XR = inputs.targets_M.reshape(num_chunks, -1)

  def score(chunk):
    hidden_RD, targets_R, wanted = chunk
    wanted_R = jnp.where(targets_R < 0, -1, wanted)
    return logprobs_lib.logprobs(
      logits_of(hidden_RD), jnp.maximum(targets_R, 0), wanted_R
    )

  chunks = hidden_XRD, targets_XR, inputs.prompt_logprobs_X
  shapes = jax.eval_shape(lambda: jax.lax.map(score, chunks))

  def nothing():
    return jax.tree.map(lambda leaf: jnp.zeros(leaf.shape, leaf.dtype), shapes)

  found = jax.lax.cond(
    jnp.any(inputs.prompt_logprobs_X >= 0),
    lambda: jax.lax.map(score, chunks),
    nothing,
  )
  return jax.tree.map(lambda x: x.reshape(-1, *x.shape[2:]), found)


def seat(slots: Slots, slot: jax.Array, row: sampler_lib.Sampler) -> Slots:
  """Gives a slot to a sequence. Donates `slots`."""
  return slots._replace(sampler=sampler_lib.put(slots.sampler, slot, row))


def recount(
  slots: Slots,
  slot: jax.Array,
  ids_T: jax.Array,
  num_prompt_tokens: jax.Array,
) -> Slots:
  """Counts a sequence's tokens so far, for its penalties. Donates `slots`."""
  vocab_size = slots.seen_BV.shape[1]
  seen_V = penalties.recount(ids_T, num_prompt_tokens, vocab_size)
  return slots._replace(seen_BV=slots.seen_BV.at[slot].set(seen_V))


def _apply(model: transformer.Transformer, params, *args) -> Any:
  # Flax's type for what `apply` returns fits no method in particular.
  *args, method = args
  return model.apply(params, *args, method=method)


class Shape(NamedTuple):
  """What a step is compiled for."""

  num_decodes: int  # D
  num_chunks: int  # X


def empty_inputs(
  shape: Shape,
  *,
  chunk_tokens: int,
  table_width: int,
  num_rows: int,
  nobody: int,
) -> Inputs:
  """Returns inputs of which every row is padding.

  Args:
    shape: of the step.
    chunk_tokens: R of a chunk.
    table_width: L, pages of a sequence of the whole context.
    num_rows: R that are sampled, at least one per decode row and chunk.
    nobody: the slot that is nobody's.
  """
  num_decodes, num_chunks = shape
  num_prompt = num_chunks * chunk_tokens

  def full(*size: int, value: int = 0) -> np.ndarray:
    return np.full(size, value, np.int32)

  return Inputs(
    tokens_T=full(num_decodes + num_prompt),
    positions_T=full(num_decodes + num_prompt, value=-1),
    decode_table_DL=full(num_decodes, table_width),
    chunk_table_XL=full(num_chunks, table_width),
    rows_R=full(num_rows),
    slots_R=full(num_rows, value=nobody),
    forced_R=full(num_rows, value=-1),
    targets_M=full(num_prompt, value=-1),
    prompt_logprobs_X=full(num_chunks, value=-1),
  )


def lower_forward(
  model: transformer.Transformer,
  params: Params,
  pools: Pools,
  last_B: jax.Array,
  inputs: Inputs,
  *,
  vocab_size: int,
) -> Any:
  """Traces `forward`, of arrays or shapes, to be compiled."""
  compute = jax.jit(
    functools.partial(forward, model=model, vocab_size=vocab_size),
    donate_argnums=1,
  )
  return compute.lower(params, pools, last_B, inputs)


class Programs:
  """The compiled programs of one engine."""

  def __init__(
    self,
    *,
    model: transformer.Transformer,
    params: Params,
    state: State,
    shapes: list[Shape],
    chunk_tokens: int,
    table_width: int,
    vocab_size: int,
  ):
    """Compiles everything, XLA's part of it in parallel.

    Args:
      model: what the params belong to.
      params: arrays or shapes, as is `state`.
      state: of the engine.
      shapes: of steps.
      chunk_tokens: R of a chunk.
      table_width: L, pages of a sequence of the whole context.
      vocab_size: ids that may be sampled.
    """
    self.shapes = sorted(shapes, key=lambda shape: (sum(shape), shape))
    self._chunk_tokens = chunk_tokens
    self._table_width = table_width
    self._nobody = state.slots.last_B.shape[0] - 1
    self._max_length = model.config.max_length
    self._row_counts = _row_counts(max(map(sum, shapes)))
    lowered = self._lower(model, params, state, vocab_size)
    # XLA compiles outside Python's lock: several take the time of one.
    with futures.ThreadPoolExecutor() as pool:
      compiled = pool.map(lambda each: each.compile(), lowered.values())
      self._compiled = dict(zip(lowered, compiled, strict=True))

  def _lower(self, model, params, state: State, vocab_size: int):
    """Traces every program: by shape, by number of rows, by name."""
    donate = functools.partial(jax.jit, donate_argnums=0)
    take = donate(sample)
    last_B = state.slots.last_B
    lowered: dict[Any, Any] = {
      shape: lower_forward(
        model,
        params,
        state.pools,
        last_B,
        self.empty_inputs(shape),
        vocab_size=vocab_size,
      )
      for shape in self.shapes
    }
    for rows in self._row_counts:
      logits_RV = jax.ShapeDtypeStruct((rows, vocab_size), jnp.float32)
      zeros_R = np.zeros((rows,), np.int32)
      rows_R = (zeros_R,) * 3
      lowered[rows] = take.lower(state.slots, logits_RV, *rows_R)
    slot = np.int32(0)
    lowered['seat'] = donate(seat).lower(state.slots, slot, sampler_lib.idle())
    ids_T = np.zeros((self._max_length,), np.int32)
    lowered['recount'] = donate(recount).lower(state.slots, slot, ids_T, slot)
    pages_Z = np.zeros((COPIES,), np.int32)
    copy = donate(kv_cache.copy_pages)
    lowered['copy'] = copy.lower(state.pools, pages_Z, pages_Z)
    return lowered

  def shape_for(self, num_decodes: int, num_chunks: int) -> Shape:
    """Returns the smallest shape that holds so many rows and chunks."""
    return next(
      shape
      for shape in self.shapes
      if shape.num_decodes >= num_decodes and shape.num_chunks >= num_chunks
    )

  def empty_inputs(self, shape: Shape) -> Inputs:
    """Returns inputs of which every row is padding."""
    return empty_inputs(
      shape,
      chunk_tokens=self._chunk_tokens,
      table_width=self._table_width,
      num_rows=next(n for n in self._row_counts if n >= sum(shape)),
      nobody=self._nobody,
    )

  def step(
    self, shape: Shape, params: Params, state: State, inputs: Inputs
  ) -> tuple[State, Outputs]:
    """Computes one step. Donates `state`."""
    pools, logits_RV, prompt = self._compiled[shape](
      params, state.pools, state.slots.last_B, inputs
    )
    positions_R = inputs.positions_T[inputs.rows_R] + 1
    slots, tokens_R, found = self._compiled[len(positions_R)](
      state.slots, logits_RV, inputs.slots_R, positions_R, inputs.forced_R
    )
    return State(pools, slots), Outputs(tokens_R, found, prompt)

  def seat(self, state: State, slot: int, row: sampler_lib.Sampler) -> State:
    """Gives a slot to a sequence. Donates its slots."""
    slots = self._compiled['seat'](state.slots, np.int32(slot), row)
    return state._replace(slots=slots)

  def recount(
    self, state: State, slot: int, ids, num_prompt_tokens: int
  ) -> State:
    """Counts a sequence's tokens so far. Donates its slots."""
    ids_T = np.full((self._max_length,), -1, np.int32)
    ids_T[: len(ids)] = ids
    slots = self._compiled['recount'](
      state.slots, np.int32(slot), ids_T, np.int32(num_prompt_tokens)
    )
    return state._replace(slots=slots)

  def copy_pages(self, state: State, copies) -> State:
    """Copies pages, (source, target) each, in order. Donates its pools.

    A page may be the source of one copy and the target of a later one: of one
    call all sources are read first, and calls run in order.
    """
    pools, num_pages = state.pools, state.pools[0].kv_PQYC.shape[0]
    for start in range(0, len(copies), COPIES):
      some = copies[start : start + COPIES]
      source_Z = np.zeros((COPIES,), np.int32)
      target_Z = np.full((COPIES,), num_pages, np.int32)
      source_Z[: len(some)], target_Z[: len(some)] = zip(*some, strict=True)
      pools = self._compiled['copy'](pools, source_Z, target_Z)
    return state._replace(pools=pools)


def _row_counts(most: int) -> list[int]:
  """Numbers of rows that `sample` is compiled for: powers of 4, and `most`.

  Few, since its filters take longer to compile than a layer does; rows that are
  not needed cost little beside a step's products.
  """
  counts = []
  while (rows := 4 ** len(counts)) < most:
    counts.append(rows)
  return [*counts, most]
