"""The KV cache: an explicit pytree, an argument and a result of the model.

There are two kinds; the type of a layer's entry tells them apart. This file has
the arrays and the pure functions that write them. Which sequence owns which
page is policy, in `inference/scheduling/pages.py`.

**Dense**, `LayerCache`: slot s of a sequence holds the keys and values of its
position s. Attention from position p sees the slots s <= p, so no lengths are
stored. A prompt may be padded on the right: the token that really has such a
position overwrites the padding before any query can see it. Arrays are
[B, K, S, C], so that the operands of each sequence and head are contiguous.
`LatentCache` is the dense cache of latent attention: a single head whose keys
are also its values (`models/attention/latent_layer.py`).

**Paged**, `PagedLayer`: all sequences share one pool of pages of Q slots, and a
page table maps the positions of a sequence to pages (Kwon et al.,
arXiv:2309.06180). A call holds the tokens of many sequences in one row [1, T]:
first D tokens of D decoding sequences, then X chunks of R successive tokens,
each chunk of one sequence. Pages are [P, Q, Y, C] and alternate the keys and
the values of each head, as JAX's ragged paged attention for TPU reads them. So
the write of a token is contiguous. For latent attention Y is 1.
"""

from typing import Any, NamedTuple

import jax
import jax.numpy as jnp

from models import model_config

# The dtypes of pages that are quantized; the other choice is the model's dtype.
# The second holds the bits of float8_e4m3fn: XLA:CPU writes and gathers floats
# of 8 bits in 16 bits.
INT8, FP8_BITS = 'int8', 'uint8'
QUANTIZED = (INT8, FP8_BITS)
_LARGEST = {INT8: 127.0, FP8_BITS: float(jnp.finfo(jnp.float8_e4m3fn).max)}
# The dtype of pages that hold the bits of bfloat16, on CPU. XLA:CPU writes and
# gathers bfloat16 in float32: each layer would convert the whole pool to
# float32 and back in every step.
BFLOAT16_BITS = 'uint16'


class LayerCache(NamedTuple):
  """Keys and values of one layer, or of all layers with a leading axis N."""

  k_BKSC: jax.Array
  v_BKSC: jax.Array


class LatentCache(NamedTuple):
  """Latents of one layer, or of all layers with a leading axis N.

  They are both the keys and the values of one head.
  """

  kv_B1SC: jax.Array


