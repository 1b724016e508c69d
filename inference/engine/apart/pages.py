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


def moved(values: Any, shardings: Any) -> Any:
  """Returns arrays on the devices of another engine.

  Over several processes every part stays in its process: `jax.device_put` moves
  arrays between processes on some platforms alone, so each process gives every
  engine the same share of its devices.

  Args:
    values: on the devices of one engine.
    shardings: of the same arrays on the devices of another one.

  Raises:
    ValueError: a part would have to go to another process.
  """
  return jax.tree.map(_moved, values, shardings)


def _moved(leaf: jax.Array, sharding: Any) -> jax.Array:
  if leaf.is_fully_addressable:
    return jax.device_put(leaf, sharding)
  meshes: Any = leaf.sharding.mesh, sharding.mesh  # pyright: ignore[reportAttributeAccessIssue]
  place_of = dict(zip(*(mesh.devices.flat for mesh in meshes), strict=True))
  parts = []
  for shard in leaf.addressable_shards:
    place = place_of[shard.device]
    if place.process_index != shard.device.process_index:
      raise ValueError(
        f'engine.prefill_engines: got {shard.device} and {place} for the same'
        ' part of two engines, expected devices of one process; start one'
        ' process, or set engine.prefill_engines = 0'
      )
    parts.append(jax.device_put(shard.data, place))
  return jax.make_array_from_single_device_arrays(leaf.shape, sharding, parts)


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
    # Not of a class that tells others, which compile on their own.
    return Port.write(self, kv_cache, [], [values])

  def warm(self, kv_cache: device_state.KVCache, shardings: Any) -> None:
    """Compiles `sent`, so that no prompt waits for it."""
    Port.sent(self, kv_cache, [0], shardings)

  def sent(
    self, kv_cache: device_state.KVCache, pages: Sequence[int], shardings: Any
  ) -> Any:
    """Returns the contents of pages on the devices of another engine.

    `SIZE` of them are in each element.

    Args:
      kv_cache: of this engine.
      pages: of it.
      shardings: of the port of the other one, which writes them.
    """
    contents = self._contents(kv_cache, pages)
    return [moved(each, shardings) for each in contents]

  def drop(self, contents: Any) -> None:
    """Frees contents that will not be written."""
    del contents

  def _contents(
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
    contents: Any,
  ) -> device_state.KVCache:
    """Writes contents to pages. Donates the KV cache.

    Args:
      kv_cache: of the engine.
      pages: the page of each content; None: it is not needed.
      contents: of `sent`, on the devices of this engine.
    """
    for index, values in enumerate(contents):
      some = pages[index * SIZE : (index + 1) * SIZE]
      pages_Z = np.full((SIZE,), self._num_pages, np.int32)
      pages_Z[: len(some)] = [
        self._num_pages if page is None else page for page in some
      ]
      kv_cache = self._write(kv_cache, pages_Z, values)
    return kv_cache
