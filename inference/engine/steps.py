"""The steps of the engine: pure, jitted functions that run on the device.

    state, outputs = decode_steps(params, state, inputs, ...)
    kv_cache, logits_RV = decode_step(params, kv_cache, last_B, inputs, ...)
    kv_cache, logits_RV, prompt = prefill(params, kv_cache, last_B, inputs, ...)
    slots, tokens_R, logprobs = sample(slots, logits_RV, slots_R, ...)

The story in six lines. A sequence first runs `prefill`: its prompt is computed
in chunks of R tokens, which write keys and values into pages of the KV cache.
Then it runs `decode_step` once per token: one token goes in, attends to its
pages, and the logits of the next token come out. `sample` turns logits into
tokens, and keeps the tokens on the device for the next step. `decode_steps`
repeats `decode_step` and `sample` in one program, without the host. All of them
compute many sequences at once, and `prefill` takes decodes along.

The KV cache is an explicit pytree, an argument and a result. Each function
donates the state that it returns, so that it is updated in place; the argument
must not be used again.

One call computes T tokens in one row [1, T]: first D tokens that each continue
a sequence of their own (decodes), then X chunks of R prompt tokens each.
`models.kv_cache` says how pages and page tables belong to them. The tokens that
a grammar allows reach `sample`, after the step has been sent: `constrained`.

`device_state` holds the state, `inputs` fills `Inputs` on the host, and
`programs` compiles these functions for every shape before the engine is ready.
"""

import collections
from collections.abc import Callable
import functools
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp

from inference.engine import device_state
from inference.sampling import (
  logprobs as logprobs_lib,
  penalties,
  sampler as sampler_lib,
  settings as settings_lib,
  vocabulary,
)
from models import (
  execution as execution_lib,
  kv_cache as kv_cache_lib,
  layout,
  transformer,
)
from models.layers import adapters as adapters_lib
from models.linear import invariant


class Shape(NamedTuple):
  """The numbers of decodes and chunks that a step is compiled for."""

  num_decodes: int  # D
  num_chunks: int  # X


# In place of a token: it was not computed, since the sequence had ended or has
# fewer decode steps than others.
NOT_COMPUTED = -2


class Inputs(NamedTuple):
  """The arrays that the host makes for one step; NumPy, all int32.

  R tokens are sampled: after each of the D decodes, after the last token of
  each of the X chunks, and padding up to a size that `sample` is compiled for.
  M is the number of tokens in all chunks, L the pages of a page table.
  """

  tokens_T: Any  # -1: the token that was sampled last in the slot
  positions_T: Any  # -1: padding
  lengths_D: Any  # decode steps of each decode; 0: padding
  decode_table_DL: Any  # page table of each decode
  chunk_table_XL: Any  # page table of each chunk
  rows_R: Any  # index in T of the token that each sampled token follows
  slots_R: Any  # slot of each sampled token; the last slot: it is not kept
  forced_R: Any  # token to take instead of a sampled one; -1: none
  targets_M: Any  # token that follows each chunk token in its prompt; -1: none
  prompt_logprobs_X: Any  # alternatives wanted per token; -1: no logprobs


# The same in an engine with adapters; `adapters_E` has the slot in their table,
# of each decode, then of each chunk.
AdaptedInputs: Any = collections.namedtuple(
  'AdaptedInputs', (*Inputs._fields, 'adapters_E')
)


class Outputs(NamedTuple):
  """The results of one dispatch that the host reads.

  S is the number of decode steps; 1 with chunks.
  """

  # int32; -1: the tokens before, or the logits, are not finite; NOT_COMPUTED
  tokens_SR: Any
  # Of those tokens, each with an axis S; None if no request wants them.
  logprobs: logprobs_lib.Logprobs | None
  prompt: logprobs_lib.Logprobs | None  # of targets_M; None without chunks
  hidden_MD: Any = None  # final hidden states of all chunks


def num_computed(outputs: Outputs) -> int:
  """Returns how many steps of a dispatch computed a token; on the host."""
  return int((outputs.tokens_SR != NOT_COMPUTED).any(axis=1).sum())


