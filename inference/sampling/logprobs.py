"""Log-probabilities of tokens and of their most probable alternatives.

They belong to the model itself: a float32 log-softmax of its logits, before
penalties, bias, temperature and filters, as OpenAI and vLLM report them. The
distribution that a token was drawn from is
`inference.sampling.sampler.filtered_logits`: training on samples asks for that
(`Request.scores_drawn`).

The logprobs of a row depend on that row alone, to the bit: see
`models.layers.row_sums`.
"""

from typing import NamedTuple

import jax
import jax.numpy as jnp

from inference.sampling import settings, vocabulary


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
  batch_size, ids = logits_BV.shape[0], vocabulary.here()
  num_found = min(max_alternatives, ids.size(logits_BV))

  def search(logits_BV):
    return ids.top(logits_BV, num_found)

  def no_search(_):
    shape = batch_size, num_found
    return jnp.zeros(shape), jnp.full(shape, -1, jnp.int32)

  def measured(logits_BV):
    max_B1 = ids.max(logits_BV)
    log_sum_B1 = jnp.log(ids.sum(jnp.exp(logits_BV - max_B1)))[:, None]
    chosen_B1 = ids.take(logits_BV, tokens_B)
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
