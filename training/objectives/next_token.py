"""Next-token prediction: the objective of pretraining and of fine-tuning.

An objective is a function `objective(params, batch, apply) -> loss_sum, sums`.
It returns *sums* over what it was given, never means: the step adds the sums of
micro-batches and devices and divides once, by `sums['weight']`, so that the
loss and its gradient do not depend on how a batch was cut up.
"""

from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp

Batch = dict[str, jax.Array]
# model.apply, holding the dropout key of this call.
Apply = Callable[..., Any]


def next_token(
  params: Any, batch: Batch, apply: Apply, *, z_loss_weight: float = 0.0
) -> tuple[jax.Array, dict[str, jax.Array]]:
  """Returns the summed cross-entropy of the targets, in nats.

  Of a mixture of experts the loss has the router's losses in it, as weighted in
  the model's config.

  Args:
    params: the model's variables.
    batch: tokens, targets, positions, segment_ids: int32 [B, T]; weights:
      float32 [B, T], 0 where nothing is to be learnt.
    apply: the model's apply.
    z_loss_weight: of the z-loss, see `models.cross_entropy`.

  Returns:
    The sum of weight * loss, and the sums that the step reports: `weight`, what
    the loss is divided by; where the loss is more than that, `nll`, the sum of
    weight * -log p(target); with a z-loss, `z_loss` before it is weighted; of a
    mixture, what `models.moe.layer.routing_sums` counts.
  """
  hidden_BTD, _, routing = apply(
    params,
    batch['tokens'],
    batch['positions'],
    None,
    batch['segment_ids'],
    method='hidden_and_routing',
  )
  found = apply(
    params,
    hidden_BTD,
    batch['targets'],
    batch['weights'],
    z_loss_weight,
    method='weighted_nll',
  )
  sums = {'weight': jnp.sum(batch['weights'])}
  if z_loss_weight:
    sums |= {'nll': found.nll, 'z_loss': found.z}
  if routing is None:
    return found.loss, sums
  # The loss of a mixture is that of its layers added up; what is reported is
  # their average, in which even experts make a balance_loss of 1.
  sums |= {
    'nll': found.nll,
    'balance_loss': jnp.mean(routing['balance_loss'], axis=0),
    'router_z_loss': jnp.mean(routing['router_z_loss'], axis=0),
    'expert_load': routing['expert_load'],
  }
  return found.loss + jnp.sum(routing['loss']), sums
