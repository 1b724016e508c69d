"""Where the time went: parts add up, over restarts and lost work."""

import functools
import pathlib
import subprocess
import sys
import time

import jax.numpy as jnp
import numpy as np
import pytest

from storage import atomic, file_names
from training import loop
from training.reporting import (
  goodput,
  input_wait,
  metrics,
  reporter as reporter_lib,
)

ROOT = pathlib.Path(__file__).parents[3]


class _Clock:
  """Seconds that pass when the test says so."""

  def __init__(self):
    self.now = 1000.0

  def __call__(self):
    return self.now

  def wait(self, seconds):
    self.now += seconds


@pytest.fixture
def clock():
  return _Clock()


def _measure(workdir, clock, **options):
  return goodput.Goodput(workdir, clock=clock, wall=clock, **options)


def _attempt(**fields):
  fields = {'start': 0.0, 'first_step': 0, 'step': 0, 'marks': [], **fields}
  return goodput.Attempt(**fields)


def test_parts_follow_each_other_and_add_up_to_the_wall_time(clock):
  """Binary fractions: equal means equal."""
  measured = _measure(None, clock, seconds_before=4.0)
  clock.wait(2.0)
  with measured.during('restore'):
    clock.wait(1.0)
  measured.enter('compile')
  clock.wait(8.0)
  measured.enter(goodput.STEPS)
  clock.wait(64.0)
  with measured.during('evaluate'):
    clock.wait(16.0)
    with measured.during('save'):
      clock.wait(0.5)
    clock.wait(0.25)
  clock.wait(32.0)
  measured.move(3.0, goodput.STEPS, 'input')
  told = measured.life()
  parts = {name: s for name, s in told.parts.items() if s}
  assert parts == {
    'start-up': 6.0,
    'restore': 1.0,
    'compile': 8.0,
    'steps': 93.0,
    'input': 3.0,
    'evaluate': 16.25,
    'save': 0.5,
  }
  assert told.running == clock.now - 1000.0 + 4.0
  assert told.goodput == 93.0 / told.running
  assert (told.lost, told.between) == (0.0, 0.0)


def test_no_more_is_moved_than_there_is(clock):
  measured = _measure(None, clock)
  measured.enter(goodput.STEPS)
  clock.wait(1.0)
  measured.enter('end')
  measured.move(5.0, goodput.STEPS, 'input')
  assert measured.seconds(goodput.STEPS) == 0.0
  assert measured.seconds('input') == 1.0


def test_an_exception_leaves_the_part(clock):
  measured = _measure(None, clock)

  def fail():
    with measured.during('save'):
      clock.wait(1.0)
      raise KeyError

  with pytest.raises(KeyError):
    fail()
  clock.wait(2.0)
  assert measured.seconds('save') == 1.0
  assert measured.seconds('start-up') == 2.0


def _train(workdir, clock, first_step, last_step, *, every=4):
  """An attempt of 2 s per step, with a mark every few steps; no end."""
  measured = _measure(workdir, clock, seconds_before=8.0)
  measured.begin(first_step)
  measured.enter('compile')
  clock.wait(16.0)
  measured.enter(goodput.STEPS)
  for step in range(first_step + 1, last_step + 1):
    clock.wait(2.0)
    measured.reached(step)
    if step % every == 0:
      measured.mark(step)
      with measured.during('save'):
        clock.wait(1.0)
  return measured


def test_a_killed_attempt_loses_what_came_after_the_checkpoint(tmp_path, clock):
  began = clock.now - 8.0
  _train(tmp_path, clock, 0, 10)  # saved after 4 and 8
  clock.wait(100.0)  # the start of the next one: 8 s before
  measured = _train(tmp_path, clock, 8, 12)
  told = measured.life()
  assert told.num_attempts == 2
  assert told.lost == 4.0  # steps 9 and 10
  assert told.parts['steps'] == 24.0  # 12 steps, once each
  assert told.parts['compile'] == 32.0
  assert told.parts['save'] == 3.0
  assert told.between == 92.0
  assert told.running + told.between == clock.now - began


def test_a_fallback_loses_more_than_one_attempt(tmp_path, clock):
  """Back to step 4: all of the second attempt, and a part of the first."""
  _train(tmp_path, clock, 0, 10)
  _train(tmp_path, clock, 8, 10)
  told = _train(tmp_path, clock, 4, 12).life()
  assert told.lost == 12.0 + 4.0
  assert told.parts['steps'] == 24.0


def test_what_has_no_mark_is_interpolated():
  attempt = _attempt(step=40, marks=[[30, 60.0]], seconds={'steps': 100.0})
  assert attempt.seconds_until(10) == 20.0
  assert attempt.seconds_until(35) == 80.0
  assert attempt.seconds_until(40) == attempt.seconds_until(99) == 100.0
  resumed = _attempt(first_step=20, step=30, seconds={'steps': 10.0})
  assert resumed.seconds_until(19) == 0.0


