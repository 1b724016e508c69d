"""Batch-invariant forward passes that have a gradient, for training.

A policy that trains on its own samples compares two log-probabilities of a
token: the sampler's and the trainer's. With these ports the trainer's forward
pass has the bits of an engine with `numerics=invariant`, so that the ratio of
both is exactly 1 before the first step. The backward pass is that of the plain
functions at the same inputs: gradients need no particular bits.

Rows hold one document each, from their first token on.

Reference: He and Thinking Machines, "Defeating Nondeterminism in LLM
Inference", 2025, section "True on-policy RL".
"""

from collections.abc import Callable
import dataclasses
from typing import Any

import jax
import jax.numpy as jnp

from models import execution as execution_lib, kv_cache
from models.attention import dense, form as form_lib
from models.layers import cross_entropy, row_sums
from models.linear import invariant, plain


def execution(
  base: execution_lib.Execution,
) -> execution_lib.Execution:
  """Returns `base` with ports whose forward passes are batch-invariant."""
  return dataclasses.replace(
    base,
    attend=attend,
    linear=linear,
    exact_linear=exact_linear,
    unembed=unembed,
    log_softmax=log_softmax,
    by_row=invariant.by_row,
    apply_experts=invariant.apply_experts,
    recomputes_activation=False,
  )


def linear(
  x: jax.Array, w_IO: jax.Array, bias_O: jax.Array | None, dtype: Any
) -> jax.Array:
  """Returns `invariant.linear`, with the gradient of `plain.linear`."""
  return _computed(invariant.linear, plain.linear, dtype)(x, w_IO, bias_O)


def exact_linear(
  x: jax.Array, w_IO: jax.Array, bias_O: jax.Array | None, dtype: Any
) -> jax.Array:
  """Returns `invariant.exact_linear`, with a plain gradient."""
  return _computed(invariant.exact_linear, plain.exact_linear, dtype)(
    x, w_IO, bias_O
  )


def unembed(hidden: jax.Array, head_VD: jax.Array, dtype: Any) -> jax.Array:
  """Returns `invariant.unembed`, with the gradient of `plain.unembed`."""
  return _computed(invariant.unembed, plain.unembed, dtype)(hidden, head_VD)


def _computed(
  forward: Callable[..., Any], backward: Callable[..., Any], dtype: Any
) -> Callable[..., Any]:
  return with_gradient(
    lambda *arrays: forward(*arrays, dtype),
    lambda *arrays: backward(*arrays, dtype),
  )


def with_gradient(
  forward: Callable[..., Any], plain_form: Callable[..., Any]
) -> Callable[..., Any]:
  """Returns `forward` with the gradient of `plain_form`, the same function."""

  @jax.custom_vjp
  def function(*arrays):
    return forward(*arrays)

  def keep(*arrays):
    return forward(*arrays), arrays

  def pull(arrays, cotangent):
    return jax.vjp(plain_form, *arrays)[1](cotangent)

  function.defvjp(keep, pull)
  return function


def attend(
  q_BTHC: jax.Array,
  k_BKTC: jax.Array,
  v_BKTC: jax.Array,
  *,
  segment_ids_BT: jax.Array | None,
  dropout: Any,
  form: form_lib.Form,
) -> jax.Array:
  """Returns causal attention of whole rows, [B, T, H, C].

  Args:
    segment_ids_BT: 0 for padding, which sees nothing; equal for the rest of a
      row. None: no padding.
    dropout: None: the sampler has none.
    form: scale, cap and window.
  """
  assert dropout is None
  batch, time = q_BTHC.shape[:2]
  if segment_ids_BT is None:
    segment_ids_BT = jnp.ones((batch, time), jnp.int32)

  def forward(q_BTHC, k_BKTC, v_BKTC, segment_ids_BT):
    slots_T = jnp.arange(time, dtype=jnp.int32)
    return invariant.attend_cached(
      q_BTHC,
      kv_cache.LayerCache(k_BKTC, v_BKTC),
      jnp.where(segment_ids_BT > 0, slots_T, -1),
      form,
    )

  def plain_form(q_BTHC, k_BKTC, v_BKTC, segment_ids_BT):
    return dense.attend(
      q_BTHC, k_BKTC, v_BKTC, segment_ids_BT=segment_ids_BT, form=form
    )

  return with_gradient(forward, plain_form)(
    q_BTHC, k_BKTC, v_BKTC, segment_ids_BT
  )


def log_softmax(
  logits: jax.Array,
  spare_ids: tuple[tuple[int, int], ...],
  temperature: float = 1.0,
) -> jax.Array:
  """Returns log-probabilities [..., V], with the bits of the sampler's.

  The arguments are those of `cross_entropy.log_softmax`. A sampler leaves out
  the spare ids at the end of the vocabulary, and the order of a sum depends on
  its length.
  """
  num_ids = size = logits.shape[-1]
  if spare_ids and spare_ids[-1][1] == size:
    num_ids = spare_ids[-1][0]
  own = logits[..., :num_ids]
  largest = jax.lax.stop_gradient(jnp.max(own, axis=-1, keepdims=True))
  scaled = (own - largest) / temperature
  sums = row_sums.row_sum(jnp.exp(scaled).reshape(-1, num_ids))
  found = scaled - jnp.log(sums).reshape(*own.shape[:-1], 1)
  spare = [(0, 0)] * (logits.ndim - 1) + [(0, size - num_ids)]
  return jnp.pad(found, spare, constant_values=cross_entropy.MASKED)
