"""How long the devices had nothing to do because no batch was there yet.

Steps are only dispatched by the loop, so that the loop waits for a batch says
little: the devices may be busy with steps that were dispatched before. Somebody
has to see when they became idle, without the loop waiting for them: a thread
that does nothing else.
"""

from collections.abc import Callable
import queue
import threading
import time
from typing import Any

import jax


class InputWait:
  """Adds up where waiting for a batch and idle devices overlap.

  wait.batch_came(asked_at, got_at)
  wait.dispatched(step_metrics)
  """

  def __init__(self, clock: Callable[[], float] = time.perf_counter):
    self._clock = clock
    # When the step before this batch was done is not known yet.
    self._waits: list[tuple[float, float]] = []
    self._done: list[float] = []
    self._dispatched: queue.Queue[Any] = queue.Queue()
    # Daemonic: a device that hangs must not keep the process from ending.
    self._thread = threading.Thread(target=self._watch, daemon=True)
    self._thread.start()

  def batch_came(self, asked_at: float, got_at: float) -> None:
    """Notes that the loop waited for the batch of the step to come."""
    self._waits.append((asked_at, got_at))

  def dispatched(self, step_metrics: Any) -> None:
    """Notes a step; it is done when its metrics are there."""
    self._dispatched.put(step_metrics)

  def take(self) -> float:
    """Returns the seconds since it was last asked.

    To be called when all steps are done; else it waits for them.
    """
    self._dispatched.join()
    # The devices were idle before the first of these steps.
    idle_since = [float('-inf'), *self._done]
    # The batch of a step that is still to be dispatched may be here already.
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
        pass  # the loop asks for the same values, and will be told
      finally:
        self._done.append(self._clock())
        step_metrics = None  # or it would live until the next one
        self._dispatched.task_done()
