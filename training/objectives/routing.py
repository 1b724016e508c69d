"""The losses of routers, for objectives whose `weight` is not a token count."""

from collections.abc import Mapping
from typing import Any

import jax
import jax.numpy as jnp

from training.objectives import port


def num_real(batch: port.Batch) -> jax.Array:
  """Returns the number of tokens that routers send to experts, a sum."""
  return jnp.sum(batch['segment_ids'] > 0, dtype=jnp.float32)


def losses(
  routing: Mapping[str, Any], batch: port.Batch, per_token: jax.Array
) -> tuple[jax.Array, port.Sums]:
  """Returns the routers' loss, and the sums to report.

  Args:
    routing: `port.Hidden.routing`, not None.
    batch: the rows that were routed.
    per_token: weight of the objective over `num_real`, both of the whole batch.
      It makes the routers' losses means over tokens, for any kind of weight.
  """
  count = num_real(batch)
  reported: port.Sums = {
    name: port.Mean(jnp.mean(routing[name], axis=0), count)
    for name in ('balance_loss', 'router_z_loss')
  }
  reported['expert_load'] = routing['expert_load']
  return per_token * jnp.sum(routing['loss']), reported
