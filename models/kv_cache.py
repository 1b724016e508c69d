"""The dense KV cache: an explicit pytree, an argument and a result.

Slot s of a sequence holds the keys and values of its position s, so a cache
needs no lengths: attention from position p sees the slots s <= p. A prompt may
be padded on the right; what padding leaves behind is overwritten by the token
that really has that position before anything can see it.

Stored [B, K, S, C]: attention multiplies per sequence and head, and finds its
operands contiguous. Latent attention keeps a single head of two widths: as the
key what is rotated, as the value the latent (`models/latent_attention.py`).
"""

from typing import Any, NamedTuple

import jax
import jax.numpy as jnp

from models import config as config_lib


class LayerCache(NamedTuple):
  """Keys and values of one layer, or of all with a leading axis N."""

  k_BKSC: jax.Array
  v_BKSC: jax.Array


# A tuple with a LayerCache per layer; one stacked LayerCache if layers are
# scanned. The tuple decodes faster: a scan copies the cache in and out.
Cache = tuple[LayerCache, ...] | LayerCache


def init(
  config: config_lib.ModelConfig,
  *,
  batch_size: int,
  length: int,
  dtype: Any = jnp.float32,
) -> Cache:
  """Returns an empty cache for `batch_size` sequences of up to `length`."""
  heads, *widths = head_shapes(config)
  shapes = [(batch_size, heads, length, width) for width in widths]
  if config.scan_layers:
    shapes = [(config.num_layers, *shape) for shape in shapes]
    return LayerCache(*(jnp.zeros(shape, dtype) for shape in shapes))
  # Distinct buffers: the decode step donates each of them.
  return tuple(
    LayerCache(*(jnp.zeros(shape, dtype) for shape in shapes))
    for _ in range(config.num_layers)
  )


def head_shapes(config: config_lib.ModelConfig) -> tuple[int, int, int]:
  """Returns the number of heads that are kept, and widths of key and value."""
  if config.latent_width:
    return 1, config.rotary_width, config.latent_width
  return config.num_kv_heads, config.head_width, config.head_width


def length(cache: Cache) -> int:
  """Returns S, the number of slots per sequence."""
  return jax.tree.leaves(cache)[0].shape[-2]


def write(
  cache: LayerCache,
  k_BTKC: jax.Array,
  v_BTKC: jax.Array,
  positions_BT: jax.Array,
) -> LayerCache:
  """Puts the keys and values of position p into slot p.

  Positions beyond the last slot are dropped, never wrapped or clamped onto
  another token's slot.
  """
  # Sequence, head and slot are all indices of one scatter. A scatter along the
  # slots alone would, for a single sequence, become a dynamic-update-slice that
  # XLA:CPU fuses into every reader: several copies of the cache per layer.
  batch = jnp.arange(cache.k_BKSC.shape[0])[:, None, None]
  head = jnp.arange(cache.k_BKSC.shape[1])[None, :, None]
  slot = positions_BT[:, None, :]

  def put(cache_BKSC, new_BTKC):
    return cache_BKSC.at[batch, head, slot].set(
      new_BTKC.astype(cache_BKSC.dtype).swapaxes(1, 2), mode='drop'
    )

  return LayerCache(put(cache.k_BKSC, k_BTKC), put(cache.v_BKSC, v_BTKC))
