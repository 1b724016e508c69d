"""Turns SIGTERM and Ctrl-C into a request that the loop sees between steps.

And between the batches of an evaluation, which may take longer than clusters
wait (`checkpoint.grace_s`).

All processes of a run have to stop after the same step, and a signal may reach
only one of them. They ask each other every few seconds, which is a collective
of two integers and makes the devices wait for the host once: too rarely to be
felt, often enough to save within the grace. Asking at reports alone would take
as long as a report of slow steps does. When to ask next is agreed on, too, as a
number of steps: their clocks differ.
"""

from collections.abc import Callable
import signal
import time

from parallel import processes

SECONDS_BETWEEN_QUESTIONS = 2.0
# The first steps are slow, and say little about how long the next ones take.
_MAX_GROWTH = 4


class Pace:
  """When processes ask each other next; agreed on among them."""

  def __init__(self):
    self.next_question = 0  # a step, or a batch
    self._asked_at: tuple[int, float] | None = None  # step, seconds
    self._interval = 1  # steps

  def guess(self, step: int) -> int:
    """Returns this process's guess of how many steps take a moment."""
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
    """Takes what the most impatient process wants."""
    self._interval = interval
    self.next_question = step + interval


class Interrupt:
  """While entered, remembers the first signal instead of dying of it.

  A second Ctrl-C is not caught: it stops the process at once.
  """

  SIGNALS = (signal.SIGTERM, signal.SIGINT)

  def __init__(
    self,
    *,
    grace_s: float = 30.0,
    wait_for_steps: Callable[[], None] = lambda: None,
  ):
    """Prepares to catch.

    Args:
      grace_s: seconds between SIGTERM and SIGKILL; told to the user.
      wait_for_steps: returns when the devices have done what they were given;
        called before the processes ask each other.
    """
    self.signal: signal.Signals | None = None
    self.grace_s = grace_s
    self._wait_for_steps = wait_for_steps
    self._previous = {}
    self._pace = Pace()  # of the steps
    self._is_agreed = False  # every process knows of the signal
    self._since = 0.0  # when it was noticed here, seconds

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
    if self.signal is None:
      return 0
    if processes.count() > 1 and not self._is_agreed:
      return 0  # it came too late: the others are done, and so is this one
    return 128 + int(self.signal)

  def after_step(self, step: int) -> bool:
    """Returns whether to stop after `step`: the same in every process.

    To be asked after every step. If a signal reached any process, `signal` is
    set in all of them when it returns True.
    """
    return self._ask(self._pace, step)

  def between_batches(self) -> Callable[[], bool]:
    """Returns what an evaluation asks before each of its batches.

    Once for each evaluation; in several processes they take the same batches.
    """
    pace, batch = Pace(), 0

    def stops() -> bool:
      nonlocal batch
      batch += 1
      return self._ask(pace, batch)

    return stops

  def seconds(self) -> float:
    """Returns how long ago the signal was noticed."""
    return time.monotonic() - self._since

  def _ask(self, pace: Pace, step: int) -> bool:
    if processes.count() == 1 or self._is_agreed:
      return bool(self)
    if step < pace.next_question:
      return False
    self._wait_for_steps()
    answers_P2 = processes.gather(int(self.signal or 0), pace.guess(step))
    # Ctrl-C reaches every process of a terminal, SIGTERM of a cluster perhaps
    # one: the larger number is SIGTERM, and all exit with the same code.
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
    # A scheduler that sends SIGTERM to all processes sends it to a supervisor,
    # too, which passes it on: the second one must not end us before we saved.
    if number == signal.SIGINT:
      signal.signal(number, self._previous[number])
