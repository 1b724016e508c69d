"""Counts what XLA compiles, per thread: after an engine is ready, nothing."""

import functools
import threading

import jax

_EVENT = '/jax/core/compile/backend_compile_duration'


class _Counter(threading.local):
  count = 0


_COUNTER = _Counter()


def on_this_thread() -> int:
  """Returns how many programs were compiled on this thread since first asked.

  A program found in the persistent cache counts too: its shape was not ready.
  """
  _listen()
  return _COUNTER.count


@functools.cache
def _listen() -> None:
  # JAX keeps listeners for good: one for the whole process.
  jax.monitoring.register_event_duration_secs_listener(_on_event)


def _on_event(event: str, duration_secs: float, **_) -> None:
  del duration_secs
  if event == _EVENT:
    _COUNTER.count += 1
