"""Signals: SIGTERM and Ctrl-C become a request to stop between two steps.

The request is also seen between two batches of an evaluation, because a whole
evaluation may take longer than a cluster waits (`checkpoint.grace_s`).

All processes of a run must stop after the same step, but a signal may reach
only one of them. So they exchange the signal every few seconds. This exchange
is a collective of two integers, and makes the devices wait for the host once.
It is too rare to cost time, and frequent enough to save within the grace
period. Exchanging only at reports would take too long where steps are slow.
The processes agree on the step of the next exchange too, because their clocks
differ.
"""

from collections.abc import Callable
import signal
import time

from parallel import processes

SECONDS_BETWEEN_QUESTIONS = 2.0
# Limit on the growth of the interval from one exchange to the next: the first
# steps are slow, so they do not predict the time of later steps.
_MAX_GROWTH = 4


class Pace:
  """The step of the next exchange between processes; the same in all."""

  def __init__(self):
    self.next_question = 0  # a step, or a batch
    self._asked_at: tuple[int, float] | None = None  # step, seconds
    self._interval = 1  # steps

  def guess(self, step: int) -> int:
    """Returns how many steps this process expects until the next exchange."""
    now = time.monotonic()
    if self._asked_at is None:
      self._asked_at = step, now
      return 1
    last_step, last_time = self._asked_at
    self._asked_at = step, now
    rate = (step - last_step) / max(now - last_time, 1e-9)
    steps = int(rate * SECONDS_BETWEEN_QUESTIONS)
    return max(1, min(steps, self._interval * _MAX_GROWTH))

  def agree(self, step: int, interval: int) -> None:
    """Sets the interval, which is the smallest guess of all processes."""
    self._interval = interval
    self.next_question = step + interval


class Interrupt:
  """Catches signals while entered, and remembers the first one.

  A second Ctrl-C is not caught: it ends the process at once.
  """

  SIGNALS = (signal.SIGTERM, signal.SIGINT)

  def __init__(
    self,
    *,
    grace_s: float = 30.0,
    wait_for_steps: Callable[[], None] = lambda: None,
  ):
    """Creates the object; catches nothing before it is entered.

    Args:
      grace_s: seconds between SIGTERM and SIGKILL, for messages.
      wait_for_steps: returns when the devices have done all dispatched steps.
        Called before each exchange between processes.
    """
    self.signal: signal.Signals | None = None
    self.grace_s = grace_s
    self._wait_for_steps = wait_for_steps
    self._previous = {}
    self._pace = Pace()  # for steps
    self._is_agreed = False  # every process knows of the signal
    self._since = 0.0  # time at which this process noticed the signal, seconds

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
    """Returns 128 + the signal, as shells do; 0 if there was none."""
    if self.signal is None:
      return 0
    if processes.count() > 1 and not self._is_agreed:
      return 0  # it came after the last exchange: the run ended by itself
    return 128 + int(self.signal)

  def after_step(self, step: int) -> bool:
    """Returns whether to stop after `step`; the same in every process.

    Must be called after every step. When it returns True, `signal` is set in
    every process.
    """
    return self._ask(self._pace, step)

  def between_batches(self) -> Callable[[], bool]:
    """Returns a function that says whether to stop, for one evaluation.

    The evaluation must call it before each batch. All processes of a run
    evaluate the same batches.
    """
    pace, batch = Pace(), 0

    def stops() -> bool:
      nonlocal batch
      batch += 1
      return self._ask(pace, batch)

    return stops

  def seconds(self) -> float:
    """Returns the seconds since the signal was noticed here."""
    return time.monotonic() - self._since

  def _ask(self, pace: Pace, step: int) -> bool:
    if processes.count() == 1 or self._is_agreed:
      return bool(self)
    if step < pace.next_question:
      return False
    self._wait_for_steps()
    answers_P2 = processes.gather(int(self.signal or 0), pace.guess(step))
    # The larger number, so that all processes exit with the same code. SIGTERM
    # is larger than SIGINT, and a cluster may send it to one process only.
    number = int(answers_P2[:, 0].max())
    pace.agree(step, int(answers_P2[:, 1].min()))
    if number:
      if self.signal is None:
        self._since = time.monotonic()
      self.signal = signal.Signals(number)
      self._is_agreed = True
    return bool(number)

  def _remember(self, number, frame) -> None:
    del frame
    if self.signal is None:
      self._since = time.monotonic()
    self.signal = signal.Signals(number)
    # Only a second Ctrl-C ends the process. A scheduler may send SIGTERM to
    # this process and to its supervisor, which passes it on: the second SIGTERM
    # must not end this process before it has saved.
    if number == signal.SIGINT:
      signal.signal(number, self._previous[number])
