"""Attention over a cache, dense or paged: the default of an `Execution`.

`inference/engine/execution.py` replaces it by a kernel for pages where an
accelerator has one (`paged_tpu.py`, `paged_gpu.py`).
"""

import jax

from models import kv_cache
from models.attention import dense, form as form_lib, paged, supports


def attend(
  q_BTHC: jax.Array,
  cache: kv_cache.Layer,
  positions_BT: jax.Array,
  form: form_lib.Form,
) -> jax.Array:
  """Returns the attention output, [B, T, H, C], in the dtype of the queries.

  Args:
    q_BTHC: queries; head h uses key/value head h // (H / K).
    cache: the cache of one layer, with the keys of this call already written.
    positions_BT: the position of each query; it sees the positions up to its
      own.

  Raises:
    ValueError: a form that `supports.CACHED` refuses.
  """
  if isinstance(cache, kv_cache.PagedLayer):
    return paged.attend(q_BTHC, cache, positions_BT, form)
  supports.check(supports.CACHED, supports.Request(form=form))
  keys, values = cache[0], cache[-1]  # one array in a LatentCache
  return dense.attend(q_BTHC, keys, values, slots_BT=positions_BT, form=form)
