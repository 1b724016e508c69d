"""The heartbeat: silence, long steps, and a watcher that was stopped itself."""

import queue

import pytest

from parallel import pulse


def _checked(watched, first, last):
  """Returns the last check, of checks at every interval."""
  now, why = first, ''
  while now <= last and not why:
    why = watched.check(now)
    now += watched.interval_s
  return why


def test_a_process_that_beats_lives():
  watched = pulse.Pulse(8.0, now=0.0)
  for now in range(0, 200, 2):
    watched.heard(now, in_step=0.5)
    assert watched.check(now) == ''


def test_silence_is_noticed_after_the_timeout():
  watched = pulse.Pulse(8.0, now=0.0)
  watched.heard(2.0)
  assert _checked(watched, 2.0, 10.0) == ''
  assert watched.check(10.5) == (
    'got no heartbeat for 8 s, expected one within 8 s'
  )


def test_a_start_may_take_longer():
  watched = pulse.Pulse(8.0, now=0.0)
  assert _checked(watched, 0.0, 80.0) == ''
  assert 'no heartbeat for 82 s, expected one within 80 s' in (
    watched.check(82.0)
  )


def test_a_process_that_beats_and_is_in_one_step_for_long_hangs():
  watched = pulse.Pulse(8.0, now=0.0)
  for seconds, why in (
    (79.0, ''),
    (81.0, 'got a step that takes 81 s, expected less than 80 s'),
  ):
    watched.heard(seconds, in_step=seconds)
    watched.check(seconds - 1)
    assert watched.check(seconds) == why


def test_beats_that_wait_to_be_read_are_no_silence():
  """The watcher was stopped for an hour: what it watches may be well."""
  watched = pulse.Pulse(8.0, now=0.0)
  watched.heard(2.0)
  watched.check(2.0)
  assert watched.check(3600.0) == ''
  assert _checked(watched, 3602.0, 3607.0) == ''
  assert watched.check(3609.0)


def test_beats_carry_the_seconds_of_the_step_until_nobody_listens():
  sent = queue.Queue()

  def send(in_step):
    sent.put(in_step)
    if in_step > 2:
      raise OSError

  steps = iter(range(1, 10))
  pulse.beat(send, 0.01, lambda: next(steps))
  assert [sent.get(timeout=10) for _ in range(3)] == [1, 2, 3]
  with pytest.raises(queue.Empty):
    sent.get(timeout=0.1)
