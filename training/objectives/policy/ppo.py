"""PPO: the policy term with a critic, a head beside the language model's.

    loss = policy term + value_scale * mean of 1/2 max((V - R)^2, (V' - R)^2)

V is the value of the text before each sampled token, V' is V limited to
value_clip around its value before the batch's first step. `annotate` computes
values once per batch. From the values it computes the advantages and the
returns R by generalised advantage estimation. A completion that was cut off
counts as ended.

References: PPO: arXiv:1707.06347; GAE: arXiv:1506.02438; for language models:
Ouyang et al. 2022 (arXiv:2203.02155), appendix C.4; the limit of the values:
github.com/openai/baselines, ppo2.
"""

import dataclasses
import math

import jax
import jax.numpy as jnp

from training.objectives import advantages as advantages_lib, port, token_loss
from training.objectives.policy import sequences

NAME = 'value'  # name of the head
_ARRAY_BT = port.ArraySpec('BT', jnp.float32)
_MOMENTS = 'return_mean', 'return_square', 'error_mean', 'error_square'


@dataclasses.dataclass(frozen=True, kw_only=True)
class PPO(token_loss.TokenLoss):
  """The policy and its critic.

  Reads `rewards` in place of `advantages`: the reward after each token, float32
  [B, T]. `kl_reward` is subtracted from the rewards before the estimation.
  """

  policy_scale: float = 1.0
  is_sampled: bool = True
  is_whitened: bool = True
  value_scale: float = 0.1
  value_clip: float = 0.2  # 0: no limit
  discount: float = 1.0  # gamma
  gae_decay: float = 0.95  # lambda

  def validate(self):
    super().validate()
    for name, is_set, expected in (
      ('policy_scale', bool(self.policy_scale), 'a number above 0'),
      ('is_sampled', self.is_sampled, 'True: advantages need new text'),
      ('is_stamped', not self.is_stamped, 'False: all terms train all tokens'),
      ('value_scale', 0 < self.value_scale < math.inf, 'a number above 0'),
      ('value_clip', 0 <= self.value_clip < math.inf, 'a number of at least 0'),
      ('discount', 0 < self.discount <= 1, 'above 0 and at most 1'),
      ('gae_decay', 0 <= self.gae_decay <= 1, 'a number from 0 to 1'),
    ):
      if not is_set:
        raise ValueError(
          f'objective.{name}: got {getattr(self, name)!r} for PPO, expected'
          f' {expected}; set it so, or take TokenLoss'
        )
    if self.advantages != advantages_lib.Advantages():
      raise ValueError(
        f'objective.advantages: got {self.advantages} for PPO, expected the'
        ' defaults: the critic is the baseline; leave them out'
      )

  def init_heads(self, config, key):
    """Returns a head whose values are 0."""
    del key
    kernel_D1 = jnp.zeros((config.model_width, 1), jnp.float32)
    return {NAME: {'kernel': kernel_D1, 'bias': jnp.zeros(1, jnp.float32)}}

  @property
  def _active(self):
    return (*super()._active, 'value')

  @property
  def is_penalised(self):
    return False  # the penalty is in the rewards, see `annotate`

  def batch_spec(self):
    names = 'rewards', 'values', 'returns'
    return super().batch_spec() | dict.fromkeys(names, _ARRAY_BT)

  @property
  def annotated(self):
    return (*super().annotated, 'values', 'advantages', 'returns')

  def annotate(self, params, batch, model, *, reference=None):
    """Returns log-probabilities as far as needed, and the critic's arrays."""
    own = self._own(params, batch, model)
    found = self._annotations(own, batch, reference)
    values_BT = _values(params, own.hidden.states_BTD)
    rewards_BT, weights_BT = batch['rewards'], batch['weights']
    if self.kl_reward:
      # The penalty needs log-probabilities of the trained policy, even where
      # the ratios compare with the sampler.
      log_ratio_BT = own.logprobs_BT - found['ref_logprobs']
      rewards_BT -= self.kl_reward * jnp.where(weights_BT > 0, log_ratio_BT, 0)
    advantages_BT, returns_BT = sequences.advantages_and_returns(
      rewards_BT,
      values_BT,
      weights_BT,
      batch,
      discount=self.discount,
      decay=self.gae_decay,
    )
    return found | {
      'values': values_BT,
      'advantages': advantages_BT,
      'returns': returns_BT,
    }

  def _more_terms(self, params, hidden, batch):
    values_BT = _values(params, hidden.states_BTD)
    returns_BT = batch['returns']
    errors_BT = jnp.square(values_BT - returns_BT)
    means = {}
    if self.value_clip:
      limited_BT = batch['values'] + jnp.clip(
        values_BT - batch['values'], -self.value_clip, self.value_clip
      )
      limited_BT = jnp.square(limited_BT - returns_BT)
      means['value_clipped'] = limited_BT > errors_BT
      errors_BT = jnp.maximum(errors_BT, limited_BT)
    gaps_BT = returns_BT - values_BT
    moments = returns_BT, returns_BT**2, gaps_BT, gaps_BT**2
    means |= dict(zip(_MOMENTS, moments, strict=True))
    weights_BT = self._weights(batch, 'value')
    count = jnp.sum(weights_BT)
    return {'value': errors_BT / 2}, {
      name: port.Mean(jnp.sum(x * weights_BT), count)
      for name, x in means.items()
    }

  def derived(self, metrics):
    """Returns the metrics with the explained variance of the returns.

    1 - Var(R - V) / Var(R): 1 for a critic that knows all, 0 for a constant.
    """
    metrics = dict(super().derived(metrics))
    mean, square, error, error_square = map(metrics.pop, _MOMENTS)
    variance = jnp.maximum(square - mean**2, 1e-12)
    unexplained = error_square - error**2
    return metrics | {
      'return': mean,
      'explained_variance': 1 - unexplained / variance,
    }


def _values(params, states_BTD: jax.Array) -> jax.Array:
  """Returns the value before each target, float32 [B, T]."""
  head = params[port.HEADS][NAME]
  return (
    jnp.einsum(
      'BTD,D->BT',
      states_BTD.astype(jnp.float32),
      head['kernel'][:, 0],
      # An accelerator would round the operands; there are few of them.
      precision=jax.lax.Precision.HIGHEST,
    )
    + head['bias'][0]
  )
