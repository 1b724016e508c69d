"""Cross-entropy from hidden states, without [batch, time, vocabulary] logits.

The head and the loss are computed together, over chunks of time. The forward
pass computes the gradients of a chunk while its logits exist, so that the
backward pass only scales them. That is one pass over the vocabulary instead of
three, and the memory of one chunk. With B 8, T 1024 and V 50304, the plain loss
holds 1.6 GB of float32 logits several times.

Chunks are cut along time, not batch, because the batch axis may be split over
devices.

Per token, with logits l of the head and log Z = log(sum(exp(c))),

    c = cap tanh(l / cap)                    soft-cap; c = l without a cap
    loss = log Z - c[target] + z (log Z)^2   z-loss, of weight z

The soft-cap bounds logits (Gemma 2, arXiv:2408.00118, section 2). The z-loss
keeps logits from drifting: a common shift does not change the softmax, but
large logits lose digits in bfloat16 (PaLM, arXiv:2204.02311, section 5, with
z = 1e-4). Logits of ids that no token has are in neither sum: see `masked`.
"""

import dataclasses
import functools
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp

# Logits of a chunk: 64 Mi elements are 256 MB of float32. A batch with fewer
# logits is one chunk.
MAX_CHUNK_LOGITS = 2**26
# The logit of an id without a token: its probability is 0. Not -inf, since a
# divergence of two masked models would be 0 x (-inf + inf).
MASKED = -1e30


@dataclasses.dataclass(frozen=True, kw_only=True)
class LossForm:
  """The settings of the loss; static under jit."""

  dtype: jnp.dtype  # of the product with the head; the rest is float32
  softcap: float = 0.0  # bound of the logits; 0: no bound
  z_weight: float = 0.0  # weight of (log Z)^2
  spare_ids: tuple[tuple[int, int], ...] = ()  # see `masked`


class LossSums(NamedTuple):
  """Sums over tokens, each times the weight of the token; float32 scalars.

  Only `loss` has a gradient. The forward pass computes the gradient, so the
  weight of the z-loss has to be an argument. `nll` and `z` are for metrics.
  """

  loss: jax.Array  # nll + z_weight * z
  nll: jax.Array  # of -log p(target)
  z: jax.Array  # of (log Z)^2


