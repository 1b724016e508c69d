"""A mixture of experts: a router, many small feed-forward blocks, a few used.

Takes the place of `models.mlp.Mlp` in a block. Every token takes the
`num_active_experts` that the router finds likeliest, weighted by their
probabilities, and the shared experts besides (DeepSeekMoE, arXiv:2401.06066);
the experts themselves are in `models/experts.py`.

What the router is told to do well, it is told by two losses. Both are sums over
rows, like every loss here, so that they do not depend on how a batch is cut up;
balance is therefore judged within each row, as in DeepSeek-V3.
"""

import dataclasses
import functools
from typing import Any

from flax import linen as nn
import jax
import jax.numpy as jnp

from models import (
  config as config_lib,
  execution as execution_lib,
  experts,
  mlp,
  mup,
)


class Moe(nn.Module):
  """Routed experts and shared ones."""

  config: config_lib.ModelConfig
  dtype: Any
  execution: execution_lib.Execution

  @nn.compact
  def __call__(
    self, x_BTD: jax.Array, is_real_BT: jax.Array | None = None
  ) -> tuple[jax.Array, dict[str, jax.Array]]:
    """Returns what is added to the stream, and `routing_sums`.

    Args:
      x_BTD: the normalised stream.
      is_real_BT: whether a token is counted; padding is not. None: all are.
    """
    config = self.config
    # The choice of experts is float32 whatever the rest is computed in: half a
    # bit decides who is chosen (Switch, arXiv:2101.03961, section 2.4).
    logits_BTE = mlp.Linear(
      config.num_experts,
      jnp.float32,
      False,
      mup.router_std(config),
      self.execution.exact_linear,
      name='router',
    )(x_BTD)
    ids_BTA, gates_BTA = self.execution.by_row(
      functools.partial(
        route,
        num_active=config.num_active_experts,
        norm_topk=config.norm_topk,
      ),
      logits_BTE,
    )
    apply = self.execution.apply_experts
    if self.is_initializing():  # with one token, which no mesh can split
      apply = experts.apply_experts
    y_BTD = apply(x_BTD, ids_BTA, gates_BTA, self._kernels(), self.dtype)
    if config.num_shared_experts:
      width = config.num_shared_experts * config.expert_width
      shared = dataclasses.replace(config, mlp_width=width)
      y_BTD = y_BTD + mlp.Mlp(
        shared, self.dtype, self.execution, name='shared'
      )(x_BTD)
    return y_BTD, routing_sums(config, logits_BTE, ids_BTA, is_real_BT)

  def _kernels(self) -> dict[str, jax.Array]:
    config = self.config
    std, out_std = mup.hidden_std(config), mlp.residual_std(config)
    into = config.num_experts, config.model_width, config.expert_width
    shapes = {'up': (into, std)}
    if config.mlp == 'swiglu':
      shapes['gate'] = into, std
    shapes['down'] = (into[0], into[2], into[1]), out_std
    return {
      name: _Kernel(shape, std, name=f'expert_{name}')()
      for name, (shape, std) in shapes.items()
    }


class _Kernel(nn.Module):
  """One matrix per expert, named as those of `mlp.Linear` are."""

  shape: tuple[int, ...]
  init_std: float

  @nn.compact
  def __call__(self) -> jax.Array:
    return self.param(
      'kernel', nn.initializers.normal(self.init_std), self.shape
    )


def route(
  logits_BTE: jax.Array, *, num_active: int, norm_topk: bool
) -> tuple[jax.Array, jax.Array]:
  """Returns the likeliest experts of each token and their weights, [B, T, A].

  Args:
    logits_BTE: float32.
    num_active: A.
    norm_topk: the weights add up to 1 (Mixtral, arXiv:2401.04088, section 2.1)
      rather than to the probability of the chosen ones.
  """
  probs_BTE = jax.nn.softmax(logits_BTE)
  gates_BTA, ids_BTA = jax.lax.top_k(probs_BTE, num_active)
  if norm_topk:
    gates_BTA = gates_BTA / jnp.sum(gates_BTA, axis=-1, keepdims=True)
  return ids_BTA, gates_BTA


def routing_sums(
  config: config_lib.ModelConfig,
  logits_BTE: jax.Array,
  ids_BTA: jax.Array,
  is_real_BT: jax.Array | None,
) -> dict[str, jax.Array]:
  """Returns what one layer's router did, as sums over rows.

  Returns:
    balance_loss: per row 1 if experts share the row evenly, up to E / A if all
      tokens go to the same; times the row's number of tokens, summed. Equations
      17 to 20 of DeepSeek-V3 (arXiv:2412.19437) without the factor alpha.
    router_z_loss: log(sum(exp(logits)))^2 summed over tokens: keeps logits
      small. Equation 5 of ST-MoE (arXiv:2202.08906), before its mean.
    loss: both, each times its weight in the config.
    expert_load: [E], how many tokens went to each expert.
  """
  if is_real_BT is None:
    is_real_BT = jnp.ones(logits_BTE.shape[:2], bool)
  real_BT1 = is_real_BT.astype(jnp.float32)[..., None]
  num_real_B = jnp.sum(real_BT1, axis=(1, 2))
  expert_11E = jnp.arange(config.num_experts)[None, None, :]
  load_BE = sum(
    jnp.sum((ids_BTA[..., a, None] == expert_11E) * real_BT1, axis=1)
    for a in range(config.num_active_experts)
  )
  probs_BE = jnp.sum(jax.nn.softmax(logits_BTE) * real_BT1, axis=1)
  even = config.num_experts / config.num_active_experts
  # Rows of nothing but padding have no tokens, and no loss.
  balance_B = even * jnp.sum(load_BE * probs_BE, axis=1)
  balance = jnp.sum(balance_B / jnp.maximum(num_real_B, 1.0))
  z_BT = jax.nn.logsumexp(logits_BTE, axis=-1) ** 2
  z_sum = jnp.sum(z_BT * real_BT1[..., 0])
  return {
    'balance_loss': balance,
    'router_z_loss': z_sum,
    'loss': config.balance_loss_weight * balance
    + config.router_z_weight * z_sum,
    'expert_load': jnp.sum(load_BE, axis=0),
  }
