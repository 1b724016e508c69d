"""Cross-entropy from hidden states, without [batch, time, vocabulary] logits.

The head and the loss are computed together over chunks of time. The forward
pass already computes the gradients of a chunk while its logits are at hand, so
that the backward pass only scales them: one pass over the vocabulary instead
of three, and memory of one chunk. With B 8, T 1024, V 50304 the plain loss
holds 1.6 GB of float32 logits, several times over.

The chunks are cut along time, not batch: the batch axis may be laid out over
devices, and stays so.
"""

import functools
from typing import Any

import jax
import jax.numpy as jnp

# Logits of a chunk, in elements: 64 Mi is 256 MB of float32. Below it one
# chunk does the whole batch.
MAX_CHUNK_LOGITS = 2**26


def num_chunks(batch: int, time: int, vocab_size: int) -> int:
  """Returns into how many parts of equal length time is cut."""
  wanted = -(-batch * time * vocab_size // MAX_CHUNK_LOGITS)
  return next(n for n in range(min(wanted, time), time + 1) if time % n == 0)


def chunked_nll(
  hidden_BTD: jax.Array,
  head_VD: jax.Array,
  targets_BT: jax.Array,
  weights_BT: jax.Array,
  dtype: Any,
  *,
  vocab_shards: int = 1,
) -> jax.Array:
  """Returns `weighted_nll` with as many chunks as the shapes ask for.

  Args:
    hidden_BTD: as all that follow but the last, see `weighted_nll`.
    head_VD: the unembedding matrix.
    targets_BT: token ids.
    weights_BT: weight of each target.
    dtype: the dtype that the head multiplies in.
    vocab_shards: over how many devices the vocabulary is split meanwhile; each
      holds so much less of a chunk.
  """
  batch, time = weights_BT.shape
  chunks = num_chunks(batch, time, -(-head_VD.shape[0] // vocab_shards))
  nll: Any = weighted_nll(
    hidden_BTD, head_VD, targets_BT, weights_BT, chunks, jnp.dtype(dtype)
  )
  return nll


@functools.partial(jax.custom_vjp, nondiff_argnums=(4, 5))
def weighted_nll(
  hidden_BTD: jax.Array,
  head_VD: jax.Array,
  targets_BT: jax.Array,
  weights_BT: jax.Array,
  chunks: int,
  dtype: jnp.dtype,
) -> jax.Array:
  """Returns the sum of weight * -log p(target), a float32 scalar, in nats.

  Args:
    hidden_BTD: what the head is applied to.
    head_VD: the unembedding matrix.
    targets_BT: token ids; their value is of no matter where the weight is 0.
    weights_BT: float32 weight of each target. Not differentiated.
    chunks: how many parts time is cut into; divides T (see `num_chunks`).
    dtype: the dtype that the head multiplies in; log-softmax is float32.
  """
  head_VD = head_VD.astype(dtype)

  def add_chunk(total, chunk):
    hidden, targets, weights = chunk
    nll, _ = _token_nll(_logits(hidden.astype(dtype), head_VD), targets)
    return total + jnp.sum(nll * weights), None

  parts = _split_time((hidden_BTD, targets_BT, weights_BT), chunks)
  total, _ = jax.lax.scan(add_chunk, jnp.zeros((), jnp.float32), parts)
  return total


def _forward(hidden_BTD, head_VD, targets_BT, weights_BT, chunks, dtype):
  head_cast_VD = head_VD.astype(dtype)

  def add_chunk(carry, chunk):
    total, dhead_VD = carry
    hidden, targets, weights = chunk
    hidden = hidden.astype(dtype)
    logits = _logits(hidden, head_cast_VD)
    nll, log_z = _token_nll(logits, targets)
    # d nll / d logits = softmax - onehot(target).
    probs = jnp.exp(logits - log_z[..., None])
    vocab_ids = jax.lax.broadcasted_iota(targets.dtype, logits.shape, 2)
    onehot = vocab_ids == targets[..., None]
    dlogits = (probs - onehot) * weights[..., None]
    dlogits = dlogits.astype(dtype)
    dhidden = jax.lax.dot_general(
      dlogits,
      head_cast_VD,
      (((2,), (0,)), ((), ())),
      preferred_element_type=jnp.float32,
    )
    dhead_VD += jax.lax.dot_general(
      dlogits,
      hidden,
      (((0, 1), (0, 1)), ((), ())),
      preferred_element_type=jnp.float32,
    )
    total += jnp.sum(nll * weights)
    return (total, dhead_VD), dhidden.astype(hidden_BTD.dtype)

  parts = _split_time((hidden_BTD, targets_BT, weights_BT), chunks)
  zero = jnp.zeros((), jnp.float32), jnp.zeros(head_VD.shape, jnp.float32)
  (total, dhead_VD), dhidden = jax.lax.scan(add_chunk, zero, parts)
  dhidden_BTD = jnp.moveaxis(dhidden, 0, 2).reshape(hidden_BTD.shape)
  return total, (dhidden_BTD, dhead_VD.astype(head_VD.dtype))


def _backward(chunks, dtype, residuals, dtotal):
  del chunks, dtype
  dhidden_BTD, dhead_VD = residuals
  return (
    (dtotal * dhidden_BTD).astype(dhidden_BTD.dtype),
    (dtotal * dhead_VD).astype(dhead_VD.dtype),
    None,
    None,
  )


weighted_nll.defvjp(_forward, _backward)


def _logits(hidden_BtD: jax.Array, head_VD: jax.Array) -> jax.Array:
  return jax.lax.dot_general(
    hidden_BtD,
    head_VD,
    (((2,), (1,)), ((), ())),
    preferred_element_type=jnp.float32,
  )


def _token_nll(logits_BtV, targets_Bt):
  """Returns -log p(target) and log of the partition function, both [B, t]."""
  log_z = jax.nn.logsumexp(logits_BtV, axis=-1)
  target = jnp.take_along_axis(logits_BtV, targets_Bt[..., None], axis=-1)
  return log_z - target[..., 0], log_z


def _split_time(arrays, chunks):
  """Reshapes [B, T, ...] into [chunks, B, T / chunks, ...].

  Chunk c takes every so-manieth token, from c on: where time is laid out over
  devices, each of them has its share of every chunk.
  """

  def split(x):
    parts = x.reshape((x.shape[0], x.shape[1] // chunks, chunks) + x.shape[2:])
    return jnp.moveaxis(parts, 2, 0)

  return jax.tree.map(split, arrays)
