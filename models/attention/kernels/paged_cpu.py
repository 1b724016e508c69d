"""Attention of few queries over pages on a CPU, by native code.

Keys and values are read from their pages, up to the position of each query;
plain JAX copies tiles of pages first, in several small operations. Tokens that
decode, and short spans such as drafts that are verified, take this way. Chunks
of prompts have many queries per key, and plain JAX multiplies them as matrices.
"""

import dataclasses

import jax
import jax.numpy as jnp
import numpy as np

from models import kv_cache
from models.attention import form as form_lib, paged, supports
from models.native import build

MOST_ROWS = 8  # queries of a sequence; longer chunks are attended in plain JAX


def registered() -> 'Attend':
  """Returns the port; the first call of a machine compiles its code.

  Raises:
    BuildError: there is no compiler, or it fails.
  """
  target, _ = build.registered(source=build.PAGES)
  return Attend(target)


@dataclasses.dataclass(frozen=True)
class Attend:
  """The port `attend_cached`: native for few rows, else in plain JAX."""

  target: str  # XLA's name of the function; it has the digest of its code

  def __call__(
    self,
    q_1THC: jax.Array,
    cache: kv_cache.PagedLayer,
    positions_1T: jax.Array,
    form: form_lib.Form,
  ) -> jax.Array:
    """Returns the attention output, [1, T, H, C].

    Raises:
      ValueError: a call that `supports.PAGED_CPU` refuses.
    """
    supports.check(supports.PAGED_CPU, supports.of_call(q_1THC, cache, form))
    pages = cache.pages
    rows = cache.chunk_tokens(q_1THC.shape[1])
    num_decodes = cache.decode_table_DL.shape[0]
    parts = (
      (cache.decode_table_DL, slice(0, num_decodes), 1),
      (cache.chunk_table_XL, slice(num_decodes, None), rows),
    )
    outs = []
    for table_BL, where, rows in parts:
      if not table_BL.shape[0]:
        continue
      heads = table_BL.shape[0], rows, *q_1THC.shape[2:]
      q_BRHC = q_1THC[0, where].reshape(heads)
      positions_BR = positions_1T[0, where].reshape(heads[:2])
      if rows <= MOST_ROWS:
        out_BRHC = self._few_rows(q_BRHC, pages, table_BL, positions_BR, form)
      else:
        out_BRHC = paged.attend_rows(
          q_BRHC, pages, table_BL, positions_BR, form, group=1
        )
      outs.append(out_BRHC.reshape(-1, *q_1THC.shape[2:]))
    return jnp.concatenate(outs)[None]

  def _few_rows(self, q_BRHC, pages, table_BL, positions_BR, form):
    """Returns what `paged.attend_rows` does."""
    # Rounded after the scale, as there.
    scaled = (q_BRHC * form.scale_of(q_BRHC.shape[-1])).astype(q_BRHC.dtype)
    scales = pages.scale_PQY
    out_BRHC = jax.ffi.ffi_call(
      self.target,
      jax.ShapeDtypeStruct(scaled.shape, jnp.float32),
      vmap_method='sequential',
    )(
      scaled.astype(jnp.float32),
      pages.kv_PQYC,
      jnp.zeros((0,), jnp.float32) if scales is None else scales,
      table_BL,
      positions_BR,
      window=np.int64(form.window),
      softcap=np.float32(form.softcap),
    )
    return out_BRHC.astype(q_BRHC.dtype)
