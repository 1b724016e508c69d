"""Verification of drafts: several tokens of a sequence in one pass, none lost.

    kv_cache, logits_XRV = verify(params, kv_cache, last_B, inputs, ...)
    slots, outputs = accept(slots, logits_XRV, inputs)

A draft guesses the next tokens of a sequence. `verify` computes the last known
token and its draft as `prefill` computes a chunk, and returns the logits after
each of these tokens. `accept` samples after one token at a time, as decode
steps do, and goes on as long as the sampled token is the next one of the draft.
So a call gives one token more than the draft had right.

**No token changes.** A sampled token is a function of the logits, the settings,
the tokens before it, the key of the sequence and its position
(`sampling.sampler`). Nothing of that depends on the draft: a draft whose token
differs ends the span, and tokens behind it are never sampled. Only the rounding
of the logits may differ from a decode step's, and not with invariant numerics.
That is sampling
from the model itself, with any temperature, filter, penalty or seed. The
rejection sampling of Leviathan et al. (arXiv:2211.17192, algorithm 1) keeps the
distribution, but not the tokens. It accepts a guess x with min(1, p(x) / q(x)),
which is p(x) for a drafter that guesses one token; so does this comparison.

**A chain, not a tree.** A tree verifies several guesses per position. Its
branches need an attention mask of their own, and keys that are moved in the
pages when a branch is taken. A look-up has one guess that is seldom the second
best; and in a batch, the tokens of further branches take the time of other
sequences' tokens.

**Beside prompts.** In a step with prompt chunks, each token of a draft takes
the place of a decode: its row has the pages of its sequence and a position of
its own, and all keys are written before any query reads them. So a step with
drafts is a step with more decodes, of a shape that has a program already; only
the sampling (`accept_beside`) has one of its own.

**One step.** The next draft continues tokens that only the host can read. So
the host sends one verified step and waits for it, where it sends many decode
steps at once, ahead of the device.

Keys and values of wrong tokens stay in the pages. No query sees them: a token
sees positions before its own, and these have been written anew by then.
"""

from collections.abc import Callable
import functools
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp

from inference.engine import device_state, inputs as inputs_lib, steps
from inference.sampling import (
  logprobs as logprobs_lib,
  settings as settings_lib,
)
from models import transformer


@functools.partial(
  jax.jit,
  donate_argnames=('kv_cache',),
  static_argnames=('layout', 'model', 'vocab_size'),
)
def verify(
  params: device_state.Params,
  kv_cache: device_state.KVCache,
  last_B: jax.Array,
  flat_I: jax.Array,
  *,
  layout: inputs_lib.Layout,
  model: transformer.Transformer,
  vocab_size: int,
) -> tuple[device_state.KVCache, jax.Array]:
  """Computes X spans of up to R known tokens each. Donates `kv_cache`.

  Args:
    params: serving params.
    kv_cache: pages of all layers.
    last_B: the token sampled last in each slot; all tokens are known.
    flat_I: the inputs of X chunks, without decodes.
    layout: of the inputs.
    model: the model that the params belong to.
    vocab_size: V, ids that may be sampled.

  Returns:
    The KV cache with the keys and values of all tokens, and the logits of the
    tokens that follow each of them, float32 [X, R, V].
  """
  inputs = inputs_lib.split(flat_I, layout)
  hidden_TD, kv_cache = steps.hidden(params, kv_cache, last_B, inputs, model)
  return kv_cache, *finish(model, params, vocab_size, hidden_TD, inputs)


def finish(
  model: transformer.Transformer,
  params: device_state.Params,
  vocab_size: int,
  hidden_TD: jax.Array,
  inputs: steps.Inputs,
) -> tuple[jax.Array]:
  """Returns the logits after every token, [X, R, V]."""
  logits_TV = steps.logits(model, params, vocab_size, hidden_TD)
  num_spans = inputs.chunk_table_XL.shape[0]
  return (logits_TV.reshape(num_spans, -1, vocab_size),)


@functools.partial(
  jax.jit, donate_argnames=('slots',), static_argnames=('layout',)
)
def accept(
  slots: device_state.Slots,
  logits_XRV: jax.Array,
  flat_I: jax.Array,
  allowed_XRW: jax.Array | None = None,
  *,
  layout: inputs_lib.Layout,
) -> tuple[device_state.Slots, steps.Outputs]:
  """Samples after each token, while drafts are right. Donates `slots`.

  Args:
    slots: of the engine.
    logits_XRV: of `verify`.
    flat_I: its inputs. Spans may be shorter: behind the first position of -1,
      nothing is sampled.
    allowed_XRW: bits of the tokens that grammars allow after each token, if it
      is right; None: all.
    layout: of the inputs.

  Returns:
    The slots after the tokens that were sampled, and the outputs, with S = R:
    NOT_COMPUTED behind a token that a draft has wrong, or that ends its
    sequence.
  """
  inputs = inputs_lib.split(flat_I, layout)
  num_spans, width, _ = logits_XRV.shape
  return _accepted(
    slots,
    _Spans(
      tokens_XR=inputs.tokens_T.reshape(num_spans, width),
      positions_XR=inputs.positions_T.reshape(num_spans, width),
      slots_X=inputs.slots_R,
      forced_X=inputs.forced_R,
    ),
    lambda index: logits_XRV[:, index],
    allowed_XRW,
  )


