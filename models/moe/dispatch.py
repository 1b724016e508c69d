"""The dispatch of a mixture of experts: tokens go to their experts and back.

Each token is copied once per chosen expert. The copies are sorted by expert and
multiplied in groups (MegaBlocks, arXiv:2211.15841: no capacity limit), returned
to the order of the tokens, and summed with their weights. All shapes are
static, and no token is dropped, even if all tokens choose the same expert.

`models.moe.layer` chooses the experts of a token. `apply_experts` is a pure
function and a port of `models.execution`; `parallel/expert_parallel.py` spreads
it over a mesh.
"""

from collections.abc import Callable, Mapping
import functools
from typing import Any

from flax import linen as nn
import jax
import jax.numpy as jnp

from models.linear import grouped, plain
from models.linear.stored import product as stored_product, tree as stored_tree


def apply_experts(
  x_BTD: jax.Array,
  ids_BTA: jax.Array,
  gates_BTA: jax.Array,
  kernels: Mapping[str, Any],
  dtype: Any,
  held: Mapping[str, grouped.Held] | None = None,
  stored: stored_product.Computed = stored_product.in_blocks,
  multiply: Any = plain.linear,
) -> jax.Array:
  """Returns the sum over a token's experts of gate * expert(x), [B, T, D].

  Args:
    ids_BTA: int32, the experts of each token. An id of E or more is an expert
      that is not among `kernels`; it adds nothing.
    gates_BTA: float32, the weight of each chosen expert.
    kernels: 'up' [E, D, F] and 'down' [E, F, D]. Experts are SwiGLU with 'gate'
      [E, D, F], and GELU without.
    dtype: dtype of the computation; sums are float32.
    held: gather and scatter of each kernel, if this device holds a part of it.
    stored: `Execution.stored`, for kernels in fewer bits.
    multiply: their port, see `product.grouped`. The result is as wide as the
      outputs of 'down' that it returns.
  """

  def linear(name, x_JI, sizes_E):
    if stored_tree.is_stored(kernels[name]):
      return stored_product.grouped(
        x_JI, kernels[name], sizes_E, dtype, multiply, stored
      )
    how = grouped.WHOLE if held is None else held[name]
    y_JO: Any = grouped.grouped_linear(
      x_JI, kernels[name], sizes_E, jnp.dtype(dtype), how
    )
    return y_JO

  y_MAD = outputs(x_BTD, ids_BTA, kernels, dtype, linear)
  gates_MA = gates_BTA.reshape((-1, ids_BTA.shape[-1]))
  y_MD = _weighted_sum(y_MAD, gates_MA).astype(dtype)
  return y_MD.reshape((*x_BTD.shape[:-1], -1))


def outputs(
  x_BTD: jax.Array,
  ids_BTA: jax.Array,
  kernels: Mapping[str, Any],
  dtype: Any,
  linear: Callable[[str, jax.Array, jax.Array], jax.Array],
) -> jax.Array:
  """Returns the output of each expert of each token, [M, A, D].

  Args:
    x_BTD: M = B T tokens.
    ids_BTA: see `apply_experts`.
    kernels: see `apply_experts`.
    dtype: dtype of the computation.
    linear: (name, x_JI, sizes_E) -> y_JO, with the kernel of a name; see
      `models.linear.grouped`.
  """
  num_experts = kernels['down'].shape[0]
  shape, num_active = x_BTD.shape, ids_BTA.shape[-1]
  order_J, inverse_J, sizes_E = _sorted_copies(ids_BTA, num_experts)
  x_MD = x_BTD.reshape((-1, shape[-1])).astype(dtype)
  x_JD = _spread(x_MD, order_J, inverse_J)
  up_JF = linear('up', x_JD, sizes_E)
  if 'gate' in kernels:
    hidden_JF = nn.silu(linear('gate', x_JD, sizes_E)) * up_JF
  else:
    hidden_JF = nn.gelu(up_JF, approximate=True)
  y_JD = linear('down', hidden_JF, sizes_E)
  y_JD = _collect(y_JD, order_J, inverse_J)
  return y_JD.reshape((-1, num_active, y_JD.shape[-1]))


# The checkpoint stores the input in the compute dtype for the backward pass,
# not its float32 copy, which would be the largest array of the layer.
@functools.partial(jax.checkpoint, prevent_cse=False)
def _weighted_sum(y_MAD, gates_MA):
  """Returns the float32 sum over a token's experts of gate * y."""
  return jnp.sum(y_MAD.astype(jnp.float32) * gates_MA[..., None], axis=1)


def _sorted_copies(ids_BTA, num_experts):
  """Returns the order of the copies by expert, its inverse, and group sizes.

  Place j of the sorted copies holds copy order[j], a copy of token
  order[j] // A. Copy i is in place inverse[i].
  """
  ids_J = ids_BTA.reshape(-1)
  places_J = jnp.arange(ids_J.size, dtype=jnp.int32)
  # The sort is stable: the copies of an expert keep the order of the tokens.
  sorted_J, order_J = jax.lax.sort_key_val(ids_J, places_J)
  _, inverse_J = jax.lax.sort_key_val(order_J, places_J)
  # Ids of E or more sort last and are in no group.
  end_E = jnp.searchsorted(
    sorted_J, jnp.arange(num_experts, dtype=ids_J.dtype), side='right'
  ).astype(jnp.int32)
  return order_J, inverse_J, jnp.diff(end_E, prepend=0)


# The gradients below gather with the inverse permutation, which is fast on
# every platform. JAX would derive a scatter.


@jax.custom_vjp
def _spread(x_MD, order_J, inverse_J):
  """Returns the tokens copied to the places of their sorted copies."""
  num_active = order_J.shape[0] // x_MD.shape[0]
  return x_MD[order_J // num_active]


def _spread_forward(x_MD, order_J, inverse_J):
  like = jnp.zeros((x_MD.shape[0], 0), x_MD.dtype)
  return _spread(x_MD, order_J, inverse_J), (like, inverse_J)


def _spread_backward(residuals, dx_JD):
  like, inverse_J = residuals
  dx_MAD = dx_JD[inverse_J].reshape((like.shape[0], -1, dx_JD.shape[1]))
  # A token's gradient is the sum over its copies.
  dx_MD = jnp.sum(dx_MAD, axis=1, dtype=jnp.float32)
  return dx_MD.astype(like.dtype), None, None


_spread.defvjp(_spread_forward, _spread_backward)


@jax.custom_vjp
def _collect(y_JD, order_J, inverse_J):
  """Returns the copies in token order: of token 0, then of token 1, ..."""
  return y_JD[inverse_J]


def _collect_forward(y_JD, order_J, inverse_J):
  return y_JD[inverse_J], order_J


def _collect_backward(order_J, dy_JD):
  return dy_JD[order_J], None, None


_collect.defvjp(_collect_forward, _collect_backward)