def test_old_marks_are_forgotten(clock):
  measured = _measure(None, clock)
  measured.enter(goodput.STEPS)
  for step in range(1000):
    measured.mark(step)
  assert len(measured._now.marks) < 100


def test_clocks_that_disagree_give_no_negative_time():
  attempts = [
    _attempt(start=100.0, step=5, seconds={'steps': 10.0}),
    _attempt(start=105.0, first_step=5, step=6, seconds={'steps': 1.0}),
  ]
  assert goodput.life(attempts).between == 0.0


def test_the_file_is_replaced_now_and_then_and_survives_failures(
  tmp_path, clock, monkeypatch
):
  measured = _measure(tmp_path, clock)
  measured.begin(0)
  measured.reached(1)
  clock.wait(0.5)
  measured.reached(2)
  assert [a.step for a in goodput.read(tmp_path)] == [1]
  clock.wait(0.5)
  measured.reached(3)
  (attempt,) = goodput.read(tmp_path)
  assert (attempt.step, attempt.wall) == (3, 1.0)

  def no_space(*args, **kwargs):
    raise OSError(28, 'No space left on device')

  monkeypatch.setattr(atomic, 'write_text', no_space)
  measured.write()
  assert goodput.read(tmp_path) == [attempt]


@pytest.mark.parametrize(
  'damage', [b'\0' * 64, b'{"start": 1.0, "st', b'[1]', b'{}', b'\xff\xfe']
)
def test_damaged_attempts_are_skipped_and_said(tmp_path, clock, damage):
  measured = _measure(tmp_path, clock)
  measured.begin(0)
  measured.reached(1)
  path = tmp_path / file_names.GOODPUT
  path.write_bytes(damage + b'\n' + path.read_bytes() + damage)
  said = []
  assert [a.step for a in goodput.read(tmp_path, said.append)] == [1]
  assert len(said) == 1
  assert f'{path}, line 1: got' in said[0]
  assert '2 such lines are skipped' in said[0]
  # A later attempt measures on, and leaves a whole file behind.
  again = _measure(tmp_path, clock, tell=said.append)
  again.begin(1)
  again.reached(2)
  assert [a.step for a in goodput.read(tmp_path)] == [1, 2]
  assert len(said) == 2


def test_other_processes_write_nothing(tmp_path, clock, monkeypatch):
  monkeypatch.chdir(tmp_path)
  _measure(None, clock).write()
  assert not list(tmp_path.iterdir())


def test_the_table_adds_up(tmp_path, clock):
  _train(tmp_path, clock, 0, 10)
  clock.wait(28.0)
  table = goodput.report(_train(tmp_path, clock, 8, 12).life())
  assert table.splitlines() == [
    'goodput    30.4% of 79.0 s, 2 attempts',
    '  steps that were kept                         24.0 s  30.4%',
    '  lost: steps taken again                       4.0 s   5.1%',
    '  process start to the first batch             16.0 s  20.3%',
    '  the first step of each batch shape           32.0 s  40.5%',
    '  held up by checkpoints                        3.0 s   3.8%',
    '  besides, 20.0 s between attempts: it ran 79.8% of the time',
  ]


def test_the_age_of_a_process_includes_its_imports():
  source = (
    'import time\ntime.sleep(0.3)\n'
    'from training.reporting import goodput\nprint(goodput.process_age())'
  )
  start = time.monotonic()
  printed = subprocess.run(
    [sys.executable, '-c', source],
    cwd=ROOT,
    capture_output=True,
    text=True,
  )
  # The kernel counts in hundredths of a second.
  assert 0.28 < float(printed.stdout) < time.monotonic() - start + 0.02


# ------------------------------------------------------------------------------
# Waiting for input, while the devices are at work.


class _Step:
  """Metrics that are there when the test says so."""

  def __init__(self):
    self.is_done = False

  def block_until_ready(self):
    while not self.is_done:
      time.sleep(0.001)
    return self


def _finish(wait, step, clock, at):
  """Ends a step at a time; returns when it has been noticed."""
  clock.now = at
  num_done = len(wait._done)
  step.is_done = True
  while len(wait._done) == num_done:
    time.sleep(0.001)


def test_a_wait_counts_where_the_devices_are_idle(clock):
  wait = input_wait.InputWait(clock)
  steps = [_Step() for _ in range(4)]
  wait.batch_came(0.0, 1.0)  # the first: nothing runs yet
  wait.dispatched(steps[0])
  wait.batch_came(1.0, 4.0)  # step 0 ends at 3: idle for 1 of these 3
  _finish(wait, steps[0], clock, at=3.0)
  wait.dispatched(steps[1])
  wait.batch_came(4.0, 6.0)  # step 1 ends at 8: never idle
  wait.dispatched(steps[2])
  _finish(wait, steps[1], clock, at=8.0)
  wait.batch_came(10.0, 15.0)  # step 2 ended at 9: idle throughout
  _finish(wait, steps[2], clock, at=9.0)
  wait.dispatched(steps[3])
  _finish(wait, steps[3], clock, at=20.0)
  assert wait.take() == 1.0 + 1.0 + 0.0 + 5.0
  assert wait.take() == 0.0
  wait.close()
  wait._thread.join(timeout=30)
  assert not wait._thread.is_alive()


