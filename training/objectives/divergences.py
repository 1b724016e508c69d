"""Divergences of two distributions of the next token, over the vocabulary.

P is the distribution of the teacher (or reference), and Q the distribution of
the trained model. All functions take log-probabilities [..., V] and return
[...], in nats. A probability of 0 is a finite log-probability
(`models.layers.cross_entropy.MASKED`), so that no term is 0 x inf.

References: Hinton et al. 2015 (arXiv:1503.02531); Agarwal et al. 2023, GKD
(arXiv:2306.13649), section 2.
"""

from collections.abc import Callable
import math
from typing import Any

import jax
import jax.numpy as jnp

from models.layers import cross_entropy
from training.objectives import port


def forward(theirs: jax.Array, own: jax.Array) -> jax.Array:
  """Returns KL(P || Q): the student covers all that the teacher may say."""
  return jnp.sum(jnp.exp(theirs) * (theirs - own), axis=-1)


def reverse(theirs: jax.Array, own: jax.Array) -> jax.Array:
  """Returns KL(Q || P): the student keeps to the teacher's likely tokens."""
  return jnp.sum(jnp.exp(own) * (own - theirs), axis=-1)


def jensen_shannon(theirs: jax.Array, own: jax.Array, beta: float) -> jax.Array:
  """Returns beta KL(P || M) + (1 - beta) KL(Q || M), M = beta P + (1 - beta) Q.

  GKD, equation 1. Over beta it goes to KL(P || Q) as beta goes to 0; over
  1 - beta it goes to KL(Q || P) as beta goes to 1.

  Args:
    beta: above 0 and below 1.
  """
  mixed = jnp.logaddexp(theirs + math.log(beta), own + math.log1p(-beta))
  return beta * forward(theirs, mixed) + (1 - beta) * forward(own, mixed)


def coarse(logits: jax.Array, ids: jax.Array) -> jax.Array:
  """Returns log-probabilities of some tokens, and of all others together.

  A divergence of two such distributions is at most that of the whole ones (the
  data-processing inequality), and equal where one token or none is left over.

  Args:
    logits: [..., V].
    ids: different tokens, [..., k].

  Returns:
    float32 [..., k + 1]; the last is that of the other tokens.
  """
  logits = logits.astype(jnp.float32)
  whole = jax.nn.logsumexp(logits, axis=-1, keepdims=True)
  own = jnp.take_along_axis(logits, ids, axis=-1)
  others = jnp.put_along_axis(
    logits, ids, cross_entropy.MASKED, axis=-1, inplace=False
  )
  rest = jax.nn.logsumexp(others, axis=-1, keepdims=True)
  # With all tokens listed the rest is that of masked logits: still finite.
  return jnp.concatenate([own, rest], axis=-1) - whole


def over_vocabulary(
  fn: Callable[[jax.Array, jax.Array, jax.Array], Any],
  params: Any,
  states_BTD: jax.Array,
  model: port.Model,
  other: port.FrozenModel,
  batch: port.Batch,
) -> Any:
  """Returns a function of the logits of two models, [B, T] arrays.

  Runs one forward pass of the other model. Only the logits of one chunk of time
  exist at a time, in the backward pass too.

  Args:
    fn: function of the own logits [B, t, V], the other logits, and targets
      [B, t]; returns a tree of arrays [B, t].
    params: parameters of `model`.
    states_BTD: final hidden states of `model`.
    model: the trained model.
    other: a teacher or a reference.
    batch: the rows that both models read.
  """
  hidden = other.model.hidden(
    other.params, batch['tokens'], batch['positions'], batch['segment_ids']
  )

  # Without remat, the backward pass would keep the logits of all chunks.
  @jax.checkpoint
  def of_chunk(states, targets_Bt):
    own_BtD, their_BtD = states
    own_BtV = model.logits(params, own_BtD)
    their_BtV = other.model.logits(other.params, their_BtD)
    return fn(own_BtV, their_BtV, targets_Bt)

  return model.map_chunks(
    of_chunk, (states_BTD, hidden.states_BTD), batch['targets']
  )
