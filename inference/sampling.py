"""Picks the next token: greedy, temperature, top-k, top-p and min-p.

The last stage of prefill and of every decode step. Settings are arrays, one
entry per sequence, so that no setting compiles anything anew.

The order is fixed: temperature first, then top-k, then top-p (over the mass
that top-k left), then min-p (relative to the most probable token).

What a sequence samples depends on its logits, its settings, its key and the
position of the token, and on nothing else: the key of a token is
fold_in(sequence key, position), noise is drawn per row, and a row's filters
see that row only. Neighbours in the batch decide at most which branch runs.

References: top-k, Fan et al., arXiv:1805.04833; top-p, Holtzman et al.,
arXiv:1904.09751; min-p, Nguyen et al., arXiv:2407.01082; sampling by Gumbel
noise, Maddison et al., arXiv:1411.0030.
"""

from collections.abc import Sequence
from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

# Below this, temperature means greedy: dividing by less overflows float32.
MIN_TEMPERATURE = 1e-5


class Sampler(NamedTuple):
  """How each sequence of a batch samples."""

  temperature_B: jax.Array  # float32; 0 is greedy
  top_k_B: jax.Array  # int32, tokens; 0 keeps all
  top_p_B: jax.Array  # float32 in (0, 1], probability mass; 1 keeps all
  min_p_B: jax.Array  # float32 in [0, 1), share of the largest probability
  key_B: jax.Array  # typed PRNG keys, one per sequence


def init(
  *,
  temperature: Sequence[float],
  top_k: Sequence[int],
  top_p: Sequence[float],
  min_p: Sequence[float],
  seed: Sequence[int],
) -> Sampler:
  """Returns the sampler of a batch; a seed is an integer in [0, 2**32)."""
  return Sampler(
    temperature_B=jnp.asarray(temperature, jnp.float32),
    top_k_B=jnp.asarray(top_k, jnp.int32),
    top_p_B=jnp.asarray(top_p, jnp.float32),
    min_p_B=jnp.asarray(min_p, jnp.float32),
    key_B=jax.vmap(jax.random.key)(np.asarray(seed, np.uint32)),
  )


def sample(
  logits_BV: jax.Array, sampler: Sampler, positions_B: jax.Array
) -> jax.Array:
  """Returns the next token of each sequence, int32 [B].

  Args:
    logits_BV: float32.
    sampler: the settings of each sequence.
    positions_B: the position that each new token will have.
  """

  def greedy(logits_BV):
    return jnp.argmax(logits_BV, axis=-1).astype(jnp.int32)

  def mixed(logits_BV):
    noisy_BV = filtered_logits(logits_BV, sampler) + _gumbel_noise(
      sampler.key_B, positions_B, logits_BV.shape[-1]
    )
    sampled_B = jnp.argmax(noisy_BV, axis=-1).astype(jnp.int32)
    return jnp.where(_is_greedy(sampler), greedy(logits_BV), sampled_B)

  # An all-greedy batch pays for one argmax: no noise and no filters.
  return jax.lax.cond(jnp.all(_is_greedy(sampler)), greedy, mixed, logits_BV)


def filtered_logits(logits_BV: jax.Array, sampler: Sampler) -> jax.Array:
  """Returns the logits of the distribution that is sampled from, float32.

  Tempered, shifted so that the largest is 0, and -inf where a filter removed
  the token. Rows with temperature 0 are computed as if it were 1.
  """
  is_greedy_B = _is_greedy(sampler)
  temperature_B = jnp.where(is_greedy_B, 1.0, sampler.temperature_B)
  shifted_BV = logits_BV - jnp.max(logits_BV, axis=-1, keepdims=True)
  # Adding zero turns -0.0 into 0.0, which the bit order would tell apart.
  scaled_BV = shifted_BV / temperature_B[:, None] + 0.0

  num_tokens = logits_BV.shape[-1]
  has_top_k_B = (sampler.top_k_B > 0) & (sampler.top_k_B < num_tokens)
  has_top_p_B = sampler.top_p_B < 1.0

  def top_k(keep_BV):
    count_B = sampler.top_k_B.astype(jnp.float32)
    kept_BV = _heaviest(scaled_BV, jnp.ones_like(scaled_BV), count_B)
    return keep_BV & (kept_BV | ~has_top_k_B[:, None])

  def top_p(keep_BV):
    mass_BV = jnp.where(keep_BV, jnp.exp(scaled_BV), 0.0)
    wanted_B = sampler.top_p_B * jnp.sum(mass_BV, axis=-1)
    kept_BV = _heaviest(scaled_BV, mass_BV, wanted_B)
    return keep_BV & (kept_BV | ~has_top_p_B[:, None])

  def unchanged(keep_BV):
    return keep_BV

  # Each search costs 32 passes over the vocabulary: only when asked for.
  keep_BV = jnp.ones(logits_BV.shape, bool)
  for has_filter_B, search in ((has_top_k_B, top_k), (has_top_p_B, top_p)):
    is_needed = jnp.any(has_filter_B & ~is_greedy_B)
    keep_BV = jax.lax.cond(is_needed, search, unchanged, keep_BV)
  # The largest probability survives both, so min-p compares with exp(0).
  keep_BV &= jnp.exp(scaled_BV) >= sampler.min_p_B[:, None]
  return jnp.where(keep_BV, scaled_BV, -jnp.inf)


def _is_greedy(sampler: Sampler) -> jax.Array:
  return sampler.temperature_B < MIN_TEMPERATURE


def _gumbel_noise(key_B, positions_B, num_tokens: int) -> jax.Array:
  """Draws [B, V] noise, each row from its own key and position alone."""

  def row(key, position):
    return jax.random.gumbel(jax.random.fold_in(key, position), (num_tokens,))

  return jax.vmap(row)(key_B, positions_B)


def _heaviest(values_BV, weights_BV, wanted_B) -> jax.Array:
  """Marks the shortest prefix, by falling value, that weighs `wanted_B`.

  Equal values rank by token id. At least one token is kept. With weights of
  one this is top-k, with probabilities top-p.

  The value at which the prefix ends is found by bisection on the 32 bits of
  the floats, which order like unsigned integers once the sign is dealt with.
  Measured on CPU at 50k tokens: 3 ms, where a sort takes 21 ms.
  """
  bits_BV = jax.lax.bitcast_convert_type(values_BV, jnp.uint32)
  sign = jnp.uint32(1 << 31)
  order_BV = jnp.where(bits_BV >= sign, ~bits_BV, bits_BV | sign)

  def weight_where(chosen_BV):
    return jnp.sum(jnp.where(chosen_BV, weights_BV, 0.0), axis=-1)

  def set_bit(index, cut_B):
    candidate_B = cut_B | (sign >> index.astype(jnp.uint32))
    is_heavy_B = weight_where(order_BV >= candidate_B[:, None]) >= wanted_B
    return jnp.where(is_heavy_B, candidate_B, cut_B)

  cut_B = jnp.zeros(wanted_B.shape, jnp.uint32)
  cut_BV = jax.lax.fori_loop(0, 32, set_bit, cut_B)[:, None]
  is_above_BV, is_tied_BV = order_BV > cut_BV, order_BV == cut_BV
  num_tied_before_BV = jnp.cumsum(is_tied_BV, axis=-1) - 1
  weight_before_BV = (
    weight_where(is_above_BV)[:, None] + num_tied_before_BV * weights_BV
  )
  is_wanted_BV = weight_before_BV < wanted_B[:, None]
  return is_above_BV | (is_tied_BV & is_wanted_BV)
