"""The loop: which hooks run after a step, and in which order."""

import contextlib

import numpy as np

from training import loop


class _Goodput:
  def __init__(self):
    self.marks = []

  def mark(self, step):
    self.marks.append(step)

  def during(self, part):
    del part
    return contextlib.nullcontext()


class _Reporter:
  def __init__(self):
    self.goodput = _Goodput()
    self.flushed = 0

  def begin(self, first_step):
    pass

  def batch_came(self, asked_at, batch):
    pass

  def add(self, step, step_metrics):
    pass

  def flush(self):
    self.flushed += 1


def _run(*, stop_in_evaluation=0, stop_after=0, num_steps=7):
  """Evaluates every second step, saves every third; returns what was done."""
  done, reporter = [], _Reporter()

  def evaluate(step, state):
    assert state == step
    done.append(('evaluate', step))
    return step == stop_in_evaluation

  def save(step, state):
    assert state == step
    done.append(('save', step))

  last = loop.run(
    0,
    iter(lambda: np.zeros((1, 1)), None),
    lambda state, batch: (state + 1, {}),
    first_step=0,
    num_steps=num_steps,
    put_batch=lambda batch: batch,
    reporter=reporter,
    report_every=100,
    hooks=[
      loop.Hook(2, evaluate, 'evaluate'),
      loop.Hook(3, save, 'save', when_stopped=True),
    ],
    should_stop=lambda step: step == stop_after,
  )
  return done, last, reporter


def test_hooks_run_when_due_and_after_the_last_step():
  done, last, reporter = _run()
  assert done == [
    ('evaluate', 2),
    ('save', 3),
    ('evaluate', 4),
    ('evaluate', 6),
    ('save', 6),
    ('evaluate', 7),
    ('save', 7),
  ]
  assert last == 7
  assert reporter.goodput.marks == [3, 6, 7]
  assert reporter.flushed == 5  # once before the hooks of a step


def test_a_stop_saves_and_does_not_evaluate():
  assert _run(stop_after=1)[:2] == ([('save', 1)], 1)


def test_an_evaluation_that_is_stopped_saves_its_step():
  done, last, reporter = _run(stop_in_evaluation=4)
  assert done[-2:] == [('evaluate', 4), ('save', 4)]
  assert last == 4
  assert reporter.goodput.marks == [3, 4]
