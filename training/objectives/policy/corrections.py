"""Importance weights of tokens that another policy than the trained one drew.

The sampler computes with other kernels, in another precision or with older
weights than the trainer. With mu the distribution that tokens were drawn from
and pi the trainer's policy before its first step on them, a token weighs

    w = pi / mu     of itself, or of its whole completion

Weights of whole completions have the right expectation and a large variance;
weights of tokens have a bias, because the text before each of them is still
mu's. Truncation (min(w, cap)) and rejection (0 outside of floor to cap) bound
the variance.

References: truncated weights: Espeholt et al. 2018 (arXiv:1802.01561), section
4.1, as used for language models by Yao et al. 2025 (fengyao.notion.site/
off-policy-rl); rejection: Liu et al. 2025, "When speed kills stability".
"""

import dataclasses
import math

import jax
import jax.numpy as jnp

from checks import expect
from training.objectives import port
from training.objectives.policy import sequences

NONE, TOKEN, SEQUENCE = LEVELS = 'none', 'token', 'sequence'
TRUNCATE, REJECT = MODES = 'truncate', 'reject'
# exp(20) is far beyond any cap, and still finite in every sum.
MAX_LOG = 20.0


@dataclasses.dataclass(frozen=True, kw_only=True)
class Correction:
  """The weights of sampled tokens."""

  level: str = NONE  # none | token | sequence
  mode: str = TRUNCATE  # truncate | reject
  cap: float = 2.0  # largest weight
  floor: float = 0.0  # smallest weight that is not rejected

  def validate(self) -> None:
    """Raises ValueError for weights that no run can use."""
    name = 'objective.correction'
    expect.one_of(f'{name}.level', self.level, LEVELS)
    expect.one_of(f'{name}.mode', self.mode, MODES)
    if self.level == NONE:
      default = Correction()
      if self != default:
        raise ValueError(
          f'{name}: got {self} with level = none, expected the defaults: no'
          ' token is corrected; set level to token or sequence'
        )
    if not 1 <= self.cap < math.inf:
      raise ValueError(
        f'{name}.cap: got {self.cap}, expected a number of at least 1, the'
        ' weight of a token whose probabilities agree'
      )
    if not 0 <= self.floor <= 1 or (self.floor and self.mode != REJECT):
      raise ValueError(
        f'{name}.floor: got {self.floor} with mode = {self.mode}, expected a'
        ' number from 0 to 1 with mode = reject, else 0'
      )

  def __call__(
    self, log_ratio_BT: jax.Array, weights_BT: jax.Array, batch: port.Batch
  ) -> tuple[jax.Array, port.Sums]:
    """Returns the weight of each token, [B, T], and sums of all weights.

    Args:
      log_ratio_BT: log(pi / mu) of each token, without gradient.
      weights_BT: weights of the policy term.
      batch: gives the segments.

    Returns:
      The weights; and as means over tokens, or over completions: `importance`
      and `importance_squared` before they are bounded, and `bounded`, the share
      beyond the bounds.
    """
    is_trained_BT = weights_BT > 0
    log_BT = jnp.where(is_trained_BT, log_ratio_BT, 0.0)
    share_BT = is_trained_BT.astype(jnp.float32)
    if self.level == SEQUENCE:
      log_BT = sequences.totals(log_BT, batch)
      lengths_BT = sequences.totals(share_BT, batch)
      share_BT = share_BT / jnp.maximum(lengths_BT, 1.0)
    raw_BT = jnp.exp(jnp.clip(log_BT, -MAX_LOG, MAX_LOG))
    is_beyond_BT = (raw_BT > self.cap) | (raw_BT < self.floor)
    if self.mode == REJECT:
      found_BT = jnp.where(is_beyond_BT, 0.0, raw_BT)
    else:
      found_BT = jnp.minimum(raw_BT, self.cap)
    count = jnp.sum(share_BT)
    sums: port.Sums = {
      name: port.Mean(jnp.sum(values_BT * share_BT), count)
      for name, values_BT in (
        ('importance', raw_BT),
        ('importance_squared', jnp.square(raw_BT)),
        ('bounded', is_beyond_BT),
      )
    }
    return found_BT, sums


def effective_size(metrics: dict[str, jax.Array]) -> dict[str, jax.Array]:
  """Returns the metrics with `ess` in place of the mean square of weights.

  `ess` is the number of samples from pi that would be worth as much as one
  sample of mu, E[w]^2 / E[w^2] (Kish's effective sample size): 1 if pi = mu.
  """
  metrics = dict(metrics)
  squared = metrics.pop('importance_squared')
  metrics['ess'] = metrics['importance'] ** 2 / jnp.maximum(squared, 1e-30)
  return metrics
