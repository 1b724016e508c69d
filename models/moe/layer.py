"""The layer of a mixture of experts: a router and many small MLPs.

It takes the place of `models.layers.mlp.Mlp` in a block. Each token goes to the
`num_active_experts` with the highest router scores, weighted by these scores,
and to all shared experts (DeepSeekMoE, arXiv:2401.06066).
`models/moe/dispatch.py` computes the experts. The choice may be limited to a
few groups of experts. It may also add a correction to the score of each expert,
which does not change the expert's weight (DeepSeek-V3, arXiv:2412.19437,
section 2.1.2). No gradient reaches the corrections: training does not change
them.

Two losses train the router. Both are sums over rows, like every loss of this
project, so that they do not depend on the split of a batch over devices or
micro-batches. Balance is therefore measured within each row, as in DeepSeek-V3.
"""

import dataclasses
import functools
import math
from typing import Any

from flax import linen as nn
import jax
import jax.numpy as jnp

from models import execution as execution_lib, model_config, mup
from models.layers import mlp
from models.linear.stored import tree as stored_tree
from models.moe import dispatch


class Moe(nn.Module):
  """The routed experts and the shared experts of a layer."""

  config: model_config.ModelConfig
  dtype: Any
  execution: execution_lib.Execution

  @nn.compact
  def __call__(
    self, x_BTD: jax.Array, is_real_BT: jax.Array | None = None
  ) -> tuple[jax.Array, dict[str, jax.Array]]:
    """Returns the output, [B, T, D], and the `routing_sums` of the layer.

    Args:
      x_BTD: the normalised residual stream.
      is_real_BT: False for padding, which the sums leave out. None: no padding.
    """
    config = self.config
    # The router is float32 in every compute dtype: rounding would change the
    # choice of experts (Switch, arXiv:2101.03961, section 2.4).
    logits_BTE = mlp.Linear(
      config.num_experts,
      jnp.float32,
      False,
      mup.router_std(config),
      self.execution.exact_linear,
      name='router',
    )(x_BTD)
    correction_E = None
    if config.router_correction:
      correction_E = _Bias(config.num_experts, name='router_correction')()
    ids_BTA, gates_BTA = self.execution.by_row(
      functools.partial(route, config, correction_E=correction_E), logits_BTE
    )
    apply = self.execution.apply_experts
    if self.is_initializing():  # on one token, which a mesh cannot split
      apply = dispatch.apply_experts
    kernels = self._kernels()
    if any(map(stored_tree.is_stored, kernels.values())):
      # Only ports of one device take it.
      apply = functools.partial(apply, stored=self.execution.stored)
    y_BTD = apply(x_BTD, ids_BTA, gates_BTA, kernels, self.dtype)
    if config.num_shared_experts:  # one MLP, as wide as all of them together
      width = config.num_shared_experts * config.expert_width
      shared = dataclasses.replace(config, mlp_width=width)
      y_BTD = y_BTD + mlp.Mlp(
        shared, self.dtype, self.execution, name='shared'
      )(x_BTD)
    return y_BTD, routing_sums(config, logits_BTE, ids_BTA, is_real_BT)

  def _kernels(self) -> dict[str, Any]:
    config = self.config
    std, out_std = mup.hidden_std(config), mlp.residual_std(config)
    groups = self.execution.expert_groups
    width = config.expert_width * groups
    into = config.num_experts // groups, config.model_width, width
    shapes = {'up': (into, std)}
    if config.mlp == 'swiglu':
      shapes['gate'] = into, std
    shapes['down'] = (into[0], into[2], into[1]), out_std
    return {
      name: _Kernel(shape, std, name=f'expert_{name}')()
      for name, (shape, std) in shapes.items()
    }


class _Kernel(nn.Module):
  """One matrix per expert, with the parameter name of `mlp.Linear`."""

  shape: tuple[int, ...]
  init_std: float

  @nn.compact
  def __call__(self) -> Any:
    return stored_tree.param(
      self, nn.initializers.normal(self.init_std), self.shape
    )


class _Bias(nn.Module):
  """One number per expert, with the parameter name of a bias."""

  size: int

  @nn.compact
  def __call__(self) -> jax.Array:
    return self.param('bias', nn.initializers.zeros, (self.size,))


