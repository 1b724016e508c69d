"""Documents of packed rows: first tokens, and documents beyond a limit."""

import jax
import jax.numpy as jnp


def is_start(segment_ids_BT: jax.Array) -> jax.Array:
  """Returns whether each token is the first of its document in its row."""
  changes = segment_ids_BT[:, 1:] != segment_ids_BT[:, :-1]
  return jnp.pad(changes, ((0, 0), (1, 0)), constant_values=True)


def is_excess(segment_ids_BT: jax.Array, max_documents: int) -> jax.Array:
  """Returns whether each token is beyond the documents that a row may have.

  Padding (segment 0) counts as a document, unless a row may have only one
  document: it does not see the padding after it.
  """
  if max_documents == 1:
    return (segment_ids_BT != segment_ids_BT[:, :1]) & (segment_ids_BT != 0)
  return jnp.cumsum(is_start(segment_ids_BT), axis=1) > max_documents