@functools.partial(
  jax.jit,
  donate_argnames=('state',),
  static_argnames=('model', 'vocab_size', 'most'),
)
def decode_steps(
  params: device_state.Params,
  state: device_state.State,
  inputs: Inputs,
  *,
  model: transformer.Transformer,
  vocab_size: int,
  most: int,
) -> tuple[device_state.State, Outputs]:
  """Computes and samples tokens of D sequences, step by step. Donates `state`.

  A sequence takes part for `inputs.lengths_D` steps, or until a token ends it.
  The call ends when no sequence takes part any more. Its tokens do not depend
  on how many steps a call has: it repeats the same computation.

  Args:
    params: serving params.
    state: of the engine.
    inputs: of the first step, without chunks; R = D.
    model: the model that the params belong to.
    vocab_size: V, ids that may be sampled; the embedding may have more rows.
    most: S, the largest number of steps.

  Returns:
    The state after the steps, and the outputs of all of them.
  """
  num_decodes = len(inputs.slots_R)
  padding_slot = len(state.slots.last_B) - 1

  def takes_part_D(index, slots: device_state.Slots) -> jax.Array:
    is_open_D = ~slots.has_ended_B[inputs.slots_R]
    return (index < inputs.lengths_D) & is_open_D

  def is_left(carry):
    index, state, _ = carry
    return jnp.any(takes_part_D(index, state.slots))

  def step(carry):
    index, state, outputs = carry
    kv_cache, slots = state
    is_part_D = takes_part_D(index, slots)
    now = inputs._replace(
      # The tokens that the host knows are of the first step.
      tokens_T=jnp.where(index == 0, inputs.tokens_T, -1),
      positions_T=jnp.where(is_part_D, inputs.positions_T + index, -1),
      slots_R=jnp.where(is_part_D, inputs.slots_R, padding_slot),
      forced_R=jnp.where(index == 0, inputs.forced_R, -1),
    )
    kv_cache, logits_RV = decode_step(
      params, kv_cache, slots.last_B, now, model=model, vocab_size=vocab_size
    )
    slots, tokens_R, found = sample(
      slots, logits_RV, now.slots_R, now.positions_T + 1, now.forced_R
    )
    tokens_R = jnp.where(is_part_D, tokens_R, NOT_COMPUTED)
    made = Outputs(tokens_R, found, None)
    outputs = jax.tree.map(
      lambda all, one: all.at[index].set(one), outputs, made
    )
    return index + 1, device_state.State(kv_cache, slots), outputs

  num_found = most, num_decodes, settings_lib.MAX_LOGPROBS
  outputs = Outputs(
    jnp.full((most, num_decodes), NOT_COMPUTED),
    logprobs_lib.Logprobs(
      jnp.zeros((most, num_decodes)),
      jnp.full(num_found, -1),
      jnp.zeros(num_found),
    ),
    None,
  )
  first = jnp.int32(0), state, outputs
  _, state, outputs = jax.lax.while_loop(is_left, step, first)
  return state, outputs


@functools.partial(
  jax.jit,
  donate_argnames=('kv_cache',),
  static_argnames=('model', 'vocab_size'),
)
def decode_step(
  params: device_state.Params,
  kv_cache: device_state.KVCache,
  last_B: jax.Array,
  inputs: Inputs,
  *,
  model: transformer.Transformer,
  vocab_size: int,
) -> tuple[device_state.KVCache, jax.Array]:
  """Computes one token of each of D sequences. Donates `kv_cache`.

  Args:
    params: serving params.
    kv_cache: pages of all layers.
    last_B: the token sampled last in each slot.
    inputs: of a step without chunks.
    model: the model that the params belong to.
    vocab_size: V, ids that may be sampled; the embedding may have more rows.

  Returns:
    The KV cache with the keys and values of the D tokens, and the logits of
    the tokens that follow, float32 [R, V].
  """
  hidden_TD, kv_cache = hidden(params, kv_cache, last_B, inputs, model)
  return kv_cache, *finish(model, params, vocab_size, hidden_TD, inputs)


@functools.partial(
  jax.jit,
  donate_argnames=('kv_cache',),
  static_argnames=('model', 'vocab_size'),
)
def prefill(
  params: device_state.Params,
  kv_cache: device_state.KVCache,
  last_B: jax.Array,
  inputs: Inputs,
  *,
  model: transformer.Transformer,
  vocab_size: int,
) -> tuple[device_state.KVCache, jax.Array, logprobs_lib.Logprobs, jax.Array]:
  """Computes X prompt chunks, and D decodes beside them. Donates `kv_cache`.

  Arguments are those of `decode_step`.

  Returns:
    The KV cache with the keys and values of all T tokens, the logits of the
    tokens that follow each decode and each chunk, float32 [R, V], the logprobs
    of the M prompt tokens in `inputs.targets_M`, and the final hidden states of
    the M tokens of the chunks, [M, D].
  """
  hidden_TD, kv_cache = hidden(params, kv_cache, last_B, inputs, model)
  return kv_cache, *finish(model, params, vocab_size, hidden_TD, inputs)


