"""Attention over a cache, dense or paged: the default of an `Execution`.

Accelerators have kernels for pages (`paged_tpu.py`, `paged_gpu.py`); whoever
builds an engine chooses one of them in this one's place.
"""

import jax

from models import kv_cache
from models.attention import dense, form as form_lib, paged


def attend(
  q_BTHC: jax.Array,
  cache: kv_cache.Layer,
  positions_BT: jax.Array,
  form: form_lib.Form,
) -> jax.Array:
  """Returns the attention output, [B, T, H, C], in the dtype of the queries.

  Args:
    q_BTHC: queries; head h uses key/value head h // (H / K).
    cache: one layer's, already written to.
    positions_BT: of each query; it sees the positions up to its own.
    form: how scores are made.
  """
  if isinstance(cache, kv_cache.PagedLayer):
    return paged.attend(q_BTHC, cache, positions_BT, form)
  keys, values = cache[0], cache[-1]  # of latents one and the same
  return dense.attend(q_BTHC, keys, values, slots_BT=positions_BT, form=form)
