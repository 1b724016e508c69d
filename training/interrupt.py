"""Turns SIGTERM and Ctrl-C into a request that the loop sees between steps."""

import signal


class Interrupt:
  """While entered, remembers the first signal instead of dying of it.

  A second Ctrl-C is not caught: it stops the process at once.
  """

  SIGNALS = (signal.SIGTERM, signal.SIGINT)

  def __init__(self):
    self.signal: signal.Signals | None = None
    self._previous = {}

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

  def _remember(self, number, frame) -> None:
    del frame
    self.signal = signal.Signals(number)
    signal.signal(number, self._previous[number])
