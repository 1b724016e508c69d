"""The heartbeat of a process: it dies visibly, and it hangs invisibly.

    pulse.beat(send, timeout_s)                # in a thread of the process
    watched = pulse.Pulse(timeout_s, now)      # in the process that watches it
    watched.heard(now, seconds_in_step)
    if why := watched.check(now): ...

A process that ends closes its sockets. One that is stopped, swapped out or
waits for a device that never answers keeps them open: it is known by what it
does not send. A beat carries the seconds that the process has been in one step
of its work, since the thread that beats may live on when the work hangs.
"""

from collections.abc import Callable
import threading
import time

# Beats per timeout: a late one or two do not count as the end.
_PER_TIMEOUT = 4
# A start imports libraries, and a step of a large model on a slow device takes
# long: both may take so many timeouts.
_SLOW = 10


class Pulse:
  """The beats of another process, as they arrive."""

  def __init__(self, timeout_s: float, now: float):
    """Starts to wait for the first beat.

    Args:
      timeout_s: seconds without a beat after which the process hangs.
      now: seconds of `time.monotonic`, as in all methods.
    """
    self._timeout_s = timeout_s
    self._heard_at = self._checked_at = now
    self._is_started, self._in_step = False, 0.0

  @property
  def interval_s(self) -> float:
    """Seconds between two checks."""
    return self._timeout_s / _PER_TIMEOUT

  def heard(self, now: float, in_step: float = 0.0) -> None:
    """Notes a beat.

    Args:
      now: of its arrival.
      in_step: seconds that the process has been in one step.
    """
    self._heard_at, self._is_started, self._in_step = now, True, in_step

  def check(self, now: float) -> str:
    """Returns why the process counts as hanging; '' if it does not."""
    late, self._checked_at = now - self._checked_at, now
    if late > 2 * self.interval_s:
      # This process was stopped itself: beats wait to be read.
      self._heard_at = now
      return ''
    silent = now - self._heard_at
    most = self._timeout_s * (1 if self._is_started else _SLOW)
    if silent > most:
      return (
        f'got no heartbeat for {silent:.0f} s, expected one within {most:g} s'
      )
    if self._in_step > self._timeout_s * _SLOW:
      return (
        f'got a step that takes {self._in_step:.0f} s, expected less than'
        f' {self._timeout_s * _SLOW:g} s'
      )
    return ''


def beat(
  send: Callable[[float], None],
  timeout_s: float,
  in_step: Callable[[], float] = lambda: 0.0,
) -> None:
  """Sends beats in a thread, until the process ends.

  Args:
    send: sends a beat with the seconds of `in_step`; OSError ends the thread.
    timeout_s: of the process that watches.
    in_step: returns the seconds that this process has been in one step.
  """

  def run() -> None:
    while True:
      try:
        send(in_step())
      except OSError:
        return  # nobody listens any more
      time.sleep(timeout_s / _PER_TIMEOUT)

  threading.Thread(target=run, name='beat', daemon=True).start()
