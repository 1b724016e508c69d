"""Vectors that are not finite must not reach queries that do not see them.

A masked key has the weight zero, but 0 x NaN is NaN: one token whose key or
value is NaN or infinite would spoil the sums of all queries. It may be a token
of another document in a packed row, or a token that a sequence left in a page
before the page got its next owner. So such a vector is replaced by zeros, and
the scores that it takes part in become NaN before the mask selects scores:

    a query that sees the token      gives NaN
    a query that does not see it     gives the bits of a vector of zeros

A kernel that keeps its scores to itself is called through `around`.
"""

from collections.abc import Callable

import jax
import jax.numpy as jnp

from models.attention import form as form_lib


def parted(x: jax.Array) -> tuple[jax.Array, jax.Array]:
  """Returns x [..., C] with zeros for vectors that are not finite, and marks.

  The marks [...] are float32, to be added to scores: NaN for such a vector,
  else 0.
  """
  # The mark is computed from the vector, and is no constant NaN: a diagnosis
  # that looks for a run's first tensor that is not finite must not find this
  # one. Inf x 0 and NaN x 0 are NaN.
  marks = jnp.sum(jax.lax.stop_gradient(x).astype(jnp.float32) * 0, axis=-1)
  return jnp.where((marks == 0)[..., None], x, 0), marks


def around(
  kernel: Callable[[jax.Array, jax.Array, jax.Array], jax.Array],
  q_BTHC: jax.Array,
  k_BKTC: jax.Array,
  v_BKTC: jax.Array,
  segment_ids_BT: jax.Array | None,
  form: form_lib.Form,
) -> jax.Array:
  """Returns kernel(q, k, v), causal attention, for operands that may be NaN.

  The kernel gets finite operands. A query that is not finite, or sees a key or
  a value that is not, gives NaN in all heads.
  """
  q_BTHC, marks_BTH = parted(q_BTHC)
  k_BKTC, marks_BKT = parted(k_BKTC)
  v_BKTC, more_BKT = parted(v_BKTC)
  is_bad_BT = jnp.any(jnp.isnan(marks_BKT + more_BKT), axis=1)
  place_T = jnp.arange(q_BTHC.shape[1])
  sees_BTT = form_lib.sees(place_T[None, :], place_T[:, None], form)[None]
  if segment_ids_BT is not None:
    sees_BTT &= segment_ids_BT[:, :, None] == segment_ids_BT[:, None, :]
  # Fused into the reduction: no array [B, T, T] exists.
  is_bad_BT = jnp.any(sees_BTT & is_bad_BT[:, None, :], axis=-1)
  is_bad_BT |= jnp.any(jnp.isnan(marks_BTH), axis=-1)
  # Selected, not added: the kernel gets no gradient of such a query either.
  mark = jnp.sum(marks_BTH) + jnp.sum(marks_BKT + more_BKT)  # NaN, or unused
  out_BTHC = kernel(q_BTHC, k_BKTC, v_BKTC)
  return jnp.where(
    is_bad_BT[..., None, None], mark.astype(out_BTHC.dtype), out_BTHC
  )
