"""Turns SIGTERM and Ctrl-C into a request that the loop sees between steps.

All processes of a run have to stop after the same step, and a signal may reach
only one of them. They ask each other every few seconds, which is a collective
of two integers and makes the devices wait for the host once: too rarely to be
felt, often enough to save within the grace that clusters give (30 s). Asking at
reports alone would take as long as a report of slow steps does. When to ask
next is agreed on, too, as a number of steps: their clocks differ.
"""

from collections.abc import Callable
import signal
import time

from parallel import processes

_SECONDS_BETWEEN_QUESTIONS = 2.0
# The first steps are slow, and say little about how long the next ones take.
_MAX_GROWTH = 4


class Interrupt:
  """While entered, remembers the first signal instead of dying of it.

  A second Ctrl-C is not caught: it stops the process at once.
  """

  SIGNALS = (signal.SIGTERM, signal.SIGINT)

  def __init__(self, *, wait_for_steps: Callable[[], None] = lambda: None):
    """Prepares to catch.

    Args:
      wait_for_steps: returns when the devices have done what they were given;
        called before the processes ask each other.
    """
    self.signal: signal.Signals | None = None
    self._wait_for_steps = wait_for_steps
    self._previous = {}
    self._next_question = 0  # a step
    self._asked_at: tuple[int, float] | None = None  # step, seconds
    self._interval = 1  # steps

  def __enter__(self) -> 'Interrupt':
    for number in self.SIGNALS:
      self._previous[number] = signal.signal(number, self._remember)
    return self

  def __exit__(self, *exception) -> None:
    for number, handler in self._previous.items():
      signal.signal(number, handler)

  def __bool__(self) -> bool:
    return self.signal is not None

  @property
  def exit_code(self) -> int:
    """The shell's convention for a process that a signal ended."""
    return 0 if self.signal is None else 128 + int(self.signal)

  def after_step(self, step: int) -> bool:
    """Returns whether to stop after `step`: the same in every process.

    To be asked after every step. If a signal reached any process, `signal` is
    set in all of them when it returns True.
    """
    if processes.count() == 1:
      return bool(self)
    if step < self._next_question:
      return False
    self._wait_for_steps()
    self._interval = self._steps_to_next(step)
    answers_P2 = processes.gather(int(self.signal or 0), self._interval)
    # Ctrl-C reaches every process of a terminal, SIGTERM of a cluster perhaps
    # one: the larger number is SIGTERM, and all exit with the same code.
    number = int(answers_P2[:, 0].max())
    self._interval = int(answers_P2[:, 1].min())
    self._next_question = step + self._interval
    self.signal = signal.Signals(number) if number else None
    return bool(number)

  def _steps_to_next(self, step: int) -> int:
    """Returns this process's guess of how many steps take a moment."""
    now = time.monotonic()
    if self._asked_at is None:
      self._asked_at = step, now
      return 1
    last_step, last_time = self._asked_at
    self._asked_at = step, now
    rate = (step - last_step) / max(now - last_time, 1e-9)
    steps = int(rate * _SECONDS_BETWEEN_QUESTIONS)
    return max(1, min(steps, self._interval * _MAX_GROWTH))

  def _remember(self, number, frame) -> None:
    del frame
    self.signal = signal.Signals(number)
    signal.signal(number, self._previous[number])