def route(
  config: model_config.ModelConfig,
  logits: jax.Array,
  correction_E: jax.Array | None = None,
) -> tuple[jax.Array, jax.Array]:
  """Returns the chosen experts of each token and their weights, [..., A].

  With `norm_topk` the weights of a token add up to `router_scale` (Mixtral,
  arXiv:2401.04088, section 2.1). Without it, a weight is `router_scale` times
  the score of the expert.

  Args:
    config: with the router_* fields and the fields of expert groups.
    logits: float32, [..., E].
    correction_E: added to the scores for the choice, not for the weights.
  """
  is_sigmoid = config.router_score == 'sigmoid'
  scores = (jax.nn.sigmoid if is_sigmoid else jax.nn.softmax)(logits)
  compared = scores  # decides the choice; the weights are of `scores`
  if correction_E is not None:
    correction = correction_E.astype(jnp.float32)
    compared = scores + correction.reshape((1,) * (logits.ndim - 1) + (-1,))
  if config.num_expert_groups:
    compared = _in_best_groups(config, compared)
  if compared is scores:
    gates, ids = jax.lax.top_k(scores, config.num_active_experts)
  else:
    _, ids = jax.lax.top_k(compared, config.num_active_experts)
    gates = jnp.take_along_axis(scores, ids, axis=-1)
  if config.norm_topk:
    total = jnp.sum(gates, axis=-1, keepdims=True)
    if is_sigmoid:  # all scores may be 0
      total = total + 1e-20
    gates = gates / total
  if config.router_scale != 1:
    gates = gates * config.router_scale
  return ids, gates


def _in_best_groups(config, scores):
  """Returns the scores, -inf for experts outside a token's best groups."""
  groups = config.num_expert_groups
  each = scores.reshape((*scores.shape[:-1], groups, -1))
  best, _ = jax.lax.top_k(each, config.expert_group_best)
  _, chosen = jax.lax.top_k(jnp.sum(best, axis=-1), config.num_active_groups)
  is_chosen = jnp.any(jax.nn.one_hot(chosen, groups, dtype=bool), axis=-2)
  each = jnp.where(is_chosen[..., None], each, -jnp.inf)
  return each.reshape(scores.shape)


def routing_sums(
  config: model_config.ModelConfig,
  logits_BTE: jax.Array,
  ids_BTA: jax.Array,
  is_real_BT: jax.Array | None,
) -> dict[str, jax.Array]:
  """Returns the losses and the loads of one layer's router, sums over rows.

  Returns:
    balance_loss: the sum over rows of the row's number of tokens times its
      imbalance. The imbalance is 1 if experts share the row evenly, and up to
      E / A if all tokens choose the same experts. Equations 17 to 20 of
      DeepSeek-V3 (arXiv:2412.19437) without the factor alpha.
    router_z_loss: the sum over tokens of log(sum(exp(logits)))^2, which keeps
      logits small. Equation 5 of ST-MoE (arXiv:2202.08906), before its mean.
    loss: the sum of both losses, each times its weight in the config.
    expert_load: the number of tokens of each expert, [E].
  """
  if is_real_BT is None:
    is_real_BT = jnp.ones(logits_BTE.shape[:2], bool)
  real_BT1 = is_real_BT.astype(jnp.float32)[..., None]
  num_real_B = jnp.sum(real_BT1, axis=(1, 2))
  expert_11E = jnp.arange(config.num_experts)[None, None, :]
  # Equation 18: f = load E / (A T), with T tokens in the row.
  load_BE = sum(
    jnp.sum((ids_BTA[..., a, None] == expert_11E) * real_BT1, axis=1)
    for a in range(config.num_active_experts)
  )
  if config.router_score == 'sigmoid':  # equation 19: shares of the sum
    scores_BTE = jax.nn.sigmoid(logits_BTE)
    probs_BTE = scores_BTE / jnp.sum(scores_BTE, axis=-1, keepdims=True)
  else:
    probs_BTE = jax.nn.softmax(logits_BTE)
  probs_BE = jnp.sum(probs_BTE * real_BT1, axis=1)  # equation 20, times T
  even = config.num_experts / config.num_active_experts
  # A row of padding only has no tokens and no loss.
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


def load_evenness(counts_NE: jax.Array) -> dict[str, jax.Array]:
  """Returns measures of the balance of tokens over the experts of each layer.

  Returns:
    max, min: the largest and the smallest share of an expert in any layer, in
      multiples of an even share. They are 1 and 1 if all shares are even, and E
      and 0 if one expert has all tokens.
    entropy: the entropy of the shares over that of even shares, the mean over
      layers. 1 if all shares are even, 0 if one expert has all tokens.
  """
  num_experts = counts_NE.shape[-1]
  total_N1 = jnp.sum(counts_NE, axis=-1, keepdims=True)
  share_NE = counts_NE / jnp.maximum(total_N1, 1e-9)
  entropy_N = jnp.sum(jax.scipy.special.entr(share_NE), axis=-1)
  return {
    'max': jnp.max(share_NE) * num_experts,
    'min': jnp.min(share_NE) * num_experts,
    'entropy': jnp.mean(entropy_N) / math.log(num_experts),
  }
