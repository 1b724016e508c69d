"""The tables of a model: embedding and head, in floats or in fewer bits.

A table [V, D] of floats is the parameter of flax's `Embed`. A table in fewer
bits is the kernel of its product with hidden states, W [D, V], of
`models/linear/stored/`: such a kernel stores the rows of the table.
"""

from typing import Any

from flax import linen as nn
import jax
import jax.numpy as jnp

from models import axes
from models.linear.stored import product, tree as stored_tree


class Table(nn.Embed):
  """Rows of numbers, one for each id."""

  def setup(self):
    """Takes the table that is stored, or declares a parameter."""
    stored = stored_tree.given(self, 'embedding')
    if stored is None:
      super().setup()
    else:
      self.embedding = stored


def look_up(table: Any, ids_BT: jax.Array) -> jax.Array:
  """Returns the rows of ids, [B, T, D]; float32 if the table is stored."""
  if stored_tree.is_stored(table):
    rows = table.columns(ids_BT.reshape(-1)).whole(jnp.float32).T
    return rows.reshape((*ids_BT.shape, -1))
  # The whole table is gathered before the lookup, as every matrix is gathered
  # before its product. Rows of a table that is split along its width would
  # not be whole hidden states.
  table_VD = nn.with_logical_constraint(table, (axes.VOCAB, axes.WIDTH))
  return jnp.take(table_VD, ids_BT, axis=0)


def look_up_in_loop(table: Any, ids_BT: jax.Array) -> jax.Array:
  """Returns `look_up`, for a loop of steps on a CPU.

  XLA:CPU takes rows of bfloat16 by way of float32. Without the barrier it would
  convert the whole table before the loop, in every call.
  """
  if not stored_tree.is_stored(table):
    table, ids_BT = jax.lax.optimization_barrier((table, ids_BT))
  return look_up(table, ids_BT)


def unembed(
  hidden: jax.Array, table: Any, dtype: Any, execution: Any
) -> jax.Array:
  """Returns float32 logits [..., V] of hidden states [..., D].

  Args:
    hidden: final hidden states.
    table: the table of the head.
    dtype: dtype of the computation.
    execution: an `Execution`.
  """
  if stored_tree.is_stored(table):
    return product.unembed(
      hidden, table, dtype, execution.unembed, execution.stored
    )
  return execution.unembed(hidden, table, dtype)


def whole(table: Any, dtype: Any) -> jax.Array:
  """Returns a table in floats, [V, D]."""
  return table.whole(dtype).T if stored_tree.is_stored(table) else table
