"""The draft head: it guesses further tokens from one final hidden state.

A language model gives, at a token, a final hidden state h and from it the
distribution of the next token. When that next token x1 is known, the head
guesses the one behind it, without a pass of the model:

    s0 = h                       the model's state at the last computed token
    s1 = advance(s0, embed(x1))  -> logits of x2, by the model's own unembedding
    s2 = advance(s1, embed(x2))  -> logits of x3, and so on

    advance(s, e) = A n(s) + B n(e) + down(silu(gate z) * up z)
    z = [n(s), n(e)],  n(v) = v / rms(v)

The model's tables and states are frozen: the head has the matrices A, B, gate,
up and down alone.

**Recurrent, without attention.** The head of EAGLE (arXiv:2401.15077) and of
multi-token prediction (DeepSeek-V3, arXiv:2412.19437) is a block with a KV
cache, which has to be filled for whole prompts, and follow every prefix hit,
preemption and rejection. This head has the form of ReDrafter (arXiv:
2403.09919): all that it needs of a text is one hidden state, which the model
has computed anyway, and in which attention has already gathered the context. An
engine keeps that state in the pages of the KV cache, so it goes wherever its
token goes.

**Few ids.** Only the first K ids of the vocabulary are guessed. Tokenizers with
merges give frequent tokens low ids, and the unembedding takes most of the time
of a guess. A token beyond K is never guessed and costs a rejection.
"""

from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp

from models.layers import cross_entropy
from models.linear import plain

# The name of the head among an objective's own parameters.
NAME = 'draft'
_EPSILON = 1e-6


def init(width: int, inner_width: int, key: jax.Array) -> Any:
  """Returns the first weights of a head.

  Args:
    width: D, of the model.
    inner_width: F, of the gated layer.
    key: PRNG key.
  """
  # At first a state stays as it is, so guesses begin with the words of the
  # model's own prediction.
  shape = 2 * width, inner_width
  gate, up = (
    jax.random.normal(key, shape) / shape[0] ** 0.5
    for key in jax.random.split(key)
  )
  matrices = {
    'state': jnp.eye(width),
    'token': jnp.zeros((width, width)),
    'gate': gate,
    'up': up,
    'down': jnp.zeros((inner_width, width)),
  }
  return {name: {'kernel': matrix} for name, matrix in matrices.items()}


def advanced(
  head: Any,
  states: jax.Array,
  embeddings: jax.Array,
  dtype: Any,
  linear: Callable[..., Any] = plain.linear,
) -> jax.Array:
  """Returns the states after one more token each, [..., D], in `dtype`.

  Args:
    head: of `init`.
    states: final hidden states of the model, or of the head, [..., D].
    embeddings: of the tokens that follow them, [..., D].
    dtype: of the products.
    linear: multiplies by a matrix, as the port of `models.execution` does.
  """

  def product(name: str, x: jax.Array) -> jax.Array:
    y: Any = linear(x, head[name]['kernel'], None, dtype)
    return y

  state, token = _normalised(states), _normalised(embeddings)
  both = jnp.concatenate([state, token], axis=-1)
  inner = jax.nn.silu(product('gate', both)) * product('up', both)
  return (
    product('state', state) + product('token', token) + product('down', inner)
  )


def logits(
  states: jax.Array,
  table_KD: jax.Array,
  softcap: float,
  dtype: Any,
  unembed: Callable[..., jax.Array] = plain.unembed,
) -> jax.Array:
  """Returns the logits of the first K ids, float32 [..., K].

  Args:
    states: of `advanced`.
    table_KD: the first rows of the model's unembedding.
    softcap: `ModelConfig.logit_softcap`.
    dtype: of the product.
    unembed: multiplies by the table, as the port of `models.execution` does.
  """
  found = unembed(states, table_KD, dtype)
  return cross_entropy.capped(found, softcap)


def _normalised(x: jax.Array) -> jax.Array:
  """Returns vectors of mean square 1, float32."""
  x = x.astype(jnp.float32)
  return x * jax.lax.rsqrt(jnp.mean(x * x, axis=-1, keepdims=True) + _EPSILON)
