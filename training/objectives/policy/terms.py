"""The policy term of each token, and the sums over tokens.

With rho the ratio of new to old probability and A the advantage, a token has
the term

    clipped   min(rho A, clip(rho) A)         PPO, GRPO, DAPO; GSPO by sequence
    cispo     stop_gradient(clip(rho)) A log pi

References: PPO: arXiv:1707.06347, equation 7. GSPO: arXiv:2507.18071, equations
5 to 7. CISPO: MiniMax-M1, arXiv:2506.13585, equations 4 and 5.
"""

from typing import NamedTuple

import jax
import jax.numpy as jnp

from training.objectives import port, segments
from training.objectives.policy import corrections, sequences

TOKEN, SEQUENCE, CONSTANT = AGGREGATIONS = 'token', 'sequence', 'constant'
RATIOS = TOKEN, SEQUENCE
CLIPPED, CISPO = FORMS = 'clipped', 'cispo'


class Shares(NamedTuple):
  """The aggregation of a term: sum of share_BT x values over `count`."""

  share_BT: jax.Array
  count: jax.Array

  def mean(self, values_BT: jax.Array) -> port.Mean:
    # An untrained target may be an id without a token: this avoids 0 x inf.
    total = jnp.where(self.share_BT > 0, values_BT * self.share_BT, 0.0)
    return port.Mean(jnp.sum(total), self.count)


def shares(
  aggregation: str, weights_BT: jax.Array, batch: port.Batch, length: int
) -> Shares:
  """Returns the share of each token.

  Args:
    aggregation: token: a mean over tokens (DAPO, arXiv:2503.14476, equation 8).
      sequence: the mean over completions of their means (GRPO,
      arXiv:2402.03300, equation 3). constant: over completions and a constant
      length (Dr. GRPO, arXiv:2503.20783, section 3.2).
    weights_BT: weights of the term.
    batch: gives the segments.
    length: the constant length, for `constant`.
  """
  if aggregation == TOKEN:
    return Shares(weights_BT, jnp.sum(weights_BT))
  sizes_BU2 = segments.sums(weights_BT, batch['segment_ids'])
  count = jnp.sum(sizes_BU2 > 0, dtype=jnp.float32)
  if aggregation == CONSTANT:
    return Shares(weights_BT / length, count)
  sizes_BT = segments.spread(sizes_BU2, batch['segment_ids'])
  return Shares(weights_BT / jnp.maximum(sizes_BT, 1e-9), count)


def ratios(
  log_ratio_BT: jax.Array, weights_BT: jax.Array, batch: port.Batch, kind: str
) -> jax.Array:
  """Returns new over old probability, of tokens or of whole completions.

  Args:
    log_ratio_BT: log of new over old probability of each token.
    weights_BT: above 0 at the tokens of the completion.
    batch: gives the segments.
    kind: token; or sequence: the geometric mean over the tokens of each
      completion, GSPO.
  """
  if kind == SEQUENCE:
    is_trained_BT = (weights_BT > 0).astype(jnp.float32)
    log_BT = jnp.where(weights_BT > 0, log_ratio_BT, 0.0)
    sizes_BT = sequences.totals(is_trained_BT, batch)
    log_ratio_BT = sequences.totals(log_BT, batch) / jnp.maximum(sizes_BT, 1.0)
  # exp(20) is far beyond any clip, and still has a finite gradient.
  limit = corrections.MAX_LOG
  return jnp.exp(jnp.clip(log_ratio_BT, -limit, limit))


def clipped(
  ratio_BT: jax.Array, advantages_BT: jax.Array, low: float, high: float
) -> tuple[jax.Array, dict[str, jax.Array]]:
  """Returns min(rho A, clip(rho) A), and where it has no gradient, [B, T]."""
  kept_BT = jnp.minimum(
    ratio_BT * advantages_BT, jnp.clip(ratio_BT, low, high) * advantages_BT
  )
  return kept_BT, {
    'clipped_low': (ratio_BT < low) & (advantages_BT < 0),
    'clipped_high': (ratio_BT > high) & (advantages_BT > 0),
  }


def cispo(
  ratio_BT: jax.Array,
  advantages_BT: jax.Array,
  logprobs_BT: jax.Array,
  low: float,
  high: float,
) -> tuple[jax.Array, dict[str, jax.Array]]:
  """Returns sg(clip(rho)) A log pi, and where rho is beyond a limit, [B, T]."""
  bounded_BT = jax.lax.stop_gradient(jnp.clip(ratio_BT, low, high))
  return bounded_BT * advantages_BT * logprobs_BT, {
    'clipped_low': ratio_BT < low,
    'clipped_high': ratio_BT > high,
  }
