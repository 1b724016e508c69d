"""The time that the devices were idle because no batch was ready.

The loop only dispatches steps. When it waits for a batch, the devices may still
be busy with earlier steps. So the wait of the loop is not the idle time. A
separate thread waits for the devices and notes when each step is done.
"""

from collections.abc import Callable
import queue
import threading
import time
from typing import Any

import jax


class InputWait:
  """Adds up the time during which the loop waits and the devices are idle.

  wait.batch_came(asked_at, got_at)
  wait.dispatched(step_metrics)
  """

  def __init__(self, clock: Callable[[], float] = time.perf_counter):
    self._clock = clock
    # Waits for batches, and the times at which steps were done. The step before
    # the last batch may not be done yet.
    self._waits: list[tuple[float, float]] = []
    self._done: list[float] = []
    self._dispatched: queue.Queue[Any] = queue.Queue()
    # A daemon: a device that hangs must not keep the process from ending.
    self._thread = threading.Thread(target=self._watch, daemon=True)
    self._thread.start()

  def batch_came(self, asked_at: float, got_at: float) -> None:
    """Notes the wait of the loop for the batch of the next step."""
    self._waits.append((asked_at, got_at))

  def dispatched(self, step_metrics: Any) -> None:
    """Notes a step, which is done when its metrics are computed."""
    self._dispatched.put(step_metrics)

  def take(self) -> float:
    """Returns the idle seconds since the last call.

    Waits for all dispatched steps.
    """
    self._dispatched.join()
    # -inf: the devices were idle before the first of these steps.
    idle_since = [float('-inf'), *self._done]
    # Not strict: the batch of the next step may have come before its step.
    seconds = sum(
      max(got_at - max(asked_at, idle), 0.0)
      for (asked_at, got_at), idle in zip(self._waits, idle_since, strict=False)
    )
    self._waits, self._done = [], []
    return seconds

  def close(self) -> None:
    """Ends the thread."""
    self._dispatched.put(None)

  def _watch(self) -> None:
    while (step_metrics := self._dispatched.get()) is not None:
      try:
        jax.block_until_ready(step_metrics)
      except Exception:
        pass  # the loop fetches the same values and gets the error
      finally:
        self._done.append(self._clock())
        step_metrics = None  # frees the arrays before the next step comes
        self._dispatched.task_done()
