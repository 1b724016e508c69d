"""The reward head: one number per text, read at its last token.

    reward = w . h      h: the final hidden state of the last token

There is no bias: it cancels in every comparison of two rewards. `transformers`
(LlamaForSequenceClassification) has the same head. Training and serving call
the same function.
"""

import math
from typing import Any

import jax
import jax.numpy as jnp

# The name of the head among an objective's own parameters, and in a frozen
# directory.
NAME = 'reward'


def init(width: int, key: jax.Array) -> Any:
  """Returns the first weights of a head: normal, of variance 1 / (width + 1).

  Reference: Stiennon et al. 2020 (arXiv:2009.01325), appendix B.1.
  """
  kernel_D1 = jax.random.normal(key, (width, 1), jnp.float32)
  return {'kernel': kernel_D1 / math.sqrt(width + 1)}


def rewards(head: Any, states: jax.Array) -> jax.Array:
  """Returns the reward of each hidden state [..., D], float32 [...]."""
  return jnp.einsum(
    '...D,D->...',
    states.astype(jnp.float32),
    head['kernel'][:, 0].astype(jnp.float32),
    # An accelerator would round the operands; there are few of them.
    precision=jax.lax.Precision.HIGHEST,
  )