@functools.partial(jax.jit, donate_argnames=('slots',))
def sample(
  slots: device_state.Slots,
  logits_RV: jax.Array,
  slots_R: jax.Array,
  positions_R: jax.Array,
  forced_R: jax.Array,
  allowed_RW: jax.Array | None = None,
) -> tuple[device_state.Slots, jax.Array, logprobs_lib.Logprobs]:
  """Samples R tokens, each with the settings of its slot. Donates `slots`.

  Args:
    slots: of the engine.
    logits_RV: of `decode_step` or `prefill`.
    slots_R: slot that each token is sampled for.
    positions_R: position of each new token.
    forced_R: token to take instead of a sampled one; -1: none.
    allowed_RW: bits of the tokens that a grammar allows; None: all.

  Returns:
    The slots with the tokens in `last_B` and `seen_BV` and the ends in
    `has_ended_B`, the tokens, int32 [R], and their logprobs. The token after
    logits that are not finite is -1; it ends its sequence.
  """
  sampler = sampler_lib.take(slots.sampler, slots_R)
  tokens_R = sampler_lib.sample(
    logits_RV,
    sampler,
    slots.seen_BV,
    positions_R,
    slots_B=slots_R,
    allowed_BW=allowed_RW,
  )
  tokens_R = jnp.where(forced_R < 0, tokens_R, forced_R)
  scored_RV, wanted_R = sampler_lib.scored_logits(
    logits_RV, sampler, slots.seen_BV, positions_R, slots_B=slots_R
  )
  found = logprobs_lib.logprobs(scored_RV, tokens_R, wanted_R)
  is_finite_R = vocabulary.here().all(jnp.isfinite(logits_RV))
  is_end_R = sampler_lib.is_end(tokens_R, sampler, positions_R)
  slots = slots._replace(
    # An id that can be embedded, also after logits that are not finite.
    last_B=slots.last_B.at[slots_R].set(tokens_R),
    has_ended_B=slots.has_ended_B.at[slots_R].max(is_end_R | ~is_finite_R),
    seen_BV=penalties.count(slots.seen_BV, slots_R, tokens_R),
  )
  return slots, jnp.where(is_finite_R, tokens_R, -1), found


def hidden(
  params: device_state.Params,
  kv_cache: device_state.KVCache,
  last_B: jax.Array,
  inputs: Inputs,
  model: transformer.Transformer,
) -> tuple[jax.Array, device_state.KVCache]:
  """Returns the final hidden states [T, D] and the updated KV cache."""
  tokens_1T = _tokens(last_B, inputs)
  pages, kept = parted(kv_cache, model)
  cache = tuple(_layer(each, inputs) for each in pages)
  params = routed(params, adapter_slots(inputs), model.execution)
  hidden_1TD, cache = apply(
    model, params, tokens_1T, inputs.positions_T[None], cache, method='hidden'
  )
  kept = keep(kept, hidden_1TD, inputs)
  return hidden_1TD[0], (*(layer.pages for layer in cache), *kept)


def parted(
  kv_cache: device_state.KVCache, model: transformer.Transformer
) -> tuple[device_state.KVCache, device_state.KVCache]:
  """Returns the pages of layers, and those of hidden states: one or none."""
  num_layers = model.config.num_layers
  return kv_cache[:num_layers], kv_cache[num_layers:]


def keep(
  kept: device_state.KVCache, hidden_1TD: jax.Array, inputs: Inputs
) -> device_state.KVCache:
  """Returns the pages of hidden states with those of a step, if any."""
  return tuple(
    kv_cache_lib.write_hidden(
      _layer(pages, inputs), hidden_1TD, inputs.positions_T[None]
    ).pages
    for pages in kept
  )


def _layer(
  pages: kv_cache_lib.Pages, inputs: Inputs
) -> kv_cache_lib.PagedLayer:
  return kv_cache_lib.PagedLayer(
    pages, inputs.decode_table_DL, inputs.chunk_table_XL
  )


def adapter_slots(inputs: Inputs) -> jax.Array | None:
  """Returns the slot of the adapter of each token, int32 [1, T]."""
  adapters_E = getattr(inputs, 'adapters_E', None)  # of `AdaptedInputs` only
  if adapters_E is None:
    return None
  num_decodes, num_chunks = (
    len(table) for table in (inputs.decode_table_DL, inputs.chunk_table_XL)
  )
  slots_T = adapters_E[:num_decodes]
  if num_chunks:
    chunk_tokens = len(inputs.targets_M) // num_chunks
    slots_M = jnp.repeat(adapters_E[num_decodes:], chunk_tokens)
    slots_T = jnp.concatenate([slots_T, slots_M])
  return slots_T[None]


