"""Decode steps of a dispatch: as many as fit into the time of a stream."""

import math

import pytest

from inference.engine import metrics as metrics_lib
from inference.requests import accounts as accounts_lib
from inference.scheduling import spans
from tests.helpers import tiny_models

_STEP = spans.Step(copies=(), decodes=(), chunks=(), seated=(), preempted=())


class _Clock:
  """Dispatches steps of given durations, one after another."""

  def __init__(self):
    self.accounts = accounts_lib.Accounts(
      metrics_lib.Metrics(), tiny_models.llama_like(), 1.0
    )
    self._now = math.inf

  def dispatch(self, rows: int, seconds: float, num_steps: int = 1) -> None:
    if self._now == math.inf:
      self._now = self.accounts._last_landed
    before, self._now = self._now, self._now + num_steps * seconds
    self.accounts.count(
      _STEP,
      num_steps=num_steps,
      num_decoded=0,
      num_prefilled=0,
      rows=rows,
      sent_at=before,
      now=self._now,
      is_timed=True,
    )

  def steps(self, num_decodes: int, num: int = 8) -> list[int]:
    """Returns the steps of the next dispatches within .1 s, 32 at most."""
    return [
      self.accounts.most_decode_steps(32, 0.1, num_decodes) for _ in range(num)
    ]


def test_steps_of_few_rows_say_nothing_about_steps_of_many():
  clock = _Clock()
  assert clock.steps(2) == [1] * 8  # nothing is timed yet
  clock.dispatch(rows=2, seconds=0.001)
  clock.dispatch(rows=32, seconds=0.019)
  assert clock.steps(2)[-1] == 32
  assert clock.steps(20)[-1] == 5
  clock.dispatch(rows=2, seconds=0.002)  # the host may have read it late
  assert clock.steps(2)[-1] == 32
  clock.dispatch(rows=32, seconds=0.01)  # a shorter time counts at once
  assert clock.steps(32)[-1] in (9, 10)  # of .1 s, rounded
  assert clock.steps(33) == [1] * 8


def test_dispatches_grow_after_sequences_have_come():
  clock = _Clock()
  clock.dispatch(rows=8, seconds=0.001)
  assert clock.steps(1) == [1, 2, 4, 8, 16, 32, 32, 32]
  assert clock.steps(1, 2) == [32, 32]
  assert clock.steps(2, 4) == [1, 2, 4, 8]  # one has come
  assert clock.steps(1, 3) == [16, 32, 32]  # one has ended


@pytest.mark.parametrize('num_decodes', [1, 8])
def test_without_a_limit_there_are_as_many_as_a_dispatch_may_have(num_decodes):
  accounts = _Clock().accounts
  assert accounts.most_decode_steps(32, 0, num_decodes) == 32