def test_a_step_that_fails_is_told_of_by_the_loop():
  class Failing:
    def block_until_ready(self):
      raise RuntimeError

  wait = input_wait.InputWait()
  wait.batch_came(0.0, 1.0)
  wait.dispatched(Failing())
  assert wait.take() == 1.0
  wait.close()


# ------------------------------------------------------------------------------
# The loop.


class _Terminal:
  def __init__(self):
    self.speeds = []

  def update(self, step, loss, speed):
    del step, loss
    self.speeds.append(speed)


class _Log(metrics.Log):
  def __init__(self):
    self.records = []

  def write(self, kind, step, values):
    self.records.append((kind, step, values))


@pytest.fixture
def looped(monkeypatch):
  """A loop whose batches, steps and hooks take time by a clock of ours."""
  clock = _Clock()
  monkeypatch.setattr(loop.time, 'perf_counter', clock)
  monkeypatch.setattr(
    input_wait,
    'InputWait',
    functools.partial(input_wait.InputWait, clock),
  )
  measured = _measure(None, clock)
  clock.wait(32.0)
  terminal, log = _Terminal(), _Log()
  reporter = reporter_lib.Reporter(
    log,
    terminal,
    measured,
    learning_rate=lambda step: 0.5 * step,
    mfu_per_token_rate=0.25,
    epochs=lambda step: {},
    last_checkpoint=lambda: None,
  )

  def batches():
    """4 rows, then 8 from step 5 on; the batch of step 7 comes late."""
    for step in range(1, 9):
      if step == 7:
        clock.wait(2.0)
      yield {'tokens': np.zeros((4 if step < 5 else 8, 16))}

  def train_step(state, batch):
    is_new = state in (0, 4)
    clock.wait(64.0 if is_new else len(batch['tokens']) / 4)
    return state + 1, {'loss': jnp.float32(2.0), 'weight': jnp.float32(60.0)}

  loop.run(
    0,
    batches(),
    train_step,
    first_step=0,
    num_steps=8,
    put_batch=lambda batch: batch,
    reporter=reporter,
    report_every=3,
    hooks=[loop.Hook(8, lambda step, state: clock.wait(5.0), 'save')],
    should_stop=lambda step: False,
  )
  reporter.close()
  return clock, measured, terminal, log


def test_the_loop_tells_its_parts_apart(looped):
  clock, measured, _, _ = looped
  told = measured.life()
  assert {name: s for name, s in told.parts.items() if s} == {
    'start-up': 32.0,
    'compile': 128.0,  # two shapes
    'steps': 9.0,  # 3 of 1 s, 3 of 2 s
    'input': 2.0,
    'save': 5.0,
  }
  assert told.running == clock.now - 1000.0
  assert measured._now.marks == [(8, 9.0)]


def test_speed_counts_targets_and_positions(looped):
  """A new shape compiles: it is no slow step, and its tokens do not count."""
  _, _, terminal, log = looped
  speeds = {
    step: values for kind, step, values in log.records if kind == 'speed'
  }
  # Reports after 1 and 5 (compiled), 3, 4 (before the new shape), 6 and 8.
  assert terminal.speeds[0] == terminal.speeds[3] == {}
  assert speeds.keys() == {3, 4, 6, 8}
  # Seconds include the wait for the batch of step 7.
  for step, num_steps, rows, seconds in (
    (3, 2, 4, 2.0), (4, 1, 4, 1.0), (6, 1, 8, 2.0), (8, 2, 8, 6.0)
  ):  # fmt: skip
    speed = speeds[step]
    # 60 targets in every batch, as `tokens_seen` has them.
    assert speed['tokens_per_s'] == num_steps * 60 / seconds
    assert speed['positions_per_s'] == num_steps * rows * 16 / seconds
    assert speed['mfu'] == 0.25 * speed['tokens_per_s']
    assert speed['positions_mfu'] == 0.25 * speed['positions_per_s']
  assert speeds[8]['seconds_per_step'] == 3.0
  assert speeds[8]['goodput'] == 9.0 / (32.0 + 128.0 + 11.0)


def test_the_speed_of_a_run_is_that_of_its_tokens_seen(looped):
  _, measured, _, log = looped
  trained = sum(v['tokens'] for kind, _, v in log.records if kind == 'train')
  speeds = [v for kind, _, v in log.records if kind == 'speed']
  seconds = measured.seconds('steps', 'input')
  # Two of the eight steps compile, and have no speed.
  assert sum(
    v['tokens_per_s'] * v['seconds_per_step'] * n
    for v, n in zip(speeds, (2, 1, 1, 2), strict=True)
  ) == pytest.approx(trained * 6 / 8)
  assert seconds == 11.0


def test_every_step_has_its_learning_rate(looped):
  _, _, _, log = looped
  rates = [v['learning_rate'] for kind, _, v in log.records if kind == 'train']
  assert rates == [0.5 * i for i in range(8)]