def num_chunks(
  batch: int, time: int, vocab_size: int, max_logits: int = 0
) -> int:
  """Returns the number of chunks of equal length that time is cut into.

  Args:
    max_logits: the most logits of a chunk; 0: MAX_CHUNK_LOGITS.
  """
  most = max_logits or MAX_CHUNK_LOGITS
  wanted = -(-batch * time * vocab_size // most)
  return next(n for n in range(min(wanted, time), time + 1) if time % n == 0)


def capped(logits: jax.Array, softcap: float) -> jax.Array:
  """Returns the logits bounded by `softcap`; unchanged if it is 0."""
  return softcap * jnp.tanh(logits / softcap) if softcap else logits


def masked(
  logits: jax.Array,
  spare_ids: tuple[tuple[int, int], ...],
  value: float = MASKED,
) -> jax.Array:
  """Returns logits [..., V] with `value` at ids that no token has.

  Training, evaluation and serving mask the same ids: with their logits in the
  sum, each log-probability would be lower in training than in serving.

  Args:
    logits: logits after the cap.
    spare_ids: ranges [first, end), `ModelConfig.spare_ids`.
    value: value of masked logits.
  """
  if not spare_ids:
    return logits
  ids = jax.lax.broadcasted_iota(jnp.int32, logits.shape, logits.ndim - 1)
  for first, end in spare_ids:
    logits = jnp.where((first <= ids) & (ids < end), value, logits)
  return logits


def log_softmax(
  logits: jax.Array,
  spare_ids: tuple[tuple[int, int], ...],
  temperature: float = 1.0,
) -> jax.Array:
  """Returns log-probabilities [..., V] of `masked` logits [..., V].

  Args:
    spare_ids: ranges of masked ids.
    temperature: divides the logits.
  """
  del spare_ids  # their probability is 0
  if temperature != 1.0:
    logits = logits / temperature
  return jax.nn.log_softmax(logits)


def chunked_nll(
  hidden_BTD: jax.Array,
  head_VD: jax.Array,
  targets_BT: jax.Array,
  weights_BT: jax.Array,
  form: LossForm,
  *,
  vocab_shards: int = 1,
  max_logits: int = 0,
) -> LossSums:
  """Returns `weighted_nll` with the number of chunks that the shapes need.

  Args:
    vocab_shards: devices that split the vocabulary; each holds that part of the
      logits of a chunk.
    max_logits: the most logits of a chunk on a device; 0: MAX_CHUNK_LOGITS.
      Another number adds up the same terms in another order.
  """
  batch, time = weights_BT.shape
  vocab_size = -(-head_VD.shape[0] // vocab_shards)
  chunks = num_chunks(batch, time, vocab_size, max_logits)
  return weighted_nll(hidden_BTD, head_VD, targets_BT, weights_BT, chunks, form)


def weighted_nll(
  hidden_BTD: jax.Array,
  head_VD: jax.Array,
  targets_BT: jax.Array,
  weights_BT: jax.Array,
  chunks: int,
  form: LossForm,
) -> LossSums:
  """Returns the loss of the targets and its terms, in nats.

  Args:
    targets_BT: token ids; any value if the weight is 0.
    weights_BT: float32 weight of each target. Not differentiated.
    chunks: number of chunks of time, a divisor of T (see `num_chunks`).
  """
  found: Any = _loss(hidden_BTD, head_VD, targets_BT, weights_BT, chunks, form)
  loss, terms = found
  return LossSums(loss, *jax.lax.stop_gradient(terms))


@functools.partial(jax.custom_vjp, nondiff_argnums=(4, 5))
def _loss(hidden_BTD, head_VD, targets_BT, weights_BT, chunks, form):
  """Returns the loss and (nll, z); only the loss has a gradient."""
  head_VD = head_VD.astype(form.dtype)

  def add_chunk(terms, chunk):
    hidden, targets, weights = chunk
    logits = _logits(hidden.astype(form.dtype), head_VD, form)
    new, _ = _terms(logits, targets, weights)
    return jax.tree.map(jnp.add, terms, new), None

  parts = _split_time((hidden_BTD, targets_BT, weights_BT), chunks)
  terms, _ = jax.lax.scan(add_chunk, _no_terms(), parts)
  return _total(terms, form), terms


def _forward(hidden_BTD, head_VD, targets_BT, weights_BT, chunks, form):
  """Returns (loss, terms) and the gradients of the loss."""
  head_cast_VD = head_VD.astype(form.dtype)  # once, not in every chunk

  def add_chunk(carry, chunk):
    terms, dhead_VD = carry
    hidden, targets, weights = chunk
    hidden = hidden.astype(form.dtype)
    logits = _logits(hidden, head_cast_VD, form)
    new, log_z = _terms(logits, targets, weights)
    dlogits = _dlogits(logits, log_z, targets, weights, form)
    dlogits = dlogits.astype(form.dtype)
    # Both gradients now, while the logits of the chunk exist.
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
    terms = jax.tree.map(jnp.add, terms, new)
    return (terms, dhead_VD), dhidden.astype(hidden_BTD.dtype)

  parts = _split_time((hidden_BTD, targets_BT, weights_BT), chunks)
  zero = _no_terms(), jnp.zeros(head_VD.shape, jnp.float32)
  (terms, dhead_VD), dhidden = jax.lax.scan(add_chunk, zero, parts)
  dhidden_BTD = jnp.moveaxis(dhidden, 0, 2).reshape(hidden_BTD.shape)
  grads = dhidden_BTD, dhead_VD.astype(head_VD.dtype)
  return (_total(terms, form), terms), grads


def _backward(chunks, form, grads, cotangents):
  del chunks, form
  dloss, _ = cotangents
  dhidden_BTD, dhead_VD = grads
  return (
    (dloss * dhidden_BTD).astype(dhidden_BTD.dtype),
    (dloss * dhead_VD).astype(dhead_VD.dtype),
    None,
    None,
  )


_loss.defvjp(_forward, _backward)


def _logits(hidden_BtD, head_VD, form: LossForm) -> jax.Array:
  """Returns the capped float32 logits of a chunk."""
  logits_BtV = jax.lax.dot_general(
    hidden_BtD,
    head_VD,
    (((2,), (1,)), ((), ())),
    preferred_element_type=jnp.float32,
  )
  return masked(capped(logits_BtV, form.softcap), form.spare_ids)


def _no_terms():
  return (jnp.zeros((), jnp.float32),) * 2


def _terms(logits_BtV, targets_Bt, weights_Bt):
  """Returns (nll, z) of a chunk, and log Z of each token."""
  log_z_Bt = jax.nn.logsumexp(logits_BtV, axis=-1)
  target_Bt1 = jnp.take_along_axis(logits_BtV, targets_Bt[..., None], axis=-1)
  nll = jnp.sum((log_z_Bt - target_Bt1[..., 0]) * weights_Bt)
  z = jnp.sum(jnp.square(log_z_Bt) * weights_Bt)
  return (nll, z), log_z_Bt


def _total(terms, form: LossForm) -> jax.Array:
  nll, z = terms
  return nll + form.z_weight * z if form.z_weight else nll


def _dlogits(logits_BtV, log_z_Bt, targets_Bt, weights_Bt, form):
  """Returns the gradient of the loss with respect to logits before the cap."""
  probs = jnp.exp(logits_BtV - log_z_Bt[..., None])
  vocab_ids = jax.lax.broadcasted_iota(targets_Bt.dtype, logits_BtV.shape, 2)
  onehot = vocab_ids == targets_Bt[..., None]
  # d log Z / d logits = softmax, so the z-loss adds 2 z log Z softmax.
  if form.z_weight:
    probs = probs * (1 + 2 * form.z_weight * log_z_Bt[..., None])
  dlogits = (probs - onehot) * weights_Bt[..., None]
  if form.softcap:
    # d cap tanh(l / cap) / d l = 1 - tanh^2, with tanh = c / cap.
    dlogits = dlogits * (1 - jnp.square(logits_BtV / form.softcap))
  # Gradients of masked logits are zero already, unless the square of such a
  # logit overflows.
  return masked(dlogits, form.spare_ids, 0.0)


def _split_time(arrays, chunks):
  """Reshapes [B, T, ...] into [chunks, B, T / chunks, ...].

  Chunk c takes every `chunks`-th token, starting at c. If time is split over
  devices, each device has an equal share of every chunk.
  """

  def split(x):
    parts = x.reshape((x.shape[0], x.shape[1] // chunks, chunks) + x.shape[2:])
    return jnp.moveaxis(parts, 2, 0)

  return jax.tree.map(split, arrays)
