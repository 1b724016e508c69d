"""The KV cache: an explicit pytree, an argument and a result.

Two kinds, told apart by the type of a layer's entry. Who owns which page is
policy and lives in `inference/scheduling/pages.py`; here are the arrays, and
the pure functions that write them.

**Dense**, `LayerCache`: slot s of a sequence holds the keys and values of its
position s, so no lengths are needed: attention from position p sees the slots
s <= p. A prompt may be padded on the right; what padding leaves behind is
overwritten by the token that really has that position before anything can see
it. Stored [B, K, S, C]: attention multiplies per sequence and head, and finds
its operands contiguous. `LatentCache` is its like for latent attention: a
single head whose keys are its values, too (`models/attention/latent_layer.py`).

**Paged**, `PagedLayer`: all sequences share one pool of pages of Q slots, and a
page table says in which page a position is (Kwon et al., arXiv:2309.06180). A
call holds the tokens of many sequences in one row [1, T]: first D tokens that
each continue a sequence of their own, then X blocks of R successive tokens of
one sequence each. Stored [P, Q, Y, C] with a head's keys and values in turn, as
JAX's ragged paged attention for TPU reads them; a token's write is contiguous.
Where keys are values, Y is 1.
"""

from typing import Any, NamedTuple

import jax
import jax.numpy as jnp

from models import model_config

# What pages may be stored as besides the dtype of the computation.
INT8 = 'int8'


class LayerCache(NamedTuple):
  """Keys and values of one layer, or of all with a leading axis N."""

  k_BKSC: jax.Array
  v_BKSC: jax.Array


class LatentCache(NamedTuple):
  """Of one layer, or of all with a leading axis N: keys that are values."""

  kv_B1SC: jax.Array


