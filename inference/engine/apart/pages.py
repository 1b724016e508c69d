"""Pages of the KV cache on their way from one engine to another.

Two engines of one model and config have pages of the same form. Keys and values
depend on the tokens of their page and of all pages before, so that a page may
be read by an engine that did not compute it.
"""

from collections.abc import Sequence
from typing import Any

import jax
import numpy as np

from inference.engine import device_state

SIZE = 16  # pages that one call reads or writes


def _read(kv_cache, pages_Z):
  return jax.tree.map(lambda pool: pool[pages_Z], kv_cache)


def _write(kv_cache, pages_Z, values):
  # Padding is a page that the pool does not have: it is dropped.
  return jax.tree.map(
    lambda pool, value: pool.at[pages_Z].set(value, mode='drop'),
    kv_cache,
    values,
  )


class Port:
  """Reads pages of an engine's KV cache, or writes them."""

  def __init__(self, kv_cache: device_state.KVCache):
    """Takes the form of the pools, and where they are, of a KV cache."""
    (pool, *_) = jax.tree.leaves(kv_cache)
    self._num_pages = pool.shape[0]
    # A few pages lie on the devices as all pages do: axes after the first.
    self.shardings = jax.tree.map(lambda leaf: leaf.sharding, kv_cache)
    self._read = jax.jit(_read, out_shardings=self.shardings)
    self._write = jax.jit(
      _write, donate_argnums=0, out_shardings=self.shardings
    )

  def compile(self, kv_cache: device_state.KVCache) -> device_state.KVCache:
    """Compiles both programs. Donates the KV cache and returns it."""
    values = self._read(kv_cache, np.zeros((SIZE,), np.int32))
    return self.write(kv_cache, [], [values])

  def read(
    self, kv_cache: device_state.KVCache, pages: Sequence[int]
  ) -> list[Any]:
    """Returns the contents of pages, `SIZE` of them in each element."""
    found = []
    for start in range(0, len(pages), SIZE):
      some = pages[start : start + SIZE]
      pages_Z = np.zeros((SIZE,), np.int32)
      pages_Z[: len(some)] = some
      found.append(self._read(kv_cache, pages_Z))
    return found

  def write(
    self,
    kv_cache: device_state.KVCache,
    pages: Sequence[int | None],
    contents: Sequence[Any],
  ) -> device_state.KVCache:
    """Writes contents to pages. Donates the KV cache.

    Args:
      kv_cache: of the engine.
      pages: the page of each content; None: it is not needed.
      contents: of `read`, on the devices of this engine.
    """
    for index, values in enumerate(contents):
      some = pages[index * SIZE : (index + 1) * SIZE]
      pages_Z = np.full((SIZE,), self._num_pages, np.int32)
      pages_Z[: len(some)] = [
        self._num_pages if page is None else page for page in some
      ]
      kv_cache = self._write(kv_cache, pages_Z, values)
    return kv_cache
