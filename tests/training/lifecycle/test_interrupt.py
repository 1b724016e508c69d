"""When to stop, agreed among processes; here the others are pretended.

Real ones: tests/training/runs/test_several_processes.py. One alone:
tests/training/runs/test_run.py.
"""

import signal

import numpy as np
import pytest

from parallel import processes
from training.lifecycle import interrupt


class _Others:
  """Another process, and a clock on which every step takes a while."""

  def __init__(self, monkeypatch):
    self.answer = [0, 10**6]  # signal, steps to the next question
    self.asked_at = []
    self.step = 0
    self.seconds_per_step = 0.1
    monkeypatch.setattr(processes, 'count', lambda: 2)
    monkeypatch.setattr(processes, 'gather', self._gather)
    monkeypatch.setattr(
      interrupt.time, 'monotonic', lambda: self.step * self.seconds_per_step
    )

  def _gather(self, *values):
    self.asked_at.append(self.step)
    return np.array([values, self.answer], np.int32)

  def run(self, stop, num_steps):
    """Returns the step after which to stop, or None."""
    for _ in range(num_steps):
      self.step += 1
      if stop.after_step(self.step):
        return self.step
    return None


@pytest.fixture
def others(monkeypatch):
  return _Others(monkeypatch)


def test_processes_ask_each_other_every_two_seconds(others):
  waited = []
  stop = interrupt.Interrupt(wait_for_steps=lambda: waited.append(others.step))
  assert others.run(stop, 100) is None
  # At 10 steps per second: first often, then every 20 steps.
  assert others.asked_at == [1, 2, 6, 22, 42, 62, 82]
  assert waited == others.asked_at


def test_the_more_impatient_process_decides_when_to_ask(others):
  others.answer = [0, 5]
  assert others.run(interrupt.Interrupt(), 12) is None
  assert others.asked_at == [1, 2, 6, 11]


def test_slow_steps_are_asked_about_one_by_one(others):
  others.seconds_per_step = 7.0
  assert others.run(interrupt.Interrupt(), 5) is None
  assert others.asked_at == [1, 2, 3, 4, 5]


def test_a_signal_of_another_process_stops_this_one(others):
  stop = interrupt.Interrupt()
  assert others.run(stop, 4) is None
  others.answer = [signal.SIGTERM, 1]
  assert others.run(stop, 100) == 6
  assert stop.signal == signal.SIGTERM
  assert stop.exit_code == 143


def test_a_signal_of_ones_own_waits_for_the_question(others):
  with interrupt.Interrupt() as stop:
    assert others.run(stop, 3) is None
    signal.raise_signal(signal.SIGINT)
    assert others.run(stop, 100) == 6
  assert stop.exit_code == 130


def test_different_signals_give_one_exit_code(others):
  """Ctrl-C here, SIGTERM there: all exit as of SIGTERM."""
  others.answer = [signal.SIGTERM, 1]
  with interrupt.Interrupt() as stop:
    signal.raise_signal(signal.SIGINT)
    assert others.run(stop, 1) == 1
  assert stop.exit_code == 143


def test_an_evaluation_asks_at_a_pace_of_its_own(others):
  with interrupt.Interrupt() as stop:
    assert others.run(stop, 30) is None
    others.asked_at, others.answer = [], [0, 3]
    stops = stop.between_batches()
    for _ in range(7):
      others.step += 1
      assert not stops()
    # Before the first two batches, and every third from then on.
    assert others.asked_at == [31, 32, 35]
    others.answer = [signal.SIGTERM, 3]
    assert stops()
    # Agreed on: nobody asks again.
    others.asked_at = []
    assert stops()
    assert stop.after_step(99)
    assert not others.asked_at


def test_a_signal_that_came_too_late_changes_no_exit_code(others):
  """The others have taken the last step and left: so does this one."""
  with interrupt.Interrupt() as stop:
    assert others.run(stop, 3) is None
    signal.raise_signal(signal.SIGTERM)
    assert stop.signal == signal.SIGTERM
    assert stop.exit_code == 0


def test_sigterm_may_come_twice():
  """From a scheduler, and passed on by the supervisor that got it, too."""
  with interrupt.Interrupt() as stop:
    signal.raise_signal(signal.SIGTERM)
    signal.raise_signal(signal.SIGTERM)
    assert stop.after_step(1)
  assert stop.exit_code == 143


def test_the_second_ctrl_c_is_not_caught():
  # A session that was started in the background ignores SIGINT.
  before = signal.signal(signal.SIGINT, signal.default_int_handler)
  try:
    _press_ctrl_c_twice()
  finally:
    signal.signal(signal.SIGINT, before)


def _press_ctrl_c_twice():
  with interrupt.Interrupt():
    signal.raise_signal(signal.SIGINT)
    with pytest.raises(KeyboardInterrupt):
      signal.raise_signal(signal.SIGINT)