class Pages(NamedTuple):
  """One layer's pool of pages; page 0 belongs to nobody and stays zero."""

  # Head k's keys are in row 2k, its values in 2k + 1; of latents both in one.
  kv_PQYC: jax.Array
  scale_PQY: jax.Array | None = None  # float32, of int8 pages

  @property
  def page_size(self) -> int:
    """Q."""
    return self.kv_PQYC.shape[1]

  @property
  def num_kv_heads(self) -> int:
    """K."""
    return max(self.kv_PQYC.shape[2] // 2, 1)


class PagedLayer(NamedTuple):
  """A layer's pool, and where the sequences of this call have their pages."""

  pages: Pages
  decode_table_DL: jax.Array  # int32, pages of the sequence of each token
  block_table_XL: jax.Array  # int32, pages of the sequence of each block

  def num_block_rows(self, num_tokens: int) -> int:
    """Returns R for a call of so many tokens."""
    num_blocks = self.block_table_XL.shape[0]
    num_decodes = self.decode_table_DL.shape[0]
    return (num_tokens - num_decodes) // num_blocks if num_blocks else 0


Layer = LayerCache | LatentCache | PagedLayer

# A tuple with an entry per layer; one stacked entry if layers are scanned. The
# tuple decodes faster: a scan copies the cache in and out. A paged cache is
# always a tuple.
Cache = (
  tuple[LayerCache, ...]
  | LayerCache
  | tuple[LatentCache, ...]
  | LatentCache
  | tuple[PagedLayer, ...]
)


def init(
  config: model_config.ModelConfig,
  *,
  batch_size: int,
  length: int,
  dtype: Any = jnp.float32,
) -> Cache:
  """Returns an empty cache for `batch_size` sequences of up to `length`."""
  rows, width = rows_and_width(config)
  kind = LatentCache if rows == 1 else LayerCache
  shape = (batch_size, max(rows // 2, 1), length, width)

  def entry(shape) -> Any:
    # Distinct buffers: the decode step donates each of them.
    return kind(*(jnp.zeros(shape, dtype) for _ in kind._fields))

  if config.scan_layers:
    return entry((config.num_layers, *shape))
  return tuple(entry(shape) for _ in range(config.num_layers))


def rows_and_width(config: model_config.ModelConfig) -> tuple[int, int]:
  """Returns Y, how many vectors a layer keeps of a token, and C of each."""
  if config.latent_width:
    return 1, config.rotary_width + config.latent_width
  return 2 * config.num_kv_heads, config.head_width


def init_pages(
  config: model_config.ModelConfig,
  *,
  num_pages: int,
  page_size: int,
  dtype: Any = jnp.float32,
  channels: int = 0,
) -> tuple[Pages, ...]:
  """Returns the empty pools of all layers.

  Args:
    config: of a model whose layers are apart (`models.layout.unstack`).
    num_pages: P, page 0 included.
    page_size: Q, tokens per page.
    dtype: of what is stored; `INT8` stores a scale per token and head beside.
    channels: of a stored head, at least the model's; 0: the model's. What is
      beyond stays zero, for a kernel that reads whole registers.
  """
  rows, width = rows_and_width(config)
  shape = num_pages, page_size, rows, max(channels, width)

  def pool() -> Pages:
    is_int8 = jnp.dtype(dtype) == jnp.int8
    scale = jnp.zeros(shape[:3], jnp.float32) if is_int8 else None
    return Pages(jnp.zeros(shape, dtype), scale)

  return tuple(pool() for _ in range(config.num_layers))


def length(cache: Cache) -> int | None:
  """Returns S, the slots per sequence of a dense cache; None if paged."""
  if isinstance(cache, tuple) and isinstance(cache[0], PagedLayer):
    return None
  return jax.tree.leaves(cache)[0].shape[-2]


def write(
  cache: Layer,
  k_BTKC: jax.Array,
  v_BTKC: jax.Array,
  positions_BT: jax.Array,
) -> Any:
  """Puts the keys and values of position p where the cache has position p.

  Positions beyond the last slot of a dense cache, and negative ones in a paged
  cache, are dropped: never wrapped or clamped onto another token's slot. Where
  keys are values, the values are not looked at.
  """
  if isinstance(cache, PagedLayer):
    return _write_pages(cache, k_BTKC, v_BTKC, positions_BT)
  # Sequence, head and slot are all indices of one scatter. A scatter along the
  # slots alone would, for a single sequence, become a dynamic-update-slice that
  # XLA:CPU fuses into every reader: several copies of the cache per layer.
  batch = jnp.arange(cache[0].shape[0])[:, None, None]
  head = jnp.arange(cache[0].shape[1])[None, :, None]
  slot = positions_BT[:, None, :]

  def put(cache_BKSC, new_BTKC):
    return cache_BKSC.at[batch, head, slot].set(
      new_BTKC.astype(cache_BKSC.dtype).swapaxes(1, 2), mode='drop'
    )

  if isinstance(cache, LatentCache):
    return LatentCache(put(cache.kv_B1SC, k_BTKC))
  return LayerCache(put(cache.k_BKSC, k_BTKC), put(cache.v_BKSC, v_BTKC))


def _write_pages(cache: PagedLayer, k_1TKC, v_1TKC, positions_1T) -> PagedLayer:
  pages = cache.pages
  num_pages, page_size, num_heads, channels = pages.kv_PQYC.shape
  kv_TYC = k_1TKC[0]
  if num_heads > 1:
    kv_TYC = jnp.stack([k_1TKC[0], v_1TKC[0]], axis=2)
  kv_TYC = kv_TYC.reshape(-1, num_heads, k_1TKC.shape[-1])
  spare = channels - kv_TYC.shape[-1]
  kv_TYC = jnp.pad(kv_TYC, ((0, 0), (0, 0), (0, spare)))
  page_T, slot_T = _places(cache, positions_1T[0], num_pages, page_size)
  # As in a dense cache, more indices than one: a single token's scatter along
  # the pages alone would become a slice update that copies the pool.
  head_1Y = jnp.arange(num_heads)[None, :]
  where = page_T[:, None], slot_T[:, None], head_1Y
  scale_PQY = pages.scale_PQY
  if scale_PQY is not None:
    kv_TYC, scale_TY = quantize(kv_TYC)
    scale_PQY = scale_PQY.at[where].set(scale_TY, mode='drop')
  kv_PQYC = pages.kv_PQYC.at[where].set(
    kv_TYC.astype(pages.kv_PQYC.dtype), mode='drop'
  )
  return cache._replace(pages=Pages(kv_PQYC, scale_PQY))


def _places(cache: PagedLayer, positions_T, num_pages: int, page_size: int):
  """Returns page and slot of each token; out of range where it has none."""
  table_DL, table_XL = cache.decode_table_DL, cache.block_table_XL
  rows = cache.num_block_rows(positions_T.shape[0])
  row_T = jnp.concatenate(
    [
      jnp.arange(table_DL.shape[0]),
      table_DL.shape[0] + jnp.repeat(jnp.arange(table_XL.shape[0]), rows),
    ]
  )
  tables = jnp.concatenate([table_DL, table_XL])
  is_real_T = positions_T >= 0
  position_T = jnp.where(is_real_T, positions_T, 0)
  page_T = tables[row_T, position_T // page_size]
  return jnp.where(is_real_T, page_T, num_pages), position_T % page_size


def quantize(x: jax.Array) -> tuple[jax.Array, jax.Array]:
  """Returns int8 [..., C] and the float32 scale [...] of each vector.

  Symmetric, one scale per token and head: the largest channel becomes 127, so
  that a channel is off by at most half a scale, 1/254 of the largest.
  """
  x = x.astype(jnp.float32)
  scale = jnp.max(jnp.abs(x), axis=-1) / 127
  # A vector of zeros has no scale to divide by, and needs none.
  safe = jnp.where(scale == 0, 1.0, scale)
  return jnp.round(x / safe[..., None]).astype(jnp.int8), scale


def copy_pages(
  pools: tuple[Pages, ...], source_Z: jax.Array, target_Z: jax.Array
) -> tuple[Pages, ...]:
  """Copies whole pages in every layer; a target out of range is dropped."""
  return jax.tree.map(
    lambda pool: pool.at[target_Z].set(pool[source_Z], mode='drop'), pools
  )
