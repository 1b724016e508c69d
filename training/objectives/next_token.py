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
  params: Any, batch: Batch, apply: Apply
) -> tuple[jax.Array, dict[str, jax.Array]]:
  """Returns the summed cross-entropy of the targets, in nats.

  Args:
    params: the model's variables.
    batch: tokens, targets, positions, segment_ids: int32 [B, T]; weights:
      float32 [B, T], 0 where nothing is to be learnt.
    apply: the model's apply.

  Returns:
    The sum of weight * -log p(target), and the sums that the step reports:
    `weight`, what the loss is divided by.
  """
  hidden_BTD, _, routing = apply(
    params,
    batch['tokens'],
    batch['positions'],
    None,
    batch['segment_ids'],
    method='hidden_and_routing',
  )
  nll_sum = apply(
    params,
    hidden_BTD,
    batch['targets'],
    batch['weights'],
    method='weighted_nll',
  )
  del routing
  return nll_sum, {'weight': jnp.sum(batch['weights'])}
