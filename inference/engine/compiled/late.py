"""Programs that are compiled when they are needed for the first time."""

from collections.abc import Callable, Sequence
import threading
from typing import Any

import jax


class Late:
  """Compiles some programs once, and then the others in a thread."""

  def __init__(
    self,
    compile_keys: Callable[[list[Any]], None],
    device: jax.Device,
    first: Sequence[Any],
    rest: Sequence[Any] = (),
  ):
    """Compiles nothing yet.

    Args:
      compile_keys: compiles the programs of keys.
      device: that they are for.
      first: keys of the programs that are waited for.
      rest: keys of the programs that are compiled behind them.
    """
    self._compile_keys, self._device = compile_keys, device
    self._first, self._rest = list(first), list(rest)
    self._lock, self._is_done = threading.Lock(), False
    self._thread = threading.Thread(
      target=self._compile, args=(self._rest,), name='late', daemon=True
    )

  def compile(self) -> None:
    """Compiles the programs, unless they are; from any thread."""
    with self._lock:
      if self._is_done:
        return
      self._compile(self._first)
      self._is_done = True
      if self._rest:
        self._thread.start()

  @property
  def is_compiling(self) -> bool:
    """Whether the thread compiles."""
    return self._thread.is_alive()

  def _compile(self, keys: list[Any]) -> None:
    with jax.default_device(self._device):  # each thread has its own
      self._compile_keys(keys)
