"""Penalties and bias on logits, and the token counts that they need.

`seen_BV` holds, for every sequence and every token of the vocabulary, how often
the completion has the token, and in one bit whether the prompt has it. It is
one int32 array on the device. Each sampled token writes one element.

A change costs nothing if no sequence requests it. It leaves the logits of other
sequences as they are, bit for bit.

References: repetition penalty, Keskar et al., arXiv:1909.05858, equation 1,
except that negative logits are multiplied, as in Transformers and vLLM (divided
as in the paper, they would grow). Presence and frequency penalties and bias:
the documentation of OpenAI's API.
"""

import jax
import jax.numpy as jnp

from inference.sampling import vocabulary

PROMPT_FLAG = 1 << 30  # above any count that fits a context


def recount(
  ids_T: jax.Array, num_prompt_tokens: jax.Array, vocab_size: int
) -> jax.Array:
  """Returns seen_V of one sequence, counted from all of its tokens.

  Args:
    ids_T: int32, the prompt and the completion so far; -1 is no token.
    num_prompt_tokens: length of the prompt.
    vocab_size: static, V.
  """
  ids_T = _local(ids_T, vocab_size)
  is_prompt_T = jnp.arange(ids_T.shape[0]) < num_prompt_tokens
  counts_V = jnp.zeros((vocab_size,), jnp.int32)
  counts_V = counts_V.at[ids_T].add((~is_prompt_T).astype(jnp.int32))
  in_prompt_V = jnp.zeros((vocab_size,), bool).at[ids_T].max(is_prompt_T)
  return counts_V | jnp.where(in_prompt_V, PROMPT_FLAG, 0)


def count(
  seen_BV: jax.Array, slots_R: jax.Array, tokens_R: jax.Array
) -> jax.Array:
  """Counts a sampled token for each slot in `slots_R`; -1 counts none.

  The caller should donate `seen_BV`: otherwise each call copies it.
  """
  slots_R = _drop_negative(slots_R, seen_BV.shape[0])
  tokens_R = _local(tokens_R, seen_BV.shape[1])
  return seen_BV.at[slots_R, tokens_R].add(1, mode='drop')


def penalize(
  logits_BV: jax.Array,
  seen_BV: jax.Array,
  *,
  repetition_B: jax.Array,
  presence_B: jax.Array,
  frequency_B: jax.Array,
  slots_B: jax.Array | None = None,
) -> jax.Array:
  """Applies the repetition, then the presence and the frequency penalty.

  Args:
    logits_BV: float32.
    seen_BV: token counts of `recount` and `count`.
    repetition_B: 1 changes nothing.
    presence_B: 0 changes nothing.
    frequency_B: 0 changes nothing.
    slots_B: the row of each sequence in `seen_BV`; None: in order.
  """

  def penalized(logits_BV):
    # Gathered inside the branch: without penalties the gather would be the
    # largest cost of sampling.
    own_BV = seen_BV if slots_B is None else seen_BV[slots_B]
    counts_BV = own_BV & (PROMPT_FLAG - 1)
    factor_B1 = repetition_B[:, None]
    repeated_BV = jnp.where(
      logits_BV > 0, logits_BV / factor_B1, logits_BV * factor_B1
    )
    repeated_BV = jnp.where(own_BV > 0, repeated_BV, logits_BV)
    fall_BV = frequency_B[:, None] * counts_BV.astype(jnp.float32)
    fall_BV += jnp.where(counts_BV > 0, presence_B[:, None], 0.0)
    # Selected, since even neutral arithmetic turns subnormal numbers into zero.
    return jnp.where(asks_B[:, None], repeated_BV - fall_BV, logits_BV)

  asks_B = (repetition_B != 1) | (presence_B != 0) | (frequency_B != 0)
  return jax.lax.cond(jnp.any(asks_B), penalized, _unchanged, logits_BV)


def add_bias(
  logits_BV: jax.Array, ids_BL: jax.Array, values_BL: jax.Array
) -> jax.Array:
  """Adds a value to the logit of each given id; an id of -1 is skipped."""

  def biased(logits_BV):
    ids = _local(ids_BL, logits_BV.shape[-1])
    rows_B1 = jnp.arange(logits_BV.shape[0])[:, None]
    return logits_BV.at[rows_B1, ids].add(values_BL, mode='drop')

  return jax.lax.cond(jnp.any(ids_BL >= 0), biased, _unchanged, logits_BV)


def forbid(
  logits_BV: jax.Array, ids_BI: jax.Array, is_forbidden_B: jax.Array
) -> jax.Array:
  """Makes the given ids impossible where `is_forbidden_B`; -1 is skipped."""
  ids_BI = jnp.where(is_forbidden_B[:, None], ids_BI, -1)

  def masked(logits_BV):
    ids = _local(ids_BI, logits_BV.shape[-1])
    rows_B1 = jnp.arange(logits_BV.shape[0])[:, None]
    return logits_BV.at[rows_B1, ids].set(-jnp.inf, mode='drop')

  return jax.lax.cond(jnp.any(ids_BI >= 0), masked, _unchanged, logits_BV)


def _local(ids, num_tokens: int) -> jax.Array:
  """Returns ids as indices of an array of tokens, past the end if not in it."""
  return _drop_negative(vocabulary.here().local(ids, num_tokens), num_tokens)


def _drop_negative(ids, size: int) -> jax.Array:
  """Moves negative ids past the end, where writes are dropped."""
  # JAX counts negative indices from the end, as Python does.
  return jnp.where(ids < 0, size, ids)


def _unchanged(logits_BV):
  return logits_BV


def allow(logits_BV: jax.Array, allowed_BW: jax.Array) -> jax.Array:
  """Makes the tokens impossible that a grammar does not allow.

  Args:
    logits_BV: float32.
    allowed_BW: uint32; token v has bit v % 32 of word v // 32.
  """
  num_tokens = logits_BV.shape[-1]
  allowed_BW = vocabulary.here().words(allowed_BW, num_tokens)
  bits_32 = jnp.arange(32, dtype=jnp.uint32)
  bits_BWJ = allowed_BW[:, :, None] >> bits_32[None, None] & 1
  is_allowed_BV = bits_BWJ.reshape(len(allowed_BW), -1)[:, :num_tokens] == 1
  return jnp.where(is_allowed_BV, logits_BV, -jnp.inf)