def routed(
  variables: device_state.Params,
  slots_1T: jax.Array | None,
  execution: execution_lib.Execution,
) -> device_state.Params:
  """Returns variables in which each token of a step has its adapter."""
  if slots_1T is None:
    return variables
  is_apart = execution.by_row is invariant.by_row
  table = adapters_lib.routed(
    variables[adapters_lib.COLLECTION], slots_1T, is_apart=is_apart
  )
  return {**variables, adapters_lib.COLLECTION: table}


def embedded(
  params: device_state.Params,
  last_B: jax.Array,
  inputs: Inputs,
  model: transformer.Transformer,
) -> tuple[jax.Array, transformer.Shared]:
  """Returns the first layer's input, [1, T, D], and what all layers share."""
  tokens_1T, positions_1T = _tokens(last_B, inputs), inputs.positions_T[None]
  return apply(
    model, params, tokens_1T, positions_1T, has_cache=True, method='embedded'
  )


def _tokens(last_B: jax.Array, inputs: Inputs) -> jax.Array:
  num_decodes = inputs.decode_table_DL.shape[0]
  # The host may not know a decode's token yet: it is one step ahead.
  known_D = inputs.tokens_T[:num_decodes]
  last_D = last_B[inputs.slots_R[:num_decodes]]
  known_D = jnp.where(known_D < 0, last_D, known_D)
  return jnp.concatenate([known_D, inputs.tokens_T[num_decodes:]])[None]


def finish(
  model: transformer.Transformer,
  params: device_state.Params,
  vocab_size: int,
  hidden_TD: jax.Array,
  inputs: Inputs,
) -> tuple[Any, ...]:
  """Returns the logits of a step; with chunks, what their prompts want too."""
  logits_of = functools.partial(logits, model, params, vocab_size)
  num_decodes, num_chunks = (
    table.shape[0] for table in (inputs.decode_table_DL, inputs.chunk_table_XL)
  )
  if not num_chunks:
    return (logits_of(hidden_TD[inputs.rows_R]),)
  logits_RV = logits_of(_last(hidden_TD, inputs, num_decodes))
  hidden_MD = hidden_TD[num_decodes:]
  prompt = _prompt_logprobs(hidden_MD, inputs, logits_of)
  return logits_RV, prompt, hidden_MD


def _last(hidden_TD: jax.Array, inputs: Inputs, num_decodes: int) -> jax.Array:
  """Returns the hidden states before the logits, [R, D].

  They are NaN after a chunk with a token that is not finite. Its last token
  need not see that token, if all layers have windows.
  """
  hidden_RD = hidden_TD[inputs.rows_R]
  is_bad_M = ~jnp.all(jnp.isfinite(hidden_TD[num_decodes:]), axis=-1)
  is_bad_M &= inputs.positions_T[num_decodes:] >= 0
  num_chunks = inputs.chunk_table_XL.shape[0]
  is_bad_X = jnp.any(is_bad_M.reshape(num_chunks, -1), axis=1)
  chunks = slice(num_decodes, num_decodes + num_chunks)
  marks_X1 = jnp.where(is_bad_X, jnp.nan, 0).astype(hidden_RD.dtype)[:, None]
  return hidden_RD.at[chunks].add(marks_X1)


def logits(
  model: transformer.Transformer,
  params: device_state.Params,
  vocab_size: int,
  hidden_RD: jax.Array,
) -> jax.Array:
  """Returns the logits of ids below V after final hidden states, [R, V]."""
  # The head is the largest matrix: it sees the tokens that need logits only.
  return apply(model, params, hidden_RD, method='unembed')[..., :vocab_size]


def _prompt_logprobs(
  hidden_MD: jax.Array,
  inputs: Inputs,
  logits_of: Callable[[jax.Array], jax.Array],
) -> logprobs_lib.Logprobs:
  """Returns the logprobs of targets_M; zeros if no chunk asks for them."""
  num_chunks = inputs.prompt_logprobs_X.shape[0]
  hidden_XRD = hidden_MD.reshape(num_chunks, -1, hidden_MD.shape[-1])
  targets_XR = inputs.targets_M.reshape(num_chunks, -1)

  def score(chunk):
    hidden_RD, targets_R, wanted = chunk
    wanted_R = jnp.where(targets_R < 0, -1, wanted)
    return logprobs_lib.logprobs(
      logits_of(hidden_RD), jnp.maximum(targets_R, 0), wanted_R
    )

  # Chunk by chunk: the logits of all chunks at once could be large.
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


def apply(model: transformer.Transformer, params, *args, **fields) -> Any:
  """Applies a method of the model to the params of an engine."""
  # Flax's type of the result of `apply` fits no method in particular.
  return model.apply(layout.whole_kernels(params), *args, **fields)