@functools.partial(jax.jit, donate_argnames=('slots',))
def accept_beside(
  slots: device_state.Slots,
  logits_RV: jax.Array,
  slots_R: jax.Array,
  positions_R: jax.Array,
  forced_R: jax.Array,
  spans_2XW: jax.Array,
  allowed_XWW: jax.Array | None = None,
) -> tuple[device_state.Slots, steps.Outputs]:
  """Samples after a step that has drafts beside chunks. Donates `slots`.

  In such a step each token of a draft has the place of a decode.

  Args:
    slots: of the engine.
    logits_RV: of the step, as are the arguments of `steps.sample` behind them.
    slots_R: slot that each token is sampled for.
    positions_R: position of each new token.
    forced_R: token to take instead of a sampled one; -1: none.
    spans_2XW: the rows of the logits of each span, -1 behind its end; and the
      tokens that it computes. A chunk is a span of one row, its last.
    allowed_XWW: bits of the tokens that grammars allow after each token, if it
      is right; None: all.

  Returns:
    As `accept`, with S = W and a column for each span.
  """
  rows_XW, tokens_XW = spans_2XW
  slots_X, forced_X = slots_R[rows_XW[:, 0]], forced_R[rows_XW[:, 0]]
  found = _Spans(
    tokens_XR=tokens_XW,
    positions_XR=jnp.where(rows_XW < 0, -1, positions_R[rows_XW] - 1),
    slots_X=slots_X,
    forced_X=forced_X,
  )
  return _accepted(
    slots, found, lambda index: logits_RV[rows_XW[:, index]], allowed_XWW
  )


class _Spans(NamedTuple):
  """The known tokens of X spans, after each of which one may be sampled."""

  tokens_XR: jax.Array
  positions_XR: jax.Array  # of each token; -1 behind the end
  slots_X: jax.Array
  forced_X: jax.Array  # token to take after the first one; -1: none


def _accepted(
  slots: device_state.Slots,
  spans: _Spans,
  logits_at: Callable[[jax.Array], jax.Array],
  allowed_XRW: jax.Array | None,
) -> tuple[device_state.Slots, steps.Outputs]:
  """Returns slots and outputs of `accept`.

  Args:
    slots: of the engine.
    spans: what was computed.
    logits_at: returns the logits after token r of every span, [X, V].
    allowed_XRW: see `accept`.
  """
  tokens_XR, positions_XR, slots_X, forced_X = spans
  num_spans, width = tokens_XR.shape
  padding_slot = len(slots.last_B) - 1

  def is_left(carry) -> jax.Array:
    index, is_open_X, *_ = carry
    return (index < width) & jnp.any(is_open_X)

  def step(carry) -> Any:
    index, is_open_X, slots, outputs = carry
    positions_X = jnp.where(is_open_X, positions_XR[:, index], -1)
    slots, sampled_X, found = steps.sample(
      slots,
      logits_at(index),
      jnp.where(is_open_X, slots_X, padding_slot),
      positions_X + 1,
      jnp.where(index == 0, forced_X, -1),
      None if allowed_XRW is None else allowed_XRW[:, index],
    )
    made = steps.Outputs(
      jnp.where(is_open_X, sampled_X, steps.NOT_COMPUTED), found, None
    )
    outputs = jax.tree.map(
      lambda all, one: all.at[index].set(one), outputs, made
    )
    after = jnp.minimum(index + 1, width - 1)
    is_open_X &= (positions_XR[:, after] >= 0) & (index + 1 < width)
    is_open_X &= tokens_XR[:, after] == sampled_X
    is_open_X &= ~slots.has_ended_B[slots_X]
    return index + 1, is_open_X, slots, outputs

  num_found = width, num_spans, settings_lib.MAX_LOGPROBS
  outputs = steps.Outputs(
    jnp.full((width, num_spans), steps.NOT_COMPUTED),
    logprobs_lib.Logprobs(
      jnp.zeros((width, num_spans)),
      jnp.full(num_found, -1),
      jnp.zeros(num_found),
    ),
    None,
  )
  first = jnp.int32(0), positions_XR[:, 0] >= 0, slots, outputs
  _, _, slots, outputs = jax.lax.while_loop(is_left, step, first)
  return slots, outputs