class Pages(NamedTuple):
  """One layer's pool of pages. Page 0 belongs to no sequence and stays zero."""

  # On axis Y, the keys of head k are at 2k and its values at 2k + 1; Y is 1 for
  # latents.
  kv_PQYC: jax.Array
  scale_PQY: jax.Array | None = None  # float32, of quantized pages

  @property
  def page_size(self) -> int:
    """Returns Q, the slots of a page."""
    return self.kv_PQYC.shape[1]

  @property
  def num_kv_heads(self) -> int:
    """Returns K, the key/value heads."""
    return max(self.kv_PQYC.shape[2] // 2, 1)


class PagedLayer(NamedTuple):
  """A layer's pool, and the page tables of the sequences of this call."""

  pages: Pages
  decode_table_DL: jax.Array  # int32, pages of each decoding sequence
  chunk_table_XL: jax.Array  # int32, pages of each chunk's sequence

  def chunk_tokens(self, num_tokens: int) -> int:
    """Returns R, the tokens of a chunk, for a call of `num_tokens`."""
    num_chunks = self.chunk_table_XL.shape[0]
    num_decodes = self.decode_table_DL.shape[0]
    return (num_tokens - num_decodes) // num_chunks if num_chunks else 0


Layer = LayerCache | LatentCache | PagedLayer

# A tuple with an entry per layer, or one stacked entry if layers are scanned.
# The tuple decodes faster, because a scan copies the cache in and out. A paged
# cache is always a tuple.
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
    # Each entry has its own buffer, because the decode step donates each.
    return kind(*(jnp.zeros(shape, dtype) for _ in kind._fields))

  if config.scan_layers:
    return entry((config.num_layers, *shape))
  return tuple(entry(shape) for _ in range(config.num_layers))


def rows_and_width(config: model_config.ModelConfig) -> tuple[int, int]:
  """Returns Y, the vectors that a layer stores per token, and their width C."""
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
    config: config of a model with separate layers (`models.layout.unstack`).
    num_pages: P, page 0 included.
    page_size: Q, tokens per page.
    dtype: dtype of the stored keys and values; dtypes of `QUANTIZED` add a
      scale per token and head, `BFLOAT16_BITS` stores bfloat16.
    channels: channels of a stored head, at least the model's C; 0: C. Further
      channels stay zero, for a kernel that reads whole registers.
  """
  rows, width = rows_and_width(config)
  shape = num_pages, page_size, rows, max(channels, width)

  def pool() -> Pages:
    has_scale = jnp.dtype(dtype).name in QUANTIZED
    scale = jnp.zeros(shape[:3], jnp.float32) if has_scale else None
    return Pages(jnp.zeros(shape, dtype), scale)

  return tuple(pool() for _ in range(config.num_layers))


def init_hidden(
  config: model_config.ModelConfig,
  *,
  num_pages: int,
  page_size: int,
  dtype: Any,
) -> Pages:
  """Returns the empty pool of the final hidden states of tokens.

  One vector of width D per token, in the pages of its keys and values. A draft
  head reads it (`models/layers/draft_head.py`); the model itself never does.
  """
  shape = num_pages, page_size, 1, config.model_width
  return Pages(jnp.zeros(shape, dtype))


def write_hidden(
  layer: PagedLayer, hidden_1TD: jax.Array, positions_1T: jax.Array
) -> PagedLayer:
  """Returns the pool of `init_hidden` with the states of a call."""
  rows_1T1D = hidden_1TD[:, :, None]
  return _write_pages(layer, rows_1T1D, rows_1T1D, positions_1T)


def length(cache: Cache) -> int | None:
  """Returns S, the slots per sequence of a dense cache; None for pages."""
  if isinstance(cache, tuple) and isinstance(cache[0], PagedLayer):
    return None
  return jax.tree.leaves(cache)[0].shape[-2]


def write(
  cache: Layer, k_BTKC: jax.Array, v_BTKC: jax.Array, positions_BT: jax.Array
) -> Any:
  """Returns the cache with the keys and values of this call at their positions.

  Tokens past the last slot of a dense cache, and tokens with a negative
  position in a paged cache, are dropped. They are never wrapped or clamped onto
  the slot of another token. A latent cache ignores `v_BTKC`.
  """
  if isinstance(cache, PagedLayer):
    return _write_pages(cache, k_BTKC, v_BTKC, positions_BT)
  # Sequence, head and slot are all indices of one scatter. For a single
  # sequence, a scatter along the slots alone would become a
  # dynamic-update-slice. XLA:CPU fuses that into every reader, which copies the
  # cache several times per layer.
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
  # Several indices, as in a dense cache: for a single token, a scatter along
  # the pages alone would become a slice update that copies the pool.
  head_1Y = jnp.arange(num_heads)[None, :]
  where = page_T[:, None], slot_T[:, None], head_1Y
  scale_PQY = pages.scale_PQY
  if scale_PQY is not None:
    kv_TYC, scale_TY = quantize(kv_TYC, pages.kv_PQYC.dtype.name)
    scale_PQY = scale_PQY.at[where].set(scale_TY, mode='drop')
  kv_PQYC = pages.kv_PQYC.at[where].set(
    _stored(kv_TYC, pages.kv_PQYC.dtype), mode='drop'
  )
  return cache._replace(pages=Pages(kv_PQYC, scale_PQY))


def _stored(kv: jax.Array, dtype) -> jax.Array:
  if dtype == BFLOAT16_BITS:
    return jax.lax.bitcast_convert_type(kv.astype(jnp.bfloat16), dtype)
  return kv.astype(dtype)


def numbers(stored: jax.Array) -> jax.Array:
  """Returns the numbers of quantized pages before they are scaled, float32."""
  if stored.dtype == FP8_BITS:
    stored = jax.lax.bitcast_convert_type(stored, jnp.float8_e4m3fn)
  return stored.astype(jnp.float32)


def loaded(stored: jax.Array, dtype: Any) -> jax.Array:
  """Returns keys and values from pages without scale, in `dtype`."""
  if stored.dtype == BFLOAT16_BITS:
    stored = jax.lax.bitcast_convert_type(stored, jnp.bfloat16)
  return stored.astype(dtype)


def _places(cache: PagedLayer, positions_T, num_pages: int, page_size: int):
  """Returns page and slot of each token; the page of padding is num_pages."""
  table_DL, table_XL = cache.decode_table_DL, cache.chunk_table_XL
  rows = cache.chunk_tokens(positions_T.shape[0])
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


def quantize(x: jax.Array, dtype: str = INT8) -> tuple[jax.Array, jax.Array]:
  """Returns [..., C] in a dtype of `QUANTIZED`, and float32 scales [...].

  Symmetric, with one scale per token and head. The largest channel becomes the
  largest number of the dtype. In int8, the error of a channel is at most half a
  scale, 1/254 of the largest channel. In fp8, it is at most 1/16 of the channel
  itself, or half of the dtype's smallest number. The scale of a vector that is
  not finite is NaN.
  """
  x = x.astype(jnp.float32)
  scale = jnp.max(jnp.abs(x), axis=-1) / _LARGEST[dtype]
  # XLA:CPU's maximum may pass over NaN, and no integer stands for it.
  scale = jnp.where(jnp.all(jnp.isfinite(x), axis=-1), scale, jnp.nan)
  # A vector of zeros has scale 0, which must not divide.
  safe = jnp.where(scale == 0, 1.0, scale)
  x = x / safe[..., None]
  if dtype == INT8:
    return jnp.round(x).astype(jnp.int8), scale
  # A quotient may be rounded past the largest number, which would be NaN.
  x = jnp.clip(x, -_LARGEST[dtype], _LARGEST[dtype]).astype(jnp.float8_e4m3fn)
  return jax.lax.bitcast_convert_type(x, jnp.uint8), scale


def copy_pages(
  pools: tuple[Pages, ...], source_Z: jax.Array, target_Z: jax.Array
) -> tuple[Pages, ...]:
  """Returns the pools with pages copied from `source_Z` to `target_Z`.

  Each page is copied in every layer. A target out of range is dropped.
  """
  return jax.tree.map(
    lambda pool: pool.at[target_Z].set(pool[source_Z], mode='drop'), pools
  )
