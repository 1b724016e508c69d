"""Pages that engines over several processes send each other: told, repeated.

Every process has devices of each engine. It reads the pages on its devices of
one engine, and writes them on its devices of another; none leaves a process.
Process 0 says which pages, and a number stands for their contents elsewhere.
"""

from collections.abc import Sequence
from typing import Any, NamedTuple

from inference.engine import device_state
from inference.engine.apart import pages as pages_lib
from inference.engine.processes import leader as leader_lib


class Numbered(NamedTuple):
  """Contents of pages, and their number in other processes."""

  number: int
  values: list[Any]


class Port(pages_lib.Port):
  """The port of an engine of process 0; the others repeat its calls."""

  def __init__(self, kv_cache: device_state.KVCache, leader: leader_lib.Leader):
    """Takes the form of the pools of a KV cache.

    Args:
      kv_cache: of the engine.
      leader: of the engine.
    """
    super().__init__(kv_cache)
    self._leader = leader

  def sent(self, kv_cache, pages, shardings):
    with self._leader.order:
      number = self._leader.new_number()
      self._leader.tell('send', number, list(pages))
      return Numbered(number, super().sent(kv_cache, pages, shardings))

  def write(self, kv_cache, pages, contents):
    if not contents:
      return kv_cache
    with self._leader.order:
      self._leader.tell('write', contents.number, list(pages))
      kv_cache = super().write(kv_cache, pages, contents.values)
      self._leader.latest = kv_cache
      return kv_cache

  def drop(self, contents):
    if contents:
      self._leader.tell('drop', contents.number)


def port(
  kv_cache: device_state.KVCache, leader: leader_lib.Leader | None
) -> pages_lib.Port:
  """Returns the port of an engine, with or without other processes."""
  if leader is None:
    return pages_lib.Port(kv_cache)
  return Port(kv_cache, leader)


class Repeated:
  """The ports of all engines in another process, by number; 0 answers."""

  def __init__(self):
    """Starts without engines."""
    self._ports: dict[int, pages_lib.Port] = {}
    self._sent: dict[int, Any] = {}  # until they are written

  def add(
    self, engine: int, kv_cache: device_state.KVCache
  ) -> device_state.KVCache:
    """Makes the port of an engine. Donates the KV cache and returns it."""
    own = self._ports[engine] = pages_lib.Port(kv_cache)
    if not engine:
      return own.compile(kv_cache)
    own.warm(kv_cache, self._ports[0].shardings)
    return kv_cache

  def send(
    self,
    engine: int,
    kv_cache: device_state.KVCache,
    number: int,
    pages: Sequence[int],
  ) -> None:
    """Repeats `Port.sent` of an engine."""
    shardings = self._ports[0].shardings
    self._sent[number] = self._ports[engine].sent(kv_cache, pages, shardings)

  def write(
    self,
    kv_cache: device_state.KVCache,
    number: int,
    pages: Sequence[int | None],
  ) -> device_state.KVCache:
    """Repeats `Port.write` of the engine that answers."""
    return self._ports[0].write(kv_cache, pages, self._sent.pop(number))

  def drop(self, number: int) -> None:
    """Repeats `Port.drop`."""
    del self._sent[number]
