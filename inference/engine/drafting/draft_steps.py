"""The steps of a draft model on the device: it catches up, and it drafts.

    kv_cache = extend(params, kv_cache, flat_I, ...)
    kv_cache, tokens_GD = draft(params, kv_cache, slots, flat_I, ...)

`extend` computes chunks of known tokens. `draft` computes the last known tokens
of D sequences, and then the tokens that it samples, one after another in one
program: the host is not asked between them.

A drafted token is sampled as the token that it guesses: with the settings of
the sequence, and with the key of its position. So both models add the same
noise to their logits, and agree more often than two independent samples would
(Gumbel coupling: Daliri et al., arXiv:2408.07978). With the same logits they
always agree.
"""

import functools
import math
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from inference.engine import device_state, inputs as inputs_lib, steps
from inference.sampling import sampler as sampler_lib, vocabulary
from models import transformer

# Known tokens that `draft` computes at most, per sequence. After a draft that
# was right to its end, two are new: its last token, and the one behind it.
KNOWN = 2


class Inputs(NamedTuple):
  """The arrays that the host makes for one call of `draft`, all int32."""

  known_KD: Any  # the last known tokens; the last one at K - 1
  num_known_D: Any  # how many of them are to be computed
  positions_D: Any  # of the last known token
  lengths_D: Any  # tokens to draft; 0: padding
  slots_D: Any
  table_DL: Any  # page tables


def empty(
  num_rows: int, table_width: int, padding_slot: int
) -> tuple[np.ndarray, Inputs]:
  """Returns inputs of padding only: one array, and the views of its parts."""
  flat_I = np.zeros((_size(num_rows, table_width),), np.int32)
  inputs = split(flat_I, num_rows, table_width)
  inputs.slots_D[:] = padding_slot
  return flat_I, inputs


def _size(num_rows: int, table_width: int) -> int:
  return sum(map(math.prod, _shapes(num_rows, table_width)))


def _shapes(num_rows: int, table_width: int) -> Inputs:
  row = (num_rows,)
  return Inputs((KNOWN, num_rows), row, row, row, row, (num_rows, table_width))


def split(flat_I: Any, num_rows: int, table_width: int) -> Inputs:
  """Returns the arrays that lie in one, one after another."""
  arrays, start = [], 0
  for shape in _shapes(num_rows, table_width):
    stop = start + math.prod(shape)
    arrays.append(flat_I[start:stop].reshape(shape))
    start = stop
  return Inputs(*arrays)


@functools.partial(
  jax.jit,
  donate_argnames=('kv_cache',),
  static_argnames=('layout', 'model'),
)
def extend(
  params: device_state.Params,
  kv_cache: device_state.KVCache,
  flat_I: jax.Array,
  *,
  layout: inputs_lib.Layout,
  model: transformer.Transformer,
) -> device_state.KVCache:
  """Computes chunks of known tokens. Donates `kv_cache`.

  Args:
    params: of the draft model.
    kv_cache: its pages.
    flat_I: the inputs of chunks, without decodes.
    layout: of the inputs.
    model: the draft model.
  """
  inputs = inputs_lib.split(flat_I, layout)
  unused_B = jnp.zeros((1,), jnp.int32)
  _, kv_cache = steps.hidden(params, kv_cache, unused_B, inputs, model)
  return kv_cache


@functools.partial(
  jax.jit,
  donate_argnames=('kv_cache',),
  static_argnames=('num_rows', 'most', 'model', 'vocab_size'),
)
def draft(
  params: device_state.Params,
  kv_cache: device_state.KVCache,
  slots: device_state.Slots,
  flat_I: jax.Array,
  *,
  num_rows: int,
  most: int,
  model: transformer.Transformer,
  vocab_size: int,
) -> tuple[device_state.KVCache, jax.Array]:
  """Drafts the next tokens of D sequences. Donates `kv_cache`.

  Args:
    params: of the draft model.
    kv_cache: its pages.
    slots: of the engine, whose settings and counts are read. Counts of drafted
      tokens are not added: with penalties a draft is right less often.
    flat_I: of `empty`, filled.
    num_rows: D.
    most: G, the largest number of drafted tokens.
    model: the draft model.
    vocab_size: V, ids that may be sampled.

  Returns:
    The KV cache with the keys and values of all these tokens but the last
    drafted ones, and the drafts, int32 [G, D].
  """
  size = _size(num_rows, 0)
  table_width = (flat_I.shape[0] - size) // num_rows
  inputs = split(flat_I, num_rows, table_width)
  sampler = sampler_lib.take(slots.sampler, inputs.slots_D)
  zeros_D = jnp.zeros((num_rows,), jnp.int32)
  is_row_D = inputs.lengths_D > 0
  # Pass K - 1 computes the last known token. Drafted tokens follow.
  first_D = KNOWN - inputs.num_known_D
  first = jnp.min(jnp.where(is_row_D, first_D, KNOWN - 1))
  num_passes = KNOWN - 1 + jnp.max(inputs.lengths_D)

  def is_left(carry) -> jax.Array:
    return carry[0] < num_passes

  def step(carry) -> Any:
    index, kv_cache, last_D, tokens_GD = carry
    known_D = inputs.known_KD[jnp.minimum(index, KNOWN - 1)]
    ends_D = KNOWN - 1 + inputs.lengths_D
    is_part_D = is_row_D & (index >= first_D) & (index < ends_D)
    positions_D = inputs.positions_D + index - (KNOWN - 1)
    now = steps.Inputs(
      tokens_T=jnp.where(index < KNOWN, known_D, last_D),
      positions_T=jnp.where(is_part_D, positions_D, -1),
      lengths_D=zeros_D,
      decode_table_DL=inputs.table_DL,
      chunk_table_XL=jnp.zeros((0, table_width), jnp.int32),
      rows_R=jnp.arange(num_rows),
      slots_R=zeros_D,
      forced_R=zeros_D,
      targets_M=zeros_D[:0],
      prompt_logprobs_X=zeros_D[:0],
    )
    kv_cache, logits_DV = steps.decode_step(
      params, kv_cache, zeros_D, now, model=model, vocab_size=vocab_size
    )
    # Devices that share the model that is served share its vocabulary.
    last_D = sampler_lib.sample(
      vocabulary.here().own(logits_DV, slots.seen_BV.shape[1]),
      sampler,
      slots.seen_BV,
      positions_D + 1,
      slots_B=inputs.slots_D,
    )
    # A token before the last known one has a next token already: its sample is
    # overwritten.
    place = jnp.maximum(index - (KNOWN - 1), 0)
    return index + 1, kv_cache, last_D, tokens_GD.at[place].set(last_D)

  tokens_GD = jnp.zeros((most, num_rows), jnp.int32)
  carry = first, kv_cache, zeros_D, tokens_GD
  _, kv_cache, _, tokens_GD = jax.lax.while_loop(is_left, step, carry)
  return kv_cache, tokens_GD
