"""Log-probabilities of tokens and of their most probable alternatives.

They belong to the model itself: a float32 log-softmax of its logits, before
penalties, bias, temperature and filters, as OpenAI and vLLM report them. The
distribution that a token was drawn from is
`inference.sampling.sampler.filtered_logits`: training on samples asks for that
(`Request.scores_drawn`).

The logprobs of a row depend on that row alone, to the bit: see `row_sum`.
"""

from typing import NamedTuple

import jax
import jax.numpy as jnp

from inference.sampling import settings

# Number of neighbouring pieces that `row_sum` adds at a time, and their size.
_PARTS = 16, 64
# `row_sum` pads a row unless its length is a multiple of this.
ROW_UNIT = _PARTS[0] * _PARTS[1]


class Logprobs(NamedTuple):
  """Log-probabilities of one token per row; zeros where not requested."""

  chosen_B: jax.Array  # float32, of the given token
  ids_BK: jax.Array  # int32, most probable first; -1 where not requested
  values_BK: jax.Array  # float32, of those ids


class TokenLogprobs(NamedTuple):
  """Log-probabilities of one token, on the host."""

  chosen: float
  ids: tuple[int, ...]  # alternatives requested, most probable first
  values: tuple[float, ...]


def logprobs(
  logits_BV: jax.Array,
  tokens_B: jax.Array,
  num_logprobs_B: jax.Array,
  max_alternatives: int = settings.MAX_LOGPROBS,
) -> Logprobs:
  """Returns the log-probabilities of tokens and of their alternatives.

  A token that is also an alternative has the same value in both, to the bit,
  since clients compare the two.

  Args:
    logits_BV: float32, of the model.
    tokens_B: int32, the token of each row.
    num_logprobs_B: int32, the number of alternatives; 0 gives the logprob of
      the token only, -1 gives none.
    max_alternatives: static, K, the largest number of alternatives.
  """
  batch_size, num_tokens = logits_BV.shape
  num_found = min(max_alternatives, num_tokens)

  def search(logits_BV):
    values_BK, ids_BK = jax.lax.top_k(logits_BV, num_found)
    return values_BK, ids_BK.astype(jnp.int32)

  def no_search(_):
    shape = batch_size, num_found
    return jnp.zeros(shape), jnp.full(shape, -1, jnp.int32)

  def measured(logits_BV):
    max_B1 = jnp.max(logits_BV, axis=-1, keepdims=True)
    log_sum_B1 = jnp.log(row_sum(jnp.exp(logits_BV - max_B1)))[:, None]
    chosen_B1 = jnp.take_along_axis(
      logits_BV, tokens_B[:, None], axis=-1, mode='clip'
    )
    values_BK, ids_BK = jax.lax.cond(
      jnp.any(num_logprobs_B > 0), search, no_search, logits_BV
    )
    is_asked_B1 = num_logprobs_B[:, None] >= 0
    is_given_BK = jnp.arange(num_found)[None, :] < num_logprobs_B[:, None]
    return Logprobs(
      jnp.where(is_asked_B1, chosen_B1 - max_B1 - log_sum_B1, 0.0)[:, 0],
      jnp.where(is_given_BK, ids_BK, -1),
      jnp.where(is_given_BK, values_BK - max_B1 - log_sum_B1, 0.0),
    )

  def nothing(logits_BV):
    values_BK, ids_BK = no_search(logits_BV)
    return Logprobs(jnp.zeros((batch_size,)), ids_BK, values_BK)

  found = jax.lax.cond(
    jnp.any(num_logprobs_B >= 0), measured, nothing, logits_BV
  )
  # A vocabulary smaller than K has fewer than K alternatives.
  spare = ((0, 0), (0, max_alternatives - num_found))
  return Logprobs(
    found.chosen_B,
    jnp.pad(found.ids_BK, spare, constant_values=-1),
    jnp.pad(found.values_BK, spare),
  )


def of_row(
  found: Logprobs, row: int | tuple[int, ...], num_logprobs: int
) -> TokenLogprobs:
  """Returns the logprobs of one row as Python numbers.

  Args:
    found: NumPy arrays: one transfer for all rows, not one per row.
    row: index of the row; several numbers if there are more axes than B.
    num_logprobs: alternatives that the row requested.
  """
  return TokenLogprobs(
    float(found.chosen_B[row]),
    tuple(found.ids_BK[row][:num_logprobs].tolist()),
    tuple(found.values_BK[row][:num_logprobs].tolist()),
  )


def row_sum(values_BV: jax.Array) -> jax.Array:
  """Sums each row in an order that depends on its length only.

  The order of the compiler's sum also depends on the number of rows: on CPU it
  adds a row of 259 numbers in one order among 8 rows and in another among 16.
  Then the last bit changes, or the token at the edge of a top-p filter. The
  compiler may not reorder additions that are written out.

  Measured on CPU, 32 rows of a length that needs no padding: 1 to 1.7 times the
  time of the compiler's sum.
  """
  num_rows = values_BV.shape[0]
  while (width := values_BV.shape[-1]) > 1:
    num_parts, size = _PARTS if width > ROW_UNIT else (2, (width + 1) // 2)
    num_spare = -width % (num_parts * size)
    values_BV = jnp.pad(values_BV, ((0, 0), (0, num_spare)))
    pieces = values_BV.reshape(num_rows, -1, num_parts, size)
    # Neighbouring pieces, so that memory is read in one direction. Adding one
    # half of a row to the other took up to six times as long where the length
    # was a power of two.
    while pieces.shape[2] > 1:
      pieces = pieces[:, :, ::2] + pieces[:, :, 1::2]
    values_BV = pieces.reshape(num_rows, -1)
  return values_BV[:, 0]
