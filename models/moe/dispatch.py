"""Sends tokens to their experts and back: the heart of a mixture of experts.

Each token is copied once per expert it chose, the copies are sorted by expert,
multiplied in groups (MegaBlocks, arXiv:2211.15841: dropless, no capacity), put
back in the order of the tokens and added up, weighted. All shapes are static
and no token is dropped, however uneven the choice.

`models.moe.layer` decides which expert a token goes to; this file is a pure
function and a port of `models.execution`, which `parallel/expert_parallel.py`
spreads over a mesh.
"""

from collections.abc import Mapping
import functools
from typing import Any

from flax import linen as nn
import jax
import jax.numpy as jnp

from models.linear import grouped


def apply_experts(
  x_BTD: jax.Array,
  ids_BTA: jax.Array,
  gates_BTA: jax.Array,
  kernels: Mapping[str, jax.Array],
  dtype: Any,
  held: Mapping[str, grouped.Held] | None = None,
) -> jax.Array:
  """Returns the sum over a token's experts of gate * expert(x), [B, T, D].

  Args:
    x_BTD: the tokens.
    ids_BTA: int32, the experts of each token; an id of E or more is of an
      expert that is not among `kernels` and adds nothing.
    gates_BTA: float32, the weight of each.
    kernels: 'up' [E, D, F] and 'down' [E, F, D]; with 'gate' [E, D, F] experts
      are SwiGLU, without it GELU.
    dtype: of the computation; sums are float32.
    held: how each kernel becomes whole where this device holds a part of it.
  """
  num_experts = kernels['down'].shape[0]
  shape, num_active = x_BTD.shape, ids_BTA.shape[-1]
  order_J, inverse_J, sizes_E = _sorted_copies(ids_BTA, num_experts)

  def grouped_linear(name, x_JI):
    how = grouped.WHOLE if held is None else held[name]
    y_JO: Any = grouped.grouped_linear(
      x_JI, kernels[name], sizes_E, jnp.dtype(dtype), how
    )
    return y_JO

  x_MD = x_BTD.reshape((-1, shape[-1])).astype(dtype)
  x_JD = _spread(x_MD, order_J, inverse_J)
  up_JF = grouped_linear('up', x_JD)
  if 'gate' in kernels:
    hidden_JF = nn.silu(grouped_linear('gate', x_JD)) * up_JF
  else:
    hidden_JF = nn.gelu(up_JF, approximate=True)
  y_JD = _collect(grouped_linear('down', hidden_JF), order_J, inverse_J)
  y_MAD = y_JD.reshape((-1, num_active, shape[-1]))
  gates_MA = gates_BTA.reshape((-1, num_active))
  return _weighted_sum(y_MAD, gates_MA).astype(dtype).reshape(shape)


# What waits for the backward pass is what goes in, in the compute dtype, and
# not its copy in float32: the largest array of a mixture.
@functools.partial(jax.checkpoint, prevent_cse=False)
def _weighted_sum(y_MAD, gates_MA):
  """Returns the float32 sum over a token's experts of gate * y."""
  return jnp.sum(y_MAD.astype(jnp.float32) * gates_MA[..., None], axis=1)


def _sorted_copies(ids_BTA, num_experts):
  """Returns the order of copies by expert, its inverse, and group sizes.

  Place j of the sorted copies holds copy order[j], which is of token
  order[j] // A; copy i is in place inverse[i].
  """
  ids_J = ids_BTA.reshape(-1)
  places_J = jnp.arange(ids_J.size, dtype=jnp.int32)
  # Stable: the copies of an expert stay in the order of the tokens.
  sorted_J, order_J = jax.lax.sort_key_val(ids_J, places_J)
  _, inverse_J = jax.lax.sort_key_val(order_J, places_J)
  end_E = jnp.searchsorted(
    sorted_J, jnp.arange(num_experts, dtype=ids_J.dtype), side='right'
  ).astype(jnp.int32)
  return order_J, inverse_J, jnp.diff(end_E, prepend=0)


# A permutation is undone by its inverse, and gathers are fast everywhere; what
# JAX derives by itself is a scatter.


@jax.custom_vjp
def _spread(x_MD, order_J, inverse_J):
  """Copies tokens into the places of their copies."""
  num_active = order_J.shape[0] // x_MD.shape[0]
  return x_MD[order_J // num_active]


def _spread_forward(x_MD, order_J, inverse_J):
  like = jnp.zeros((x_MD.shape[0], 0), x_MD.dtype)
  return _spread(x_MD, order_J, inverse_J), (like, inverse_J)


def _spread_backward(residuals, dx_JD):
  like, inverse_J = residuals
  dx_MAD = dx_JD[inverse_J].reshape((like.shape[0], -1, dx_JD.shape[1]))
  dx_MD = jnp.sum(dx_MAD, axis=1, dtype=jnp.float32)
  return dx_MD.astype(like.dtype), None, None


_spread.defvjp(_spread_forward, _spread_backward)


@jax.custom_vjp
def _collect(y_JD, order_J, inverse_J):
  """Puts sorted copies back: those of token 0 first, then of token 1, ..."""
  return y_JD[inverse_J]


def _collect_forward(y_JD, order_J, inverse_J):
  return y_JD[inverse_J], order_J


def _collect_backward(order_J, dy_JD):
  return dy_JD[order_J], None, None


_collect.defvjp(_collect_forward, _collect_backward)
