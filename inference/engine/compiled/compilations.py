"""The number of XLA compilations, per thread: 0 after an engine is ready."""

import functools
import threading

import jax

_EVENT = '/jax/core/compile/backend_compile_duration'


class _Counter(threading.local):
  count = 0


_COUNTER = _Counter()


def on_this_thread() -> int:
  """Returns the number of compilations on this thread since the first call.

  Programs from the persistent cache count too: they were not ready either.
  """
  _listen()
  return _COUNTER.count


@functools.cache
def _listen() -> None:
  # JAX cannot remove listeners: register one for the whole process.
  jax.monitoring.register_event_duration_secs_listener(_on_event)


def _on_event(event: str, duration_secs: float, **_) -> None:
  del duration_secs
  if event == _EVENT:
    _COUNTER.count += 1
